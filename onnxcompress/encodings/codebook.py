"""A weight as packed codes into a small table of shared values (weight sharing, palettization)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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

        Raises:
            ValueError: codes are no uint8, or the table is empty, too long or not what `axis` asks for.
        """
        channels = () if self.axis is None else (self.codes.shape[self.axis],)
        if self.codes.dtype != np.uint8 or self.table.shape[:-1] != channels or not 1 <= self.table.shape[-1] <= 256:
            raise ValueError(
                f"codes {self.codes.dtype}{list(self.codes.shape)} with a table {list(self.table.shape)} and axis "
                f"{self.axis}: give uint8 codes and 1 to 256 entries, for each index of the axis if there is one"
            )
        if self.axis is not None:
            object.__setattr__(self, "axis", self.axis % self.codes.ndim)
        if self.out is not None and self.out not in (self.table.dtype, np.float32):
            object.__setattr__(self, "table", self.table.astype(self.out))  # the only cast at run time is to float32
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
        return _stored(self.codes.size, self.bits, self._channels, self.table.nbytes, self.codes.ndim)

    @property
    def _channels(self) -> int:
        return 0 if self.axis is None else len(self.table)

    @property
    def least_opset(self) -> int:
        if self.table.dtype.name == "bfloat16":
            return 13
        return 9 if self._channels else 7

    def structure(self) -> tuple[Any, ...]:
        return (self.axis,)

    @staticmethod
    def size(count: int, channels: int | None, k: int, itemsize: int, rank: int) -> int:
        """Bytes such an encoding would store, before it is made."""
        bits = next(b for b in CODE_BITS if k <= 1 << b)
        entries = k if bits == 8 else 1 << bits
        return _stored(count, bits, channels or 0, (channels or 1) * entries * itemsize, rank)

    def decode(self) -> np.ndarray:
        if self.axis is None:
            found = self.table[self.codes]
        else:
            moved = np.moveaxis(self.codes, self.axis, 0)
            number = np.arange(len(self.table)).reshape(-1, *[1] * (self.codes.ndim - 1))
            found = np.moveaxis(self.table[number, moved], 0, self.axis)
        return np.ascontiguousarray(found.astype(self.dtype, copy=False))

    def emit(self, tape: Tape, name: str) -> ir.Value:
        bits = self.bits if self.codes.size >= 8 // self.bits else 8  # not one whole byte
        packed, tail = pack(self.codes, bits)
        inputs = [
            tape.constant(packed, f"{name}.codes"),
            tape.constant(self.table, f"{name}.codebook"),
            tape.constant(np.array(self.shape, np.int64), f"{name}.shape"),
        ]
        if self.axis is not None:
            along = [1] * self.codes.ndim
            along[self.axis] = -1
            number = np.arange(len(self.table), dtype=np.uint16 if _channel_bytes(len(self.table)) == 2 else np.int32)
            inputs.append(tape.constant(number.reshape(along), f"{name}.channel"))
        if tail.size:
            inputs.append(tape.constant(tail, f"{name}.tail"))
        function = functions.depalettize(
            bits,
            channels=self.axis is not None,
            tail=bool(tail.size),
            to_float=self.table.dtype != self.dtype,
        )
        return tape.call(function, inputs, name)

    @staticmethod
    def recognize(function: str, inputs: Sequence[np.ndarray]) -> Codebook:
        """From the name and inputs of a `Depalettize...` call."""
        call = functions.parse_depalettize(function)
        rest = list(inputs[3:])
        channel = rest.pop(0) if call.channels else None
        tail = rest.pop(0) if call.tail else np.zeros(0, np.uint8)
        codes = unpack(inputs[0], tail, call.bits, tuple(int(d) for d in inputs[2]))
        axis = None if channel is None else next(i for i, d in enumerate(channel.shape) if d != 1)
        return Codebook(codes, inputs[1], axis, np.dtype(np.float32) if call.to_float else inputs[1].dtype)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"codebook": self.table}

    def buffers(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes}

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        """codebook[codes]: an entry's gradient is the sum over the elements that share it."""
        table = parameters["codebook"]
        assert table.dtype is not None
        if (self.table == 0).any():
            kept = tape.constant((self.table != 0).astype(table.dtype.numpy()), f"{name}.kept")
            table = tape.op("Mul", [table, kept], f"{name}.codebook.kept")
        index = tape.op("Cast", [buffers["codes"]], f"{name}.index", {"to": int(ir.DataType.INT32)})
        if self.axis is not None:  # one table after the other
            count, k = self.table.shape
            along = [1] * self.codes.ndim
            along[self.axis] = -1
            first = tape.constant((np.arange(count, dtype=np.int32) * k).reshape(along), f"{name}.first")
            index = tape.op("Add", [index, first], f"{name}.index.flat")
            whole = tape.constant(np.array([count * k], np.int64), f"{name}.size")
            table = tape.op("Reshape", [table, whole], f"{name}.codebook.flat")
        return tape.op("Gather", [table, index], name, {"axis": 0})

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Codebook:
        table = parameters["codebook"].astype(self.table.dtype)
        return dataclasses.replace(self, table=np.where(self.table == 0, np.zeros((), table.dtype), table))


def pack(codes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 codes as (whole bytes with the lowest bits first, the up to 7 codes that are left, a byte each).

    A tail needs no cut at run time, which the oldest opsets cannot express for any length.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    per = 8 // bits
    whole = flat.size - flat.size % per
    if per == 1:
        return flat, flat[:0]
    columns = flat[:whole].reshape(-1, per)
    packed = columns[:, 0].copy()
    for i in range(1, per):
        packed |= columns[:, i] << np.uint8(i * bits)
    return packed, flat[whole:]


def unpack(packed: np.ndarray, tail: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `pack`."""
    if bits == 8:
        return np.asarray(packed).reshape(shape)
    whole = functions.unpack_table(bits)[packed].reshape(-1)
    return np.ascontiguousarray((np.concatenate([whole, tail]) if tail.size else whole).reshape(shape))


def _stored(count: int, bits: int, channels: int, table_bytes: int, rank: int) -> int:
    per = 8 // bits
    return count // per + count % per + table_bytes + 8 * rank + _channel_bytes(channels) * channels


def _channel_bytes(channels: int) -> int:
    return 2 if channels <= 1 << 16 else 4
