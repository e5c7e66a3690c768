"""A weight as packed codes into a small table of shared values (weight sharing, palettization)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions
from onnxcompress.encodings.base import Encoding, Tape

CODE_BITS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook(Encoding):
    """`codes`: uint8, shaped like the weight, one code an element. `table`: [k], or [channels, k] with an own codebook
    per index of `axis`.

    An entry that is exactly 0 is structure: training keeps it at 0. `out`: dtype of the weight; the table may be
    float16 for a float32 weight. Han, Mao, Dally, "Deep Compression", 2015.
    """

    kind: ClassVar[str] = "codebook"
    codes: np.ndarray
    table: np.ndarray
    axis: int | None = None
    out: np.dtype[Any] | None = None

    def __post_init__(self) -> None:
        """One codebook for all is per tensor. Fill the table up to a power of two, as far as whole bytes of codes can
        address it (never above 4 bits).
        """
        if self.axis is not None and len(self.table) == 1:
            object.__setattr__(self, "axis", None)
            object.__setattr__(self, "table", self.table[0])
        missing = (1 << self.bits) - self.table.shape[-1]
        if self.bits < 8 and missing:
            last = self.table[..., -1:]
            object.__setattr__(self, "table", np.concatenate([self.table, *[last] * missing], axis=-1))

    @property
    def bits(self) -> int:
        """Bits a code: the least of 1, 2, 4, 8 that hold the table's indices."""
        k = self.table.shape[-1]
        return next(b for b in CODE_BITS if k <= 1 << b)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.out or self.table.dtype

    @property
    def nbytes(self) -> int:
        return -(-self.codes.size * self.bits // 8) + self.table.nbytes + 8 * self.codes.ndim + 2 * self._channels

    @property
    def _channels(self) -> int:
        return 0 if self.axis is None else len(self.table)

    @property
    def least_opset(self) -> int:
        return 9 if self._channels else 7

    @staticmethod
    def size(count: int, channels: int | None, k: int, itemsize: int, rank: int) -> int:
        """Bytes such an encoding would store, before it is made."""
        bits = next(b for b in CODE_BITS if k <= 1 << b)
        return -(-count * bits // 8) + (channels or 1) * k * itemsize + 8 * rank + 2 * (channels or 0)

    def decode(self) -> np.ndarray:
        if self.axis is None:
            found = self.table[self.codes]
        else:
            moved = np.moveaxis(self.codes, self.axis, 0)
            number = np.arange(len(self.table)).reshape(-1, *[1] * (self.codes.ndim - 1))
            found = np.moveaxis(self.table[number, moved], 0, self.axis)
        return np.ascontiguousarray(found.astype(self.dtype, copy=False))

    def emit(self, tape: Tape, name: str) -> ir.Value:
        bits, count = self.bits, self.codes.size
        padded = bool(count * bits % 8)
        if padded and tape.opset < 10:  # no Slice with inputs there
            bits, padded = 8, False
        channels = self.axis is not None
        inputs = [
            tape.constant(pack(self.codes, bits), f"{name}.codes"),
            tape.constant(self.table, f"{name}.codebook"),
            tape.constant(np.array(self.shape, np.int64), f"{name}.shape"),
        ]
        if self.axis is not None:
            along = [1] * self.codes.ndim
            along[self.axis] = -1
            number = np.arange(len(self.table), dtype=np.uint16 if len(self.table) <= 1 << 16 else np.int32)
            inputs.append(tape.constant(number.reshape(along), f"{name}.channel"))
        to_float = self.table.dtype != self.dtype
        function = functions.depalettize(bits, channels=channels, padded=padded, to_float=to_float)
        return tape.call(function, inputs, name)

    @staticmethod
    def recognize(function: str, parts: Mapping[str, np.ndarray]) -> Codebook:
        """From the name and inputs of a `Depalettize...` call."""
        match = functions._DEPALETTIZE.match(function)
        assert match is not None
        shape = tuple(int(d) for d in parts["shape"])
        codes = unpack(parts["codes"], int(match["bits"]), shape)
        axis = None
        if match["channels"]:
            axis = next(i for i, d in enumerate(parts["channel"].shape) if d != 1)
        out = np.dtype(np.float32) if match["float"] else parts["codebook"].dtype
        return Codebook(codes, parts["codebook"], axis, out)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"codebook": self.table}

    def buffers(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes}

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Codebook:
        table = parameters["codebook"].astype(self.table.dtype)
        return dataclasses.replace(self, table=np.where(self.table == 0, np.zeros((), table.dtype), table))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes to bytes, lowest bits first; the last byte is filled up with code 0."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if bits == 8:
        return flat
    per = 8 // bits
    if flat.size % per:
        flat = np.concatenate([flat, np.zeros(-flat.size % per, np.uint8)])
    columns = flat.reshape(-1, per)
    packed = columns[:, 0].copy()
    for i in range(1, per):
        packed |= columns[:, i] << np.uint8(i * bits)
    return packed


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `pack`."""
    if bits == 8:
        return np.asarray(packed).reshape(shape)
    count = int(np.prod(shape, dtype=np.int64))
    return np.ascontiguousarray(functions.unpack_table(bits)[packed].reshape(-1)[:count].reshape(shape))
