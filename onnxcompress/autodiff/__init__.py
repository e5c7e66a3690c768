"""Gradients of any ONNX model as more ONNX graph: a short engine, and one rule an operator.

    found = gradients(model, {"loss": None}, wrt=["conv1.weight", "conv1.bias"])

appends the gradient graph to `model` (onnx-ir) and returns, by name, the values that hold the gradients. The module
`rule` says how to add an operator; `coverage` says what can be trained before anything is.
"""

from onnxcompress.autodiff.coverage import Trainable, coverage
from onnxcompress.autodiff.engine import backward, gradients
from onnxcompress.autodiff.errors import NoGradient

__all__ = ["NoGradient", "Trainable", "backward", "coverage", "gradients"]
