"""The CPU provider of ONNX Runtime, on both classes of x86: with and without VNNI.

Seen in ONNX Runtime 1.32: u8 x s8 is the fast form and fuses to QLinearConv, QLinearMatMul, MatMulIntegerToFloat and
QGemm; s8 x s8 with a Relu does not fuse and is slower than float. A convolution fuses only if its output is quantized.
Without VNNI two neighbouring products are added in 16 bits and saturate silently, so weights stay below that.
"""

from __future__ import annotations

from onnxcompress.targets.base import Target

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
SAME_SCALE = frozenset({"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})

CPU = Target(
    name="cpu",
    activation="uint8",
    symmetric=False,
    weights="neighbours",
    dynamic=True,
    integer_rows=True,
    output=True,
    pass_through=SAME_SCALE,
    joined=frozenset({"Add", "Concat", "AveragePool", "GlobalAveragePool"}),
    bias="int32",
    types=frozenset({"int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", *FLOAT8}),
    slow=(
        ("ConvInteger", "int8 convolutions quantized at run time run 2 to 6 times slower than float"),
        ("MatMulBnb4", "runs 6.7 times slower than float"),
        *((name, "runs in float") for name in FLOAT8),
    ),
)
