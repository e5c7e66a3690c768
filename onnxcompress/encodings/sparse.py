"""A pruned weight stored without its zeros: one bit an element and the packed non-zero values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.numerics.chunks import slices


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse(Encoding):
    """`mask`: uint8 [ceil(n / 8)], lowest bit first. `values`: [1 + number of non-zeros], a leading 0 and the kept
    values in order.

    Smaller than dense above 1/32 zeros in float32. ONNX Runtime folds the expansion at load: run time and memory are
    the dense weight's.
    """

    kind: ClassVar[str] = "sparse"
    mask: np.ndarray
    values: np.ndarray
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the lengths.

        Raises:
            ValueError: mask and values do not fit the shape.
        """
        count = int(np.prod(self.dims, dtype=np.int64))
        if (
            self.mask.dtype != np.uint8
            or self.mask.shape != (-(-count // 8),)
            or not 1 <= len(self.values) <= count + 1
        ):
            raise ValueError(
                f"a mask {self.mask.dtype}{list(self.mask.shape)} with {len(self.values)} values for shape "
                f"{list(self.dims)}: give one bit an element, a 0 and the kept values"
            )

    @staticmethod
    def pack(array: np.ndarray) -> Sparse:
        """The encoding of `array`; an element equal to zero (of either sign) is dropped and decodes to +0."""
        flat = np.ascontiguousarray(array).reshape(-1)
        mask = np.zeros(-(-flat.size // 8), np.uint8)
        values = np.zeros(1 + int(np.count_nonzero(flat)), flat.dtype)
        filled = 1
        for part in slices(flat.size):  # whole bytes of the mask
            keep = flat[part] != 0
            kept = flat[part][keep]
            mask[part.start // 8 : -(-part.stop // 8)] = np.packbits(keep, bitorder="little")
            values[filled : filled + len(kept)] = kept
            filled += len(kept)
        return Sparse(mask, values, array.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dims

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.values.nbytes + 8 * len(self.dims)

    @property
    def least_opset(self) -> int:
        return 11

    def _keep(self) -> np.ndarray:
        count = int(np.prod(self.dims, dtype=np.int64))
        return np.unpackbits(self.mask, count=count, bitorder="little").astype(bool)

    def decode(self) -> np.ndarray:
        keep = self._keep()
        out = np.zeros(keep.shape, self.values.dtype)
        out[keep] = self.values[1:]
        return out.reshape(self.dims)

    def emit(self, tape: Tape, name: str) -> ir.Value:
        parts = [
            tape.constant(self.mask, f"{name}.mask"),
            tape.constant(self.values, f"{name}.values"),
            tape.constant(np.array(self.dims, np.int64), f"{name}.shape"),
        ]
        return tape.call("ExpandSparse", parts, name)

    @staticmethod
    def recognize(inputs: Sequence[np.ndarray]) -> Sparse:
        """From the inputs of an `ExpandSparse` call."""
        mask, values, shape = inputs
        return Sparse(mask, values, tuple(int(d) for d in shape))

    def parameters(self) -> dict[str, np.ndarray]:
        return {"values": self.values[1:]}

    def buffers(self) -> dict[str, np.ndarray]:
        return {"mask": self.mask}

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        """[0, values][index]: a dropped element points at the zero in front, which is no parameter."""
        values = parameters["values"]
        assert values.dtype is not None
        keep = self._keep()
        index = np.where(keep, np.cumsum(keep), 0).astype(np.int32).reshape(self.dims)
        zero = tape.constant(np.zeros(1, values.dtype.numpy()), f"{name}.zero")
        padded = tape.op("Concat", [zero, values], f"{name}.padded", {"axis": 0})
        return tape.op("Gather", [padded, tape.constant(index, f"{name}.index")], name, {"axis": 0})

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Sparse:
        """See `Encoding.updated`. `w` instead of `values`: the whole weight, which may have lost more elements."""
        if "w" in parameters:
            return Sparse.pack(parameters["w"].astype(self.dtype, copy=False))
        values = np.concatenate([np.zeros(1, self.values.dtype), parameters["values"].astype(self.values.dtype)])
        return Sparse(self.mask, values, self.dims)
