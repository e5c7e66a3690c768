"""A weight stored as it is, and a dense weight some of whose elements are held at zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings.base import Encoding, Tape


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Encoding):
    """The plain tensor."""

    kind: ClassVar[str] = "dense"
    tensor: ir.TensorProtocol | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape if isinstance(self.tensor, np.ndarray) else self.tensor.shape.numpy())

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tensor.dtype if isinstance(self.tensor, np.ndarray) else self.tensor.dtype.numpy()

    @property
    def nbytes(self) -> int:
        return int(self.tensor.nbytes)

    def decode(self) -> np.ndarray:
        return self.tensor if isinstance(self.tensor, np.ndarray) else self.tensor.numpy()

    def emit(self, tape: Tape, name: str) -> ir.Value:
        return tape.constant(self.tensor, name)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"w": self.decode()}

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        return parameters["w"]

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Dense:
        return Dense(parameters["w"].astype(self.dtype, copy=False))


@dataclasses.dataclass(frozen=True, eq=False)
class Masked(Encoding):
    """A dense tensor whose zeros are structure: training never fills them.

    The mask needs no storage: it is read off the exact zeros. Where they are too few to tell (`recognizes`), or the
    weight is none of a layer, the tensor's metadata says so (`KEY`).
    """

    kind: ClassVar[str] = "masked"
    values: np.ndarray
    LEAST_ZEROS: ClassVar[float] = 0.01
    KEY: ClassVar[str] = "onnxcompress.masked"

    @staticmethod
    def apply(array: np.ndarray, mask: np.ndarray) -> Masked:
        """`array` with zeros wherever `mask` (bool, same shape, True = keep) is False. NaN does not survive as NaN
        there.
        """
        return Masked(np.where(mask, array, np.zeros((), array.dtype)))

    @staticmethod
    def recognizes(array: np.ndarray) -> bool:
        """True when at least 1 % of a tensor of rank 2 or more is exactly zero."""
        zeros = array.size - int(np.count_nonzero(array))
        return array.ndim >= 2 and zeros >= max(1.0, Masked.LEAST_ZEROS * array.size)

    @property
    def mask(self) -> np.ndarray:
        """bool, True where the weight is kept."""
        return np.asarray(self.values != 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def decode(self) -> np.ndarray:
        return self.values

    def emit(self, tape: Tape, name: str) -> ir.Value:
        return tape.constant(self.values, name)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"w": self.values}

    def buffers(self) -> dict[str, np.ndarray]:
        return {"mask": self.mask}

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        """w * mask: a pruned element neither acts nor gets a gradient."""
        w = parameters["w"]
        assert w.dtype is not None
        keep = tape.op("Cast", [buffers["mask"]], f"{name}.keep", {"to": int(w.dtype)})
        return tape.op("Mul", [w, keep], name)

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Masked:
        return Masked.apply(parameters["w"].astype(self.dtype, copy=False), self.mask)
