"""A weight as integers with scale and zero point."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings.base import Encoding, Tape

Form = Literal["dequantize-linear", "folded", "integer"]


@dataclasses.dataclass(frozen=True, eq=False)
class Affine(Encoding):
    """w = (q - zero_point) * scale.

    `q`: int8 or uint8 (4-bit and others as ml_dtypes arrays in the dequantize-linear form). `scale`: scalar, or
    [channels] along `axis`,
    or blocked along `axis` with `block`. `zero_point`: like `scale` in the dtype of `q`, or None for 0.
    `form`: how it runs. "dequantize-linear": kept as integers up to the operator, which ONNX Runtime may fuse with its
    consumer;
    "folded": expanded to float when the model is loaded (small file, float speed, any opset); "integer": the consumer
    takes the integers
    (MatMulInteger, QLinearConv, a Gather of rows): recognized, but written by the pass that rewrites the consumer.
    """

    kind: ClassVar[str] = "affine"
    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    axis: int | None = None
    block: int | None = None
    form: Form = "dequantize-linear"
    out: np.dtype[Any] | None = None

    def __post_init__(self) -> None:
        """One scale for all is per tensor, however it was written."""
        if self.block is None and self.scale.size == 1:
            object.__setattr__(self, "axis", None)
            object.__setattr__(self, "scale", self.scale.reshape(()))
            if self.zero_point is not None:
                object.__setattr__(self, "zero_point", self.zero_point.reshape(()))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.out or self.scale.dtype

    @property
    def nbytes(self) -> int:
        bits = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}.get(self.q.dtype.name, 8 * self.q.itemsize)
        zero = 0 if self.zero_point is None else -(-self.zero_point.size * bits // 8)
        return -(-self.q.size * bits // 8) + self.scale.nbytes + zero

    @property
    def least_opset(self) -> int:
        if self.form == "folded":
            return 7
        if (
            self.block is not None
            or self.q.dtype.itemsize * 8 != 8
            or self.q.dtype.name not in ("int8", "uint8", "int32")
        ):
            return 21
        if self.scale.dtype != np.float32:
            return 19
        return 10 if self.axis is None else 13

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """scale or zero point, broadcastable against q."""
        if self.axis is None or (values.ndim == self.q.ndim and self.block is None):
            return values
        if self.block is not None:
            index = [slice(None)] * self.q.ndim
            index[self.axis] = slice(self.q.shape[self.axis])
            return np.repeat(values, self.block, axis=self.axis)[tuple(index)]
        shape = [1] * self.q.ndim
        shape[self.axis] = values.size
        return values.reshape(shape)

    def decode(self) -> np.ndarray:
        scale = self._spread(self.scale).astype(np.float32)
        zero = np.float32(0) if self.zero_point is None else self._spread(self.zero_point).astype(np.float32)
        return ((self.q.astype(np.float32) - zero) * scale).astype(self.dtype, copy=False)

    def emit(self, tape: Tape, name: str) -> ir.Value:
        q = tape.constant(ir.tensor(self.q, name=f"{name}.q") if self.q.dtype.name in _PACKED else self.q, f"{name}.q")
        zero = self.zero_point
        if self.form == "folded":
            scale = self._spread(self.scale).astype(np.float32)
            zero = np.zeros((), self.q.dtype) if zero is None else self._spread(zero)
            function = "DequantizeHalf" if self.dtype == np.float16 else "Dequantize"
            parts = [q, tape.constant(scale, f"{name}.scale"), tape.constant(zero, f"{name}.zero_point")]
            return tape.call(function, parts, name)
        if self.form != "dequantize-linear":
            raise ValueError(f"{name}: the {self.form} form is written by the pass that rewrites the consumer")
        inputs = [q, tape.constant(self.scale, f"{name}.scale")]
        if zero is not None:
            inputs.append(tape.constant(zero, f"{name}.zero_point"))
        attributes = {} if self.axis is None else {"axis": self.axis}
        if self.block is not None:
            attributes["block_size"] = self.block
        return tape.op("DequantizeLinear", inputs, name, attributes)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"w": self.decode(), "scale": self.scale}

    def buffers(self) -> dict[str, np.ndarray]:
        zero = np.zeros(self.scale.shape, self.q.dtype) if self.zero_point is None else self.zero_point
        return {"zero_point": zero, "q": self.q}

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Affine:
        scale = parameters.get("scale", self.scale).astype(self.scale.dtype)
        fresh = dataclasses.replace(self, scale=scale)
        zero = 0.0 if self.zero_point is None else fresh._spread(self.zero_point).astype(np.float32)
        levels = np.rint(parameters["w"] / fresh._spread(scale).astype(np.float32)) + zero
        low, high = _limits(self.q.dtype)
        return dataclasses.replace(fresh, q=np.clip(levels, low, high).astype(self.q.dtype))


_PACKED = ("int4", "uint4", "int2", "uint2")


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.name in _PACKED:
        bits, signed = int(dtype.name[-1]), not dtype.name.startswith("u")
        return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)
