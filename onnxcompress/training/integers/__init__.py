"""Students that compute with integers: a form of them that trains, and the way back.

In the copy of a model that is trained, operators that take integers become float operators of dequantized operands
(`lifting.lift`): weights train there in their affine encoding, activations are quantized as the operator does it. What
was learned goes back into the integers of the original (`places.Places`), in which no node changes.
"""

from __future__ import annotations

from onnxcompress.training.integers import blocks, lookups, products, quantized, recurrent
from onnxcompress.training.integers.blocks import least_opset
from onnxcompress.training.integers.call import LIFTS
from onnxcompress.training.integers.lifting import is_fixed, lift, places, refusal

for family in (products, lookups, blocks, quantized, recurrent):
    LIFTS.update(family.TABLE)

__all__ = ["is_fixed", "least_opset", "lift", "places", "refusal"]
