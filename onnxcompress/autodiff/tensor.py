"""The notation in which gradients are written: tensors with numpy's operators.

A `Tensor` is a value of the graph under construction. `g * (1 - y * y)` appends Mul, Sub, Mul nodes; a Python number
becomes a scalar constant of the other operand's type; a boolean operand becomes a mask of zeros and ones. Shapes are
used where they are known and computed in the graph where they are not: no dynamic dimension is ever baked in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from onnxcompress.autodiff.builder import Builder

Dims = tuple[int | str | None, ...]  # a size, the name of a free dimension, or None for an unknown one
Size = Union[int, "Tensor"]  # a dimension: a number, or an int64 tensor [1] that holds it at run time
Operand = Union["Tensor", float, int, bool]


class Tensor:
    """A value of the graph under construction, with numpy's operators."""

    __slots__ = ("b", "value")
    __hash__ = object.__hash__

    def __init__(self, builder: Builder, value: ir.Value) -> None:
        self.b, self.value = builder, value

    @property
    def dtype(self) -> ir.DataType:
        """Element type; float32 where nothing is known."""
        return self.value.dtype or ir.DataType.FLOAT

    @property
    def shape(self) -> Dims | None:
        """Sizes, names of free dimensions, None for unknown ones; None as a whole when the rank is unknown."""
        if self.value.shape is None:
            return None
        return tuple(d if isinstance(d, int) else d.value or None for d in self.value.shape)

    @property
    def rank(self) -> int | None:
        """How many axes, where known."""
        return None if self.value.shape is None else len(self.value.shape)

    @property
    def static(self) -> bool:
        """True when every size is a number."""
        return self.shape is not None and all(isinstance(d, int) for d in self.shape)

    def shaped(self, *sizes: int | str | None) -> Tensor:
        """This tensor, its shape declared where nothing was known."""
        if self.value.shape is None:
            self.value.shape = ir.Shape(sizes)
        return self

    # Arithmetic ------------------------------------------------------------------------------------------------------

    def operand(self, other: Operand) -> Tensor:
        """`other` in this tensor's type: a number becomes a scalar constant, a boolean tensor a mask."""
        if not isinstance(other, Tensor):
            return self.b.constant(other, self.dtype)
        return other.cast(self.dtype) if other.dtype == ir.DataType.BOOL != self.dtype else other

    def _binary(self, op_type: str, other: Operand, swap: bool = False) -> Tensor:
        a, b = self, self.operand(other)
        if self.dtype == ir.DataType.BOOL != b.dtype:
            a = self.cast(b.dtype)
        shape = broadcast(a.shape, b.shape)
        return self.b.op(op_type, b, a, shape=shape) if swap else self.b.op(op_type, a, b, shape=shape)

    def __add__(self, other: Operand) -> Tensor:
        return self._binary("Add", other)

    def __sub__(self, other: Operand) -> Tensor:
        return self._binary("Sub", other)

    def __mul__(self, other: Operand) -> Tensor:
        return self._binary("Mul", other)

    def __truediv__(self, other: Operand) -> Tensor:
        return self._binary("Div", other)

    def __pow__(self, other: Operand) -> Tensor:
        return self._binary("Pow", other)

    def __radd__(self, other: Operand) -> Tensor:
        return self._binary("Add", other, swap=True)

    def __rsub__(self, other: Operand) -> Tensor:
        return self._binary("Sub", other, swap=True)

    def __rmul__(self, other: Operand) -> Tensor:
        return self._binary("Mul", other, swap=True)

    def __rtruediv__(self, other: Operand) -> Tensor:
        return self._binary("Div", other, swap=True)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.b.op("MatMul", self, other, shape=product_of(self.shape, other.shape))

    def __neg__(self) -> Tensor:
        return self.map("Neg")

    def __gt__(self, other: Operand) -> Tensor:
        return self._binary("Greater", other)

    def __lt__(self, other: Operand) -> Tensor:
        return self._binary("Less", other)

    def __ge__(self, other: Operand) -> Tensor:
        return self._binary("GreaterOrEqual", other)

    def __le__(self, other: Operand) -> Tensor:
        return self._binary("LessOrEqual", other)

    def __and__(self, other: Tensor) -> Tensor:
        return self.b.op("And", self, other, shape=broadcast(self.shape, other.shape))

    def __invert__(self) -> Tensor:
        return self.map("Not")

    def equals(self, other: Operand) -> Tensor:
        """Elementwise equality (`==` is left to Python)."""
        return self._binary("Equal", other)

    def map(self, op_type: str, **attributes: Any) -> Tensor:
        """An elementwise operator of one input: `x.map("Exp")`."""
        return self.b.op(op_type, self, shape=self.shape, **attributes)

    def cast(self, dtype: ir.DataType) -> Tensor:
        """This tensor in another type."""
        if self.value.dtype == dtype:
            return self
        return self.b.op("Cast", self, dtype=dtype, shape=self.shape, to=int(dtype))

    # Sizes -----------------------------------------------------------------------------------------------------------

    def size(self, axis: int) -> Size:
        """The size along `axis`: a number where known."""
        if self.shape is not None:
            known = self.shape[axis]
            if isinstance(known, int):
                return known
        if axis == -1:
            return self.b.op("Shape", self, shape=(1,), start=-1)
        return self.b.op("Shape", self, shape=(1,), start=axis, end=axis + 1)

    def sizes(self) -> Tensor:
        """The shape, int64 [rank]: a constant where known."""
        if self.static:
            return self.b.constant(np.array(self.shape, np.int64))
        return self.b.op("Shape", self, shape=(self.rank,))

    def count(self, axes: Sequence[int]) -> Operand:
        """The number of elements along `axes`, to compute with: a Python number, or a scalar of this tensor's type."""
        known = [self.size(axis) for axis in axes]
        if all(isinstance(size, int) for size in known):
            return math.prod(size for size in known if isinstance(size, int))
        return product(self.b, known).cast(self.dtype).reshape([])

    # Movement --------------------------------------------------------------------------------------------------------

    def reshape(self, sizes: Sequence[Size]) -> Tensor:
        """Another shape; -1 once for what is left. One size known only at run time needs no computing."""
        dynamic = [i for i, size in enumerate(sizes) if isinstance(size, Tensor)]
        known: Dims = tuple(size if isinstance(size, int) and size > 0 else None for size in sizes)
        if len(dynamic) == 1 and not any(isinstance(size, int) and size <= 0 for size in sizes):
            sizes = [-1 if isinstance(size, Tensor) else size for size in sizes]
        return self.b.op("Reshape", self, self.b.ints(sizes), shape=known)

    def reshape_like(self, other: Tensor) -> Tensor:
        """The shape of `other`, which has as many elements."""
        if self.shape is not None and same(self.shape, other.shape):
            return self
        if other.shape is not None and sum(not isinstance(d, int) for d in other.shape) <= 1 and 0 not in other.shape:
            sizes = self.b.constant(np.array([d if isinstance(d, int) else -1 for d in other.shape], np.int64))
            return self.b.op("Reshape", self, sizes, shape=other.shape)
        return self.b.op("Reshape", self, other.sizes(), shape=other.shape, allowzero=1)

    def expand_like(self, other: Tensor) -> Tensor:
        """Broadcast to the shape of `other`."""
        if self.shape is not None and same(self.shape, other.shape):
            return self
        return self.b.op("Expand", self, other.sizes(), shape=other.shape)

    def transpose(self, perm: Sequence[int]) -> Tensor:
        """Axes in another order; two transpositions in a row become one, or none."""
        if list(perm) == list(range(len(perm))):
            return self
        before = self.value.producer()
        if before is not None and before.op_type == "Transpose" and not before.domain and before.inputs[0] is not None:
            first = before.attributes.get_ints("perm") or range(len(perm))[::-1]
            both = [first[i] for i in perm]
            if not self.value.uses() or both == list(range(len(perm))):
                return Tensor(self.b, before.inputs[0]).transpose(both)
        shape = None if self.shape is None else tuple(self.shape[i] for i in perm)
        return self.b.op("Transpose", self, shape=shape, perm=list(perm))

    def swap(self) -> Tensor:
        """The last two axes exchanged: the transpose of a stack of matrices."""
        if self.rank is None:  # Transpose wants every axis named
            return self.b.op("Einsum", self, equation="...ij->...ji")
        return self.transpose([*range(self.rank - 2), self.rank - 1, self.rank - 2])

    def unsqueeze(self, *axes: int) -> Tensor:
        """New axes of size 1 at these places of the result (none of them negative, ascending)."""
        if not axes:
            return self
        shape = None
        if self.shape is not None:
            dims = list(self.shape)
            for axis in axes:
                dims.insert(axis, 1)
            shape = tuple(dims)
        return self.b.op("Unsqueeze", self, self.b.ints(axes), shape=shape)

    def squeeze(self, *axes: int) -> Tensor:
        """Without these axes of size 1."""
        shape = None if self.shape is None else tuple(d for i, d in enumerate(self.shape) if i not in axes)
        return self.b.op("Squeeze", self, self.b.ints(axes), shape=shape)

    def slice(
        self, axes: Sequence[int], starts: Sequence[Size], ends: Sequence[Size], steps: Sequence[int] | None = None
    ) -> Tensor:
        """A part, as the operator Slice defines it."""
        shape: Dims | None = None
        if self.shape is not None:
            shape = tuple(None if i in axes else d for i, d in enumerate(self.shape))
        b = self.b
        stride = b.ints(steps) if steps is not None and any(step != 1 for step in steps) else None
        return b.op("Slice", self, b.ints(starts), b.ints(ends), b.ints(axes), stride, shape=shape)

    def at(self, axis: int, index: int) -> Tensor:
        """One slice along `axis`, without that axis."""
        return self.b.op("Gather", self, self.b.constant(np.int64(index)), axis=axis, shape=_without(self.shape, axis))

    def take(self, indices: Tensor, axis: int = 0) -> Tensor:
        """Slices along `axis` picked by an index tensor."""
        return self.b.op("Gather", self, indices, axis=axis)

    # Reduction -------------------------------------------------------------------------------------------------------

    def sum(self, *axes: int, keep: bool = True) -> Tensor:
        """Sum over `axes` (all of them if none is given)."""
        return self.reduce("ReduceSum", axes, keep)

    def mean(self, *axes: int, keep: bool = True) -> Tensor:
        """Mean over `axes`."""
        return self.reduce("ReduceMean", axes, keep)

    def reduce(self, op_type: str, axes: Sequence[int], keep: bool = True) -> Tensor:
        """Any reduction: axes are an input from opset 18 on (ReduceSum: 13), an attribute before."""
        shape: Dims | None = None
        if self.shape is not None:
            over = {a % len(self.shape) for a in axes} if axes else set(range(len(self.shape)))
            shape = tuple(1 if i in over else d for i, d in enumerate(self.shape) if keep or i not in over)
        if self.b.opset >= 18 or op_type == "ReduceSum":
            given = self.b.ints(axes) if axes else None
            return self.b.op(op_type, self, given, shape=shape, keepdims=int(keep))
        return self.b.op(op_type, self, shape=shape, axes=list(axes) or None, keepdims=int(keep))

    def unbroadcast(self, like: Tensor) -> Tensor:
        """Undo broadcasting: sum over the axes along which `like` was repeated to become as large as this tensor."""
        if self.shape is not None and like.shape is not None:
            front = len(self.shape) - len(like.shape)
            pairs = [(i, self.shape[i], its) for i, its in enumerate(like.shape, front)]
            if all(isinstance(its, int) or mine == 1 or (mine == its and its is not None) for _, mine, its in pairs):
                axes = [i for i, mine, its in pairs if its == 1 and mine != 1]
                summed = self.sum(*range(front), *axes) if front or axes else self
                return summed.squeeze(*range(front)) if front else summed
        return self._unbroadcast_at_run_time(like)

    def _unbroadcast_at_run_time(self, like: Tensor) -> Tensor:
        b = self.b
        mine, its = b.op("Shape", self), b.op("Shape", like)
        padded = its
        if self.rank is None or like.rank is None or self.rank != like.rank:
            missing = b.op("Shape", mine) - b.op("Shape", its)
            padded = b.op("Concat", b.op("Expand", b.ints([1]), missing), its, axis=0)
        axes = b.op("Squeeze", b.op("NonZero", ~mine.equals(padded)), b.ints([0]))
        summed = b.op("ReduceSum", self, axes, keepdims=1, noop_with_empty_axes=1)
        return b.op("Reshape", summed, its, shape=like.shape, allowzero=1)


