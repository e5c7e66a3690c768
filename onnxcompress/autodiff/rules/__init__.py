"""The rules, one an operator, in files by family. Importing this package fills the table in `autodiff.rule`."""

from onnxcompress.autodiff.rules import (
    control_flow,
    convolution,
    elementwise,
    indexing,
    interpolation,
    linear,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    sampling,
    shape,
    zero,
)

__all__ = [
    "control_flow",
    "convolution",
    "elementwise",
    "indexing",
    "interpolation",
    "linear",
    "normalization",
    "pooling",
    "quantization",
    "recurrent",
    "reduction",
    "sampling",
    "shape",
    "zero",
]
