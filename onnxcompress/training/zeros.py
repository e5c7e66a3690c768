"""In which encoding a weight trains, so that the zeros stay that shall stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import Affine, Dense, Masked, Sparse
from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.model.pruned import Pruned
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.weights import Weight

KeepZeros = Literal["auto", "always", "never"]
KEEP_ZEROS: tuple[str, ...] = ("auto", "always", "never")
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


class Keeping:
    """How weights of `model` train under `keep`.

    "never": zeros of masked, sparse and integer weights are numbers. "always": all zeros of layers' weights stay.
    "auto": those of weights that were pruned (`model.pruned.Pruned`). A zero in a codebook always stays.
    """

    def __init__(self, keep: KeepZeros, model: ir.Model, reference: ir.Model | None = None) -> None:
        self._keep = keep
        self._is_pruned = Pruned(model, reference)

    def __call__(self, weight: Weight) -> Encoding:
        """The encoding that `weight` trains in."""
        found = weight.encoding
        if isinstance(found, Affine):
            return dataclasses.replace(found, masked=self._holds(weight))
        if not isinstance(found, Dense | Masked | Sparse):
            return found
        if self._holds(weight):
            return Masked(found.decode()) if isinstance(found, Dense) else found
        return found if isinstance(found, Dense) else Freed(found.decode())

    def _holds(self, weight: Weight) -> bool:
        if self._keep == "never":
            return False
        if self._keep == "auto" or isinstance(weight.encoding, Masked | Sparse):
            return self._keep == "always" or self._is_pruned(weight)
        return weight.role in WEIGHT_ROLES and len(weight.shape) > 1 and not weight.array().all()
