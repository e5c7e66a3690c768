"""The parts that dynamic and static int8 quantization share, and those of each."""