def product(b: Builder, sizes: Sequence[Size]) -> Tensor:
    """int64 [1]: the product of sizes."""
    return b.ints(sizes).reduce("ReduceProd", [0])


def same(a: Dims | None, b: Dims | None) -> bool:
    """True when two shapes are known to be equal."""
    return (
        a is not None
        and b is not None
        and len(a) == len(b)
        and all(x == y and x is not None for x, y in zip(a, b, strict=True))
    )


def broadcast(a: Dims | None, b: Dims | None) -> Dims | None:
    """The shape of an elementwise result, as far as it can be known."""
    if a is None or b is None:
        return None
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b), strict=True)
    return tuple(_wider(x, y) for x, y in pairs)


def product_of(a: Dims | None, b: Dims | None) -> Dims | None:
    """The shape of a product of stacks of matrices."""
    stack = None if a is None or b is None or min(len(a), len(b)) < 2 else broadcast(a[:-2], b[:-2])
    return None if a is None or b is None or stack is None else (*stack, a[-2], b[-1])


def _wider(x: int | str | None, y: int | str | None) -> int | str | None:
    if x == y or y == 1:
        return x
    if x == 1:
        return y
    return x if isinstance(x, int) else y if isinstance(y, int) else None


def _without(shape: Dims | None, axis: int) -> Dims | None:
    return None if shape is None else tuple(d for i, d in enumerate(shape) if i != axis % len(shape))
