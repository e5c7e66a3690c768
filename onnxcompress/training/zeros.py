"""Which zeros of a weight are structure that training keeps, and which are numbers like any other.

Pruning leaves its mask in the zeros themselves, so a layer that has some for other reasons (the row of a padding token,
values that underflowed) looks pruned a little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Affine, Dense, Masked, Sparse
from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.model import provenance
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight, weights

KeepZeros = Literal["auto", "always", "never"]
KEEP_ZEROS: tuple[str, ...] = ("auto", "always", "never")
PRUNED, PRUNED_BYTES = 0.2, 0.5  # shares of zeros from which a float and an 8-bit weight are taken for pruned
FREED = "freed"


@dataclasses.dataclass(frozen=True, eq=False)
class Freed(Encoding):
    """A weight whose zeros are let go: it trains, and is stored, as a plain tensor."""

    kind: ClassVar[str] = "freed"
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def decode(self) -> np.ndarray:
        return self.array

    def parameters(self) -> dict[str, np.ndarray]:
        return {FREED: self.array}

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        return parameters[FREED]


@dataclasses.dataclass(frozen=True, eq=False)
class Held(Encoding):
    """Integers (`inner`) some of which are held at zero: a pruned weight that was quantized."""

    kind: ClassVar[str] = "held"
    inner: Affine

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def decode(self) -> np.ndarray:
        return self.inner.decode()

    def parameters(self) -> dict[str, np.ndarray]:
        return self.inner.parameters()

    def buffers(self) -> dict[str, np.ndarray]:
        return {**self.inner.buffers(), "mask": self.inner.decode() != 0}

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        """The training form of w * mask: a zero has no gradient and stays what it is."""
        w = parameters["w"]
        assert w.dtype is not None
        keep = tape.op("Cast", [buffers["mask"]], f"{name}.keep", {"to": int(w.dtype)})
        return self.inner.forward(tape, {**parameters, "w": tape.op("Mul", [w, keep], f"{name}.kept")}, buffers, name)


class Keeping:
    """How weights of `model` train under `keep`.

    "never": zeros of masked and sparse weights are numbers. "always": all zeros of layers' weights stay. "auto": those
    of sparse weights stay, and of weights that were pruned: `reference` (what the model was made from) has other values
    there, or this project noted a mask or wrote the model, or at least 20 % are zero (50 % of an 8-bit weight).
    A zero in a codebook always stays.
    """

    def __init__(self, keep: KeepZeros, model: ir.Model, reference: ir.Model | None = None) -> None:
        self._keep, self._reference = keep, reference
        self._ours = provenance.read(model) is not None
        self._known: dict[str, Weight] | None = None

    def __call__(self, weight: Weight) -> Encoding:
        """The encoding that `weight` trains in."""
        found = weight.encoding
        if self._keep == "never":
            return Freed(found.decode()) if isinstance(found, Masked | Sparse) else found
        if isinstance(found, Affine):
            zeros = self._holds(found) if weight.role in WEIGHT_ROLES and len(weight.shape) > 1 else False
            return Held(found) if zeros else found
        if self._keep == "always" and isinstance(found, Dense) and _has_zeros(weight, found):
            return Masked(found.decode())
        if self._keep == "auto" and isinstance(found, Masked) and not self._is_pruned(weight, found):
            return Freed(found.values)
        return found

    def _holds(self, found: Affine) -> bool:
        if self._keep == "always":
            return not found.decode().all()
        return found.q.dtype.name in ("int8", "uint8") and _share(found.decode()) >= PRUNED_BYTES

    def _is_pruned(self, weight: Weight, found: Masked) -> bool:
        noted = weight.value.const_value
        if self._ours or (noted is not None and Masked.KEY in noted.metadata_props):
            return True
        if _share(found.values) >= PRUNED:
            return True
        before = self._before(weight)
        return before is not None and bool(np.any(before[found.values == 0]))

    def _before(self, weight: Weight) -> np.ndarray | None:
        if self._reference is None:
            return None
        if self._known is None:
            self._known = {known.key: known for known in weights(self._reference)}
        before = self._known.get(weight.key)
        return before.array() if before is not None and before.shape == weight.shape else None


def _has_zeros(weight: Weight, found: Dense) -> bool:
    return weight.role in WEIGHT_ROLES and len(weight.shape) > 1 and not found.decode().all()


def _share(array: np.ndarray) -> float:
    return 1 - np.count_nonzero(array) / array.size
