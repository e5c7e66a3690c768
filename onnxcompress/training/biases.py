"""Biases in integers, which count in steps of the scales of their layer's input and weight.

Where the scale of the weight is learned, theirs must follow: ONNX Runtime 1.32 makes a QGemm of a quantized Gemm
whatever scale its bias gives, and adds the bias in steps of the other two; a Conv it leaves in float then.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Affine, recognize
from onnxcompress.model.weights import Weight

Parts = Mapping[str, Mapping[str, np.ndarray]]
_LAYERS = {"Conv", "ConvTranspose", "Gemm"}
_SAME = 1e-4  # by how much scales that were written as a product may differ from it


def following(trained: Parts, found: Mapping[str, Weight]) -> dict[str, dict[str, np.ndarray]]:
    """`trained`, with the scales that int32 biases have after it, and biases that were not trained and need another.

    `found`: the weights of the model by key, as they were before.
    """
    parts = {key: dict(each) for key, each in trained.items()}
    if not any("scale" in each for each in parts.values()):
        return parts
    by_value = {id(weight.value): weight for weight in found.values()}
    for bias in found.values():
        encoding = bias.encoding
        if not isinstance(encoding, Affine) or encoding.q.dtype != np.int32:
            continue
        for use in bias.uses:
            layer = by_value.get(id(use.node.inputs[1])) if use.node.op_type in _LAYERS and use.index == 2 else None
            if layer is None or "scale" not in trained.get(layer.key, {}) or not isinstance(layer.encoding, Affine):
                continue
            x_scale = _scale_of(use.node.inputs[0])
            if x_scale is None or not _is(encoding.scale, layer.encoding.scale * x_scale):
                continue
            scale = np.asarray(trained[layer.key]["scale"] * x_scale, np.float32)
            own = parts.setdefault(bias.key, {"w": encoding.decode()})
            own["scale"] = np.broadcast_to(scale, encoding.scale.shape).copy()
    return parts


def _scale_of(x: ir.Value | None) -> np.float32 | None:
    """The one constant scale at which an activation is dequantized."""
    node = x.producer() if x is not None else None
    tensor = recognize.constant(node.inputs[1]) if node is not None and node.op_type == "DequantizeLinear" else None
    return np.float32(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def _is(scale: np.ndarray, product: np.ndarray) -> bool:
    return product.size in (1, scale.size) and bool(np.allclose(scale, product, rtol=_SAME, atol=0))
