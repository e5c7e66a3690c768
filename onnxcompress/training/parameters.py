"""What of a model is trained: its weights, replaced by the training form of their encodings and fed as graph inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.errors import PassError
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight, weights
from onnxcompress.training import integers, scales
from onnxcompress.training.learned import Learned
from onnxcompress.training.levels import step_factor

REFERENCE_RMS, LEAST_STEP, LARGEST_STEP = 0.05, 0.01, 4.0
SCALE_STEP = 4.0  # of 1, 4 and 20 what heals a ResNet-8 in 4 bits best; by 20 weights of the reference move
_HALF = {"float16", "bfloat16"}
_VALUES = ("w", "values", "freed")  # parts that hold elements of the weight itself


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One trainable array: part `part` of the encoding of the weight `key`.

    `decay`: whether weight decay is for it. `layer`: whether it is a layer's weight, not a bias, norm or scale.
    `gradient`: what its gradient is multiplied by (`scales.gradient_scale`). `levels`: how much smaller its steps are
    because it moves between levels (`levels.step_factor`). `prunable`: whether gradual pruning takes elements of it.
    """

    key: str
    part: str
    value: ir.Value
    initial: np.ndarray
    decay: bool
    layer: bool
    gradient: float = 1.0
    levels: float = 1.0
    prunable: bool = False

    @property
    def name(self) -> str:
        """The graph input that it is."""
        return self.value.name or ""

    @property
    def mask(self) -> str:
        """The buffer that holds its mask, where its encoding has one."""
        return f"buffer/{self.key}/mask"

    @property
    def is_weight(self) -> bool:
        """Whether it holds elements of a layer's weight themselves."""
        return self.layer and self.part in _VALUES

    def stored(self, array: np.ndarray) -> np.ndarray:
        """What its value in training stands for."""
        return np.abs(array) if self.part == "scale" else array

    @property
    def relative(self) -> float:
        """How large its steps are beside those of a weight with root mean square 0.05; 1 for biases and norms.

        A first layer that takes pixels of 0 to 255 has weights a hundred times smaller than the next: one step size
        for both destroys it or leaves the rest where it is (Shazeer, Stern, 2018, section 8; You et al., 2020). A
        learned scale moves by four times the learning rate times itself.
        """
        if not self.layer and self.part != "scale":
            return 1.0
        kept = self.initial[self.initial != 0].astype(np.float64)
        rms = float(np.sqrt(np.mean(kept * kept))) if kept.size else 0.0
        if self.part == "scale":
            return SCALE_STEP * rms
        return self.levels * min(max(rms / REFERENCE_RMS, LEAST_STEP), LARGEST_STEP)


@dataclasses.dataclass(frozen=True, eq=False)
class _InTraining(Encoding):
    """An encoding whose inference form is the training form of `inner`: parameters and buffers are graph inputs."""

    kind: ClassVar[str] = "in training"
    inner: Encoding
    exposed: Exposed
    key: str
    layer: bool
    wide: bool  # every consumer casts it anyway, so half precision need not be restored
    prunable: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return _master(self.inner.dtype) if self.wide else self.inner.dtype

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def emit(self, tape: Tape, name: str) -> ir.Value:
        parameters: dict[str, ir.Value] = {}
        for part, array in self.inner.parameters().items():
            array = np.asarray(array.astype(_master(array.dtype), copy=False), order="C")
            factor = scales.gradient_scale(self.inner) if part == "scale" and self.exposed.learn_scales else None
            fixed = part == "scale" and factor is None
            label = f"{'buffer' if fixed else 'parameter'}/{self.key}/{part}"
            parameters[part] = _input(label, array)
            if fixed:
                self.exposed.buffers.append((parameters[part], array))
                continue
            decay, layer = self.layer and part in _VALUES, self.layer and part != "scale"
            between = step_factor(self.inner) if layer else 1.0
            prunable = self.prunable and part in _VALUES
            value, gradient = parameters[part], factor or 1.0
            parameter = Parameter(self.key, part, value, array, decay, layer, gradient, between, prunable)
            self.exposed.parameters.append(parameter)
            if part == "scale":
                parameters[part] = tape.op("Abs", [parameters[part]], f"{name}.scale.positive")
        found = self.inner.forward(tape, parameters, _Buffers(self.inner.buffers(), self.exposed, self.key), name)
        if self.dtype != _master(self.inner.dtype):
            kind = ir.DataType.from_numpy(self.dtype)
            found = tape.op("Cast", [found], f"{name}.half", {"to": int(kind)})
        return found


class _Buffers(dict[str, ir.Value]):
    """An encoding's buffers as graph inputs, made when the training form asks for one."""

    def __init__(self, arrays: Mapping[str, np.ndarray], exposed: Exposed, key: str) -> None:
        super().__init__()
        self._arrays, self._exposed, self._key = arrays, exposed, key

    def __missing__(self, part: str) -> ir.Value:
        value = _input(f"buffer/{self._key}/{part}", self._arrays[part])
        self._exposed.buffers.append((value, self._arrays[part]))
        self[part] = value
        return value


@dataclasses.dataclass(eq=False)
class Exposed:
    """What `expose` made: parameters, buffers, and the weights that are not trained with the reason."""

    parameters: list[Parameter] = dataclasses.field(default_factory=list)
    buffers: list[tuple[ir.Value, np.ndarray]] = dataclasses.field(default_factory=list)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    learn_scales: bool = False


def expose(
    model: ir.Model,
    allows: Callable[[Weight], bool] = lambda weight: True,
    restate: Callable[[Weight], Encoding] = lambda weight: weight.encoding,
    learn_scales: bool = False,
) -> Exposed:
    """Replace every trainable weight of `model`, in place, by its training form.

    `allows`: the user's selection. `restate`: the encoding in which a weight trains. `learn_scales`: those of integers.
    """
    exposed = Exposed(learn_scales=learn_scales)
    found = [weight for weight in weights(model) if not integers.is_fixed(weight)]
    learned = Learned(model, found)
    for weight in found:
        reason = integers.refusal(weight) or learned.refusal(weight) if allows(weight) else "not selected"
        if reason:
            exposed.left[weight.key] = reason
            continue
        inner = restate(weight)
        layer = learned.is_layer(weight)
        wide = inner.dtype.name in _HALF and all(use.node.op_type == "Cast" for use in weight.value.uses())
        try:
            weight.replace(_InTraining(inner, exposed, weight.key, layer, wide, is_prunable(weight)))
        except PassError as error:
            exposed.left[weight.key] = str(error)
    return exposed


def is_prunable(weight: Weight) -> bool:
    """Whether gradual pruning takes elements of `weight`: of a layer's, but no embedding's."""
    return weight.role in WEIGHT_ROLES and weight.role != "embedding" and len(weight.shape) > 1


def _input(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))


def _master(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which a parameter of `dtype` is held while it is trained."""
    return np.dtype(np.float32) if dtype.name in _HALF else dtype
