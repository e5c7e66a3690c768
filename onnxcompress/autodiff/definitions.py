"""Operators of ONNX Runtime's own domain (and a few others), written in standard ones.

A definition gets a builder and the node and returns the node's outputs, None for those it leaves out. It replaces the
node before differentiation, so that the rules of standard operators serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnxcompress.autodiff.tensor import Builder, Tensor

Definition = Callable[[Builder, ir.Node], "Sequence[Tensor | None] | None"]
DEFINITIONS: dict[tuple[str, str], Definition] = {}
