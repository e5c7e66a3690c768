"""Convolutions of a training step on ONNX Runtime's blocked kernels (NCHWc), which it keeps for constant weights."""

from onnxcompress.training.blocked.layout import block_size
from onnxcompress.training.blocked.lowering import lower

__all__ = ["block_size", "lower"]
