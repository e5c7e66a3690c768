"""Gradients of any ONNX model as more ONNX graph: a short engine, and one rule an operator."""

from onnxcompress.autodiff.engine import backward, gradients
from onnxcompress.autodiff.errors import NoGradient

__all__ = ["NoGradient", "backward", "gradients"]
