"""What the weights of a file are compared with: its parent's, after the rewrites that its recipe says were made."""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np
import onnx_ir as ir

from onnxcompress.contract import Run
from onnxcompress.encodings import recognize
from onnxcompress.errors import OnnxCompressError
from onnxcompress.model import bridge
from onnxcompress.model.provenance import Provenance
from onnxcompress.model.weights import Weight, weights
from onnxcompress.recipe import Recipe, Step
from onnxcompress.verification.structure import Anatomy

TRAINED = ("distill ", "train ")  # how what the commands of these names record begins, which is no recipe
EXACT = "lossless"  # the built-in recipe whose passes change the graph and leave what it computes


class References:
    """The parent's weights by key. `trained`: the recipe trains, so that weights may be anywhere. `notes`: see result.

    `exact`: apply the passes of `EXACT`, whatever the provenance says. `calibrated_as_it_was`: nothing had changed what
    the model computes when activations were measured.

    `folded`: output of a BatchNormalization -> key of the convolution's weight that may have taken it in.
    """

    def __init__(self, parent: ir.Model, provenance: Provenance | None, *, exact: bool = False) -> None:
        self.notes: list[str] = []
        steps = list(Recipe.load(EXACT).steps) if exact else self._steps(provenance)
        names = {step.name for step in Recipe.load(EXACT).steps}
        at = next((i for i, step in enumerate(steps) if step.run.needs.calibration), 0)
        self.calibrated_as_it_was = all(step.name in names for step in steps[:at])
        by_command = provenance is not None and provenance.recipe.startswith(TRAINED)
        self.trained = by_command or any(step.run.needs.gradients for step in steps)
        self.model = self._rewritten(parent, steps)
        self.weights: dict[str, Weight] = {weight.key: weight for weight in weights(self.model)}
        self.anatomy = Anatomy(self.model, self.weights.values())
        self.folded: dict[str, str] = {}
        self.parameters: dict[str, set[str]] = {}
        self._computed: dict[str, np.ndarray] = {}
        for weight in self.weights.values():
            self._fold(weight)

    def _steps(self, provenance: Provenance | None) -> list[Step]:
        if provenance is None or not provenance.recipe or provenance.recipe.startswith(TRAINED):
            return []
        if provenance.recipe.startswith("sha256:"):
            self.notes.append("the recipe is recorded by its digest alone: compared with the parent as it stands")
            return []
        try:
            return list(Recipe.load({"passes": _passes(json.loads(provenance.recipe))}).steps)
        except (OnnxCompressError, ValueError, TypeError, KeyError, AttributeError) as error:
            self.notes.append(f"the recorded recipe cannot be read ({error}): compared with the parent as it stands")
            return []

    def _rewritten(self, parent: ir.Model, steps: list[Step]) -> ir.Model:
        """The parent after those passes of the recipe that keep what a model computes (see `EXACT`)."""
        exact = {step.name for step in Recipe.load(EXACT).steps}
        model = bridge.clone(parent)
        for step in steps:
            if step.name in exact:
                with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
                    step.run.apply(model, Run(work=pathlib.Path(folder)))
        return model

    def _fold(self, weight: Weight) -> None:
        """Note what a convolution and the BatchNormalization behind it become when one takes in the other."""
        if weight.role != "conv" or len(weight.uses) != 1 or weight.uses[0].path:
            return
        conv = weight.uses[0].node
        users = list(conv.outputs[0].uses())
        if conv.op_type != "Conv" or len(users) != 1 or users[0].node.op_type != "BatchNormalization":
            return
        norm = users[0].node
        constants = [recognize.constant(value) for value in norm.inputs[1:5]]
        if any(tensor is None for tensor in constants):
            return
        gamma, beta, mean, variance = (t.numpy().astype(np.float64) for t in constants if t is not None)
        epsilon = norm.attributes.get("epsilon")
        factor = gamma / np.sqrt(variance + (1e-5 if epsilon is None else epsilon.as_float()))
        array = weight.array()
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        held = recognize.constant(bias)
        shift = (0.0 if held is None else held.numpy().astype(np.float64)) - mean
        name = norm.outputs[0].name or ""
        self.folded[name] = weight.key
        spread = factor.reshape(-1, *[1] * (array.ndim - 1))
        self._computed[weight.key] = (array.astype(np.float64) * spread).astype(array.dtype)
        self._computed[f"{name}.bias"] = (shift * factor + beta).astype(array.dtype)
        inputs = [*norm.inputs[1:5], *([bias] if bias is not None else [])]
        self.parameters[name] = {key for key, w in self.weights.items() if any(w.value is value for value in inputs)}

    def computed(self, key: str) -> np.ndarray | None:
        """What the parent's weight becomes when the BatchNormalization behind it is folded in; also its bias."""
        return self._computed.get(key)


def _passes(steps: list[dict[str, object]]) -> list[dict[str, object]]:
    """Recorded steps in the words of a recipe."""
    return [{str(step["pass"]): {k: v for k, v in step.items() if k != "pass"}} for step in steps]
