"""The rules of the pass `simplify`, one file a rule; `bench.py` is what they share."""
