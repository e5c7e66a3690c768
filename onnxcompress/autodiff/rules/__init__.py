"""The rules, one an operator, in files by family. Importing this package fills the table in `autodiff.rule`."""

from onnxcompress.autodiff.rules import (
    convolution,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    quantization,
    reduction,
    shape,
    zero,
)

__all__ = [
    "convolution",
    "elementwise",
    "indexing",
    "linear",
    "normalization",
    "pooling",
    "quantization",
    "reduction",
    "shape",
    "zero",
]
