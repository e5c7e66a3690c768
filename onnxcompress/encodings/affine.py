"""A weight as integers with scale and zero point."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions
from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.encodings.dense import Masked

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
    `masked`: its zeros are structure (a weight was pruned before it was quantized), and training never fills them. The
    file says so where they do not show it themselves (`shows_zeros`).
    """

    kind: ClassVar[str] = "affine"
    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None = None
    axis: int | None = None
    block: int | None = None
    form: Form = "dequantize-linear"
    out: np.dtype[Any] | None = None
    masked: bool = False

    def __post_init__(self) -> None:
        """One scale for all is per tensor, however it was written.

        Raises:
            ValueError: scale or zero point do not fit the integers, or the folded form is asked for blocks.
        """
        object.__setattr__(self, "scale", np.asarray(self.scale))  # numpy gives scalars for some 0-d arrays
        if self.zero_point is not None:
            object.__setattr__(self, "zero_point", np.asarray(self.zero_point))
        if self.block is not None and self.form == "folded":
            raise ValueError("the folded form has no blocks; use the dequantize-linear form")
        if self.axis is not None:
            object.__setattr__(self, "axis", self.axis % self.q.ndim)
        if self.form == "folded" and self.scale.dtype != np.float32:
            object.__setattr__(self, "out", self.dtype)
            object.__setattr__(self, "scale", self.scale.astype(np.float32))  # the function computes in float32
        if self.form == "folded" and self.zero_point is None:
            object.__setattr__(self, "zero_point", np.zeros((), self.q.dtype))  # it always takes one
        if self.block is None and self.scale.size == 1:
            object.__setattr__(self, "axis", None)
            object.__setattr__(self, "scale", self.scale.reshape(()))
            if self.zero_point is not None:
                object.__setattr__(self, "zero_point", self.zero_point.reshape(()))
        elif self.zero_point is not None and self.zero_point.size == 1 and self.form == "folded":
            object.__setattr__(self, "zero_point", self.zero_point.reshape(()))
        elif self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            object.__setattr__(self, "zero_point", np.broadcast_to(self.zero_point, self.scale.shape).copy())
        if self.scale.shape != self._scale_shape() or self.dtype.name not in OUT:
            raise ValueError(
                f"{self.q.dtype}{list(self.q.shape)} with a scale {list(self.scale.shape)}, axis {self.axis}, block "
                f"{self.block}, as {self.dtype}: give a scalar, one an index of the axis, or one a block"
            )

    def _scale_shape(self) -> tuple[int, ...]:
        if self.axis is None:
            return ()
        if self.block is None:
            return (self.q.shape[self.axis],)
        return tuple(-(-d // self.block) if i == self.axis else d for i, d in enumerate(self.q.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.out or self.scale.dtype

    @property
    def nbytes(self) -> int:
        bits = bits_of(self.q.dtype)
        zero = 0 if self.zero_point is None else self.zero_point.size
        return -(-self.q.size * bits // 8) + self.scale.nbytes + -(-zero * bits // 8)

    @property
    def least_opset(self) -> int:
        name = self.q.dtype.name
        of_type = 19 if name.startswith("float8") else _OPSET_OF_TYPE.get(name, 21)
        if self.form == "folded":
            of_type = 7 if name in ("int8", "uint8", "int16", "uint16", "int32") else of_type
            return max(of_type, 13) if self.dtype.name == "bfloat16" else of_type
        if self.dtype != self.scale.dtype:
            return 23
        if self.block is not None:
            return max(21, of_type)
        if self.scale.dtype != np.float32:
            return max(19, of_type)
        return of_type if self.axis is None else max(13, of_type)

    def structure(self) -> tuple[Any, ...]:
        return (self.axis, self.block, self.form)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """scale or zero point, broadcastable against q."""
        if not values.ndim:
            return values
        assert self.axis is not None
        if self.block is not None:
            index = [slice(None)] * self.q.ndim
            index[self.axis] = slice(self.q.shape[self.axis])
            return np.repeat(values, self.block, axis=self.axis)[tuple(index)]
        shape = [1] * self.q.ndim
        shape[self.axis] = values.size
        return values.reshape(shape)

    def _zero(self) -> Any:
        """The zero point in float32, broadcastable against q."""
        return np.float32(0) if self.zero_point is None else self._spread(self.zero_point).astype(np.float32)

    def steps(self) -> np.ndarray:
        """scale in float32, broadcastable against the weight: how far two levels are apart."""
        return np.asarray(self._spread(self.scale).astype(np.float32))

    def levels(self) -> np.ndarray:
        """q - zero_point in float32, shaped like the weight."""
        return np.asarray(self.q.astype(np.float32) - self._zero())

    def decode(self) -> np.ndarray:
        decoded: np.ndarray = (self.levels() * self.steps()).astype(self.dtype, copy=False)
        return decoded

    def shows_zeros(self) -> bool:
        """Whether its zeros tell by themselves that it was pruned (see `stand_out`)."""
        return stand_out(self.levels())

    def notes(self) -> dict[str, str]:
        """What the metadata of the constant that holds q says."""
        return {Masked.KEY: "1"} if self.masked and not self.shows_zeros() else {}

    def emit(self, tape: Tape, name: str) -> ir.Value:
        if self.form == "integer":
            raise ValueError(f"{name}: the integer form is written by the pass that rewrites the consumer")
        q = tape.constant(self.q, f"{name}.q", self.notes())
        zero = self.zero_point
        if self.form == "folded":
            assert zero is not None
            suffix = next(k for k, v in functions.DEQUANTIZE.items() if v == ir.DataType.from_numpy(self.dtype))
            scale = tape.constant(self._spread(self.scale), f"{name}.scale")
            parts = [q, scale, tape.constant(self._spread(zero), f"{name}.zero_point")]
            return tape.call(f"Dequantize{suffix}", parts, name)
        inputs = [q, tape.constant(self.scale, f"{name}.scale")]
        if zero is not None:
            inputs.append(tape.constant(zero, f"{name}.zero_point"))
        attributes = {} if self.axis is None else {"axis": self.axis}
        if self.block is not None:
            attributes["block_size"] = self.block
        if self.dtype != self.scale.dtype:
            attributes["output_dtype"] = int(ir.DataType.from_numpy(self.dtype))
        least_ir = _IR_OF_TYPE.get(self.q.dtype.name, 0)
        if tape.model.ir_version < least_ir:
            functions.lift_ir_version(tape.model, least_ir)
        return tape.op("DequantizeLinear", inputs, name, attributes)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"w": self.decode(), "scale": self.scale}

    def buffers(self) -> dict[str, np.ndarray]:
        zero = np.zeros(self.scale.shape, self.q.dtype) if self.zero_point is None else self.zero_point
        return {"zero_point": zero, "q": self.q} | ({"mask": self.decode() != 0} if self.masked else {})

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        """Fake quantization, whose gradient passes straight through the rounding (Jacob et al., 2018).

        Integers as wide as a bias's are left unrounded: their steps are too small to matter. Of a masked weight it is
        that of w * mask: a zero has no gradient and stays what it is.
        """
        w, scale = parameters["w"], parameters["scale"]
        if self.masked:
            assert w.dtype is not None
            keep = tape.op("Cast", [buffers["mask"]], f"{name}.keep", {"to": int(w.dtype)})
            w = tape.op("Mul", [w, keep], f"{name}.kept")
        kind = self.q.dtype.name
        if kind == "int32" or (kind in ("int16", "uint16") and tape.opset < 21):
            return w
        zero = tape.constant(
            np.broadcast_to(self.buffers()["zero_point"], self.scale.shape).copy(), f"{name}.zero_point"
        )
        attributes = {} if self.axis is None else {"axis": self.axis}
        if self.block is not None:
            attributes["block_size"] = self.block
        q = tape.op("QuantizeLinear", [w, scale, zero], f"{name}.q", attributes)
        return tape.op("DequantizeLinear", [q, scale, zero], name, attributes)

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Affine:
        """See `Encoding.updated`. Zeros that training was told to let go are filled, and then no structure."""
        scale = parameters.get("scale", self.scale).astype(self.scale.dtype)
        fresh = dataclasses.replace(self, scale=scale)
        step = fresh.steps()
        w = parameters["w"].astype(np.float32)
        # A channel with scale 0 holds nothing but 0.
        levels = np.rint(np.divide(w, step, out=np.zeros_like(w), where=step != 0)) + self._zero()
        low, high = limits(self.q.dtype)
        fresh = dataclasses.replace(fresh, q=np.clip(levels, low, high).astype(self.q.dtype))
        filled = bool(np.any(fresh.levels()[self.levels() == 0]))
        return dataclasses.replace(fresh, masked=(self.masked or self.shows_zeros()) and not filled)


OUT = ("float32", "float16", "bfloat16", "float64")
_PEAK, _FEWEST = 3, 16
_OPSET_OF_TYPE = {"int8": 10, "uint8": 10, "int32": 10, "int2": 25, "uint2": 25, "float4_e2m1fn": 23}
_IR_OF_TYPE = {"int4": 10, "uint4": 10, "int2": 13, "uint2": 13}


def stand_out(levels: np.ndarray) -> bool:
    """Whether level 0 holds so many of `levels` that rounding alone cannot have brought them there.

    That are at least 16, and more than three times as many as on either level beside it. Where steps are narrow, as
    they are where most others lie further away than that, rounding gives less than twice as many (of a normal or a
    Laplace distribution); where they are wide, zeros tell nothing.
    """
    at, below, above = (int(np.count_nonzero(levels == level)) for level in (0, -1, 1))
    is_narrow = levels.size - at >= 2 * (below + above)
    return at >= _FEWEST and at > _PEAK * max(below, above) and is_narrow


def bits_of(dtype: np.dtype[Any]) -> int:
    """Bits a file stores for one element."""
    return ir.DataType.from_numpy(dtype).bitwidth


def limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The least and the greatest value of an integer or float8 type."""
    if dtype.name in ("int4", "uint4", "int2", "uint2"):
        bits, signed = int(dtype.name[-1]), not dtype.name.startswith("u")
        return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if dtype.kind not in "iu":
        info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
        return float(info.min), float(info.max)
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
