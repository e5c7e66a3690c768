"""What an encoding is, and the tape on which it writes its inference form."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import functions
from onnxcompress.model.spill import spill

if TYPE_CHECKING:
    from typing_extensions import Self


class Tape:
    """Records the nodes and constants an encoding needs, in one graph or function body.

    In a graph constants become initializers; a function body has none, so there they become Constant nodes.
    `place` inserts all nodes, in order, before `anchor` (None: at the start).
    `root`: the main graph or the function that `owner` lies in. `taken`: names in use around `owner`, kept up to date;
    a part that would clash gets a number. `work`: a folder where large constants wait as memory maps.
    """

    def __init__(
        self,
        model: ir.Model,
        owner: ir.Graph | ir.Function,
        root: ir.Graph | ir.Function | None = None,
        taken: set[str] | None = None,
        work: pathlib.Path | None = None,
    ) -> None:
        self.model = model
        self.owner = owner
        self.root = root if root is not None else owner
        self.opset = opset_of(model, self.root)
        self._taken = taken if taken is not None else set()
        self._work = work
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []

    def constant(
        self, array: np.ndarray | ir.TensorProtocol, name: str, notes: Mapping[str, str] | None = None
    ) -> ir.Value:
        """A constant with this name. `array` may be a memory map; it is not copied. `notes`: for its metadata."""
        name = self._fresh(name)
        tensor = self.tensor(array, name)
        tensor.metadata_props.update(notes or {})
        if isinstance(self.owner, ir.Function):
            return self._node("Constant", [], name, {"value": tensor}, "")
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        self._initializers.append(value)
        return value

    def tensor(self, array: np.ndarray | ir.TensorProtocol, name: str) -> ir.TensorProtocol:
        """`array` as a tensor called `name`, which is the name a file gives an initializer."""
        if isinstance(array, np.ndarray):
            return ir.tensor(array if self._work is None else spill(array, self._work), name=name)
        if array.name == name:
            return array
        if isinstance(array, ir.ExternalTensor):  # a second reference to the same bytes
            return ir.ExternalTensor(
                array.location,
                array.offset,
                array.length,
                array.dtype,
                shape=ir.Shape(array.shape.numpy()),
                name=name,
                base_dir=array.base_dir,
            )
        return ir.LazyTensor(lambda: array, dtype=array.dtype, shape=ir.Shape(array.shape.numpy()), name=name)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """One node with one output called `name`."""
        return self._node(op_type, inputs, self._fresh(name), attributes, domain)

    def call(self, function: str, inputs: Sequence[ir.Value], name: str) -> ir.Value:
        """A call of one of the local functions in `functions.py`, added to the model when it is not there yet."""
        functions.require(self.model, self.root, function)
        return self.op(function, inputs, name, domain=functions.DOMAIN)

    def place(self, anchor: ir.Node | None = None) -> None:
        """Insert everything recorded into the owner, before `anchor`, or before its first node."""
        if self._initializers and self.model.ir_version < 4:
            # Below IR 4 each would have to be an input of the model too.
            functions.lift_ir_version(self.model)
        for value in self._initializers:
            assert isinstance(self.owner, ir.Graph)
            self.owner.register_initializer(value)
        if anchor is None and len(self.owner):
            anchor = self.owner[0]
        if anchor is None:
            self.owner.extend(self._nodes)
        else:
            self.owner.insert_before(anchor, self._nodes)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None,
        domain: str,
    ) -> ir.Value:
        attrs = ir.convenience.convert_attributes(dict(attributes or {}))
        output = ir.Value(name=name)
        self._nodes.append(ir.Node(domain, op_type, inputs, attributes=attrs, outputs=[output], name=""))
        return output

    def _fresh(self, name: str) -> str:
        """`name`, numbered when it is taken."""
        chosen, number = name, 1
        while chosen in self._taken:
            number += 1
            chosen = f"{name}_{number}"
        self._taken.add(chosen)
        return chosen


def opset_of(model: ir.Model, root: ir.Graph | ir.Function) -> int:
    """The default-domain opset in which nodes of the main graph or of a function are read."""
    imports = root.opset_imports if isinstance(root, ir.Function) else model.opset_imports
    return imports.get("", model.opset_imports.get("", 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """How one weight is stored, how it runs and how it trains.

    `decode()` is bit for bit what ONNX Runtime computes from the emitted form. `parameters()` are the trainable floats,
    `buffers()` what stays fixed in a step; `updated(parameters)` is the encoding after a step, with its structure kept.
    """

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the decoded weight."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the emitted form stores."""
        raise NotImplementedError

    @property
    def least_opset(self) -> int:
        """The lowest default-domain opset in which this encoding can be emitted."""
        return 1

    def decode(self) -> np.ndarray:
        """The weight as a dense array of `shape` and `dtype`."""
        raise NotImplementedError

    def emit(self, tape: Tape, name: str) -> ir.Value:
        """Write the inference form onto `tape`; the returned value is called `name`, its parts `name.<part>`."""
        raise NotImplementedError

    def parameters(self) -> dict[str, np.ndarray]:
        """Trainable floating-point arrays by name."""
        raise NotImplementedError

    def buffers(self) -> dict[str, np.ndarray]:
        """Fixed arrays by name: graph inputs of a training graph, so that schedules need no new session."""
        return {}

    def forward(
        self, tape: Tape, parameters: Mapping[str, ir.Value], buffers: Mapping[str, ir.Value], name: str
    ) -> ir.Value:
        """Write the training form onto `tape`: the weight `name` from values that hold `parameters()` and `buffers()`.

        It computes what `decode` does, in the parameters' type, by operators that a gradient passes.
        """
        raise NotImplementedError

    def updated(self, parameters: Mapping[str, np.ndarray]) -> Self:
        """The encoding with new parameters, projected back onto its structure (zeros stay zero, codes stay fixed)."""
        raise NotImplementedError

    def structure(self) -> tuple[Any, ...]:
        """What else than arrays makes two encodings of one kind differ (axis, block, form)."""
        return ()

    def same(self, other: Encoding) -> bool:
        """True when both are the same encoding with bit-equal content."""
        mine_is = (self.kind, self.shape, self.dtype, self.structure())
        if mine_is != (other.kind, other.shape, other.dtype, other.structure()):
            return False
        mine, theirs = {**self.parameters(), **self.buffers()}, {**other.parameters(), **other.buffers()}
        return mine.keys() == theirs.keys() and all(_equal_bits(mine[k], theirs[k]) for k in mine)


def _equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
