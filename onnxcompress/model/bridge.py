"""From ModelProto to onnx-ir and back without losing or adding anything.

What onnx-ir 1.1.0 would do otherwise: drop `sparse_initializer` and `training_info`, refuse map types (scikit-learn
exports) and sparse attributes, lose attributes without a type (IR version 1), add one value_info per initializer, and
double a tensor's metadata at every round trip.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.model.check import normalized, subgraphs

TYPE_KEY = "onnxcompress.type"  # metadata of a value: the TypeProto the IR cannot hold, base64
SPARSE_KEY = "onnxcompress.sparse"  # metadata of a tensor: the SparseTensorProto it came from, base64
_TRAINING_KEY = "onnxcompress.training_info"  # model.meta: serialized TrainingInfoProtos

_ATTRIBUTE_FIELDS = {
    "f": "FLOAT",
    "i": "INT",
    "s": "STRING",
    "t": "TENSOR",
    "g": "GRAPH",
    "sparse_tensor": "SPARSE_TENSOR",
    "tp": "TYPE_PROTO",
    "floats": "FLOATS",
    "ints": "INTS",
    "strings": "STRINGS",
    "tensors": "TENSORS",
    "graphs": "GRAPHS",
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One place in a model that holds a tensor: an initializer or a node's attribute."""

    name: str
    tensor: ir.TensorProtocol
    put: Callable[[ir.TensorProtocol], None]
    initializer: bool


def scopes(model: ir.Model) -> Iterator[tuple[str, ir.Graph | ir.Function]]:
    """Every graph and function body with the path that prefixes the names in it: "", "If_0/then/", "domain::F/".

    A subgraph is called by the first output of its node, which has a name whether or not the node has one.
    """
    yield from _scopes("", model.graph)
    for function in model.functions.values():
        yield from _scopes(f"{function.domain}::{function.name}/", function)


def subscopes(path: str, node: ir.Node) -> Iterator[tuple[str, ir.Graph, str]]:
    """The subgraphs of a node in the scope `path`: path of the subgraph, graph, and the attribute's name."""
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        graphs = attribute.value if attribute.type == ir.AttributeType.GRAPHS else [attribute.value]
        inner = f"{path}{node.outputs[0].name or node.name}/{attribute.name.removesuffix('_branch')}/"
        for graph in graphs:
            yield inner, graph, attribute.name


def _scopes(path: str, owner: ir.Graph | ir.Function) -> Iterator[tuple[str, ir.Graph | ir.Function]]:
    yield path, owner
    for node in owner:
        for inner, graph, _ in subscopes(path, node):
            yield from _scopes(inner, graph)


def slots(model: ir.Model) -> Iterator[Slot]:
    """Every tensor of `model`: initializers and attributes of graph, subgraphs and functions, scope by scope.

    A constant is called by its node's output, any other attribute by its node and its own name.
    """
    for path, owner in scopes(model):
        if isinstance(owner, ir.Graph):
            for value in owner.initializers.values():
                if value.const_value is not None:
                    yield Slot(f"{path}{value.name}", value.const_value, _initializer_setter(value), True)
        for node in owner:
            yield from _attribute_slots(path, node)


def _attribute_slots(path: str, node: ir.Node) -> Iterator[Slot]:
    called = node.outputs[0].name if node.outputs else None
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        where = f"{path}{called}" if node.op_type == "Constant" else f"{path}{node.name or called}/{name}"
        if attribute.type == ir.AttributeType.TENSOR:
            yield Slot(where, attribute.value, _attr_setter(node, name), False)
        elif attribute.type == ir.AttributeType.TENSORS:
            for index, tensor in enumerate(attribute.value):
                yield Slot(f"{where}/{index}", tensor, _attr_setter(node, name, index), False)


def clone(model: ir.Model) -> ir.Model:
    """A copy that shares the tensors and keeps `meta`, where the model's source is recorded (onnx-ir drops it)."""
    copy = model.clone()
    for key, value in model.meta.items():
        copy.meta[key] = value
    return copy


def _initializer_setter(value: ir.Value) -> Callable[[ir.TensorProtocol], None]:
    def put(tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor

    return put


def _attr_setter(node: ir.Node, name: str, index: int | None = None) -> Callable[[ir.TensorProtocol], None]:
    def put(tensor: ir.TensorProtocol) -> None:
        old = node.attributes[name]
        if index is None:
            node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=old.doc_string)
            return
        tensors = list(old.value)
        tensors[index] = tensor
        node.attributes[name] = ir.AttrTensors(name, tensors, doc_string=old.doc_string)

    return put


# Into the IR ---------------------------------------------------------------------------------------------------------


def from_proto(proto: onnx.ModelProto, label: str, folder: str | os.PathLike[str] = "") -> ir.Model:
    """Build the IR of a checked `proto`, which is changed and then owned by the result (its tensors stay in place).

    External tensors are memory-mapped from `folder` when they are read.
    """
    training = [info.SerializeToString(deterministic=True) for info in proto.training_info]
    for entry in proto.opset_import:
        entry.domain = normalized(entry.domain)
    for function in proto.functions:
        for entry in function.opset_import:
            entry.domain = normalized(entry.domain)
        for info in function.value_info:
            _stash_type(info)
        for attribute in function.attribute_proto:
            _give_type(attribute)
        _prepare_nodes(function.node, label)
    _prepare_graph(proto.graph, label)
    try:
        model = ir.serde.deserialize_model(proto)
        model.graph.sort()  # stable: a sorted graph stays as it is; ORT runs unsorted graphs, the checker refuses them
        for function in model.functions.values():
            function.sort()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{label}: {root_cause(error)}; export it again") from error
    for slot in slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            slot.tensor.base_dir = os.fspath(folder)
    if training:
        model.meta[_TRAINING_KEY] = training
    return model


def root_cause(error: BaseException) -> str:
    """The first line of the innermost cause of an error: onnx-ir wraps one error per nesting level."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _prepare_graph(graph: onnx.GraphProto, label: str) -> None:
    for info in (*graph.input, *graph.output, *graph.value_info):
        _stash_type(info)
    for sparse in graph.sparse_initializer:
        _densify(sparse, graph.initializer.add(), f"{label}: sparse initializer {sparse.values.name}")
    del graph.sparse_initializer[:]
    _prepare_nodes(graph.node, label)


def _prepare_nodes(nodes: Sequence[onnx.NodeProto], label: str) -> None:
    for node in nodes:
        for attribute in node.attribute:
            _give_type(attribute)
            if attribute.HasField("sparse_tensor"):
                where = f"{label}: attribute {attribute.name} of node {node.name!r} ({node.op_type})"
                if node.op_type != "Constant":
                    raise ModelError(f"{where} is sparse, which is supported in Constant alone; store it dense")
                _densify(attribute.sparse_tensor, attribute.t, where)
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
        for graph in subgraphs(node):
            _prepare_graph(graph, label)


def _give_type(attribute: onnx.AttributeProto) -> None:
    """Files of IR version 1 leave the type out; onnx-ir would lose the value."""
    if attribute.type or attribute.ref_attr_name:
        return
    filled = [descriptor.name for descriptor, _ in attribute.ListFields()]
    for field, kind in _ATTRIBUTE_FIELDS.items():
        if field in filled:
            attribute.type = onnx.AttributeProto.AttributeType.Value(kind)
            return


def _has_map(proto: onnx.TypeProto) -> bool:
    kind = proto.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return _has_map(getattr(proto, kind).elem_type)
    return kind in ("map_type", "opaque_type")


def _stash_type(info: onnx.ValueInfoProto) -> None:
    if _has_map(info.type):
        info.metadata_props.add(
            key=TYPE_KEY, value=base64.b64encode(info.type.SerializeToString(deterministic=True)).decode()
        )
        info.ClearField("type")


def _densify(sparse: onnx.SparseTensorProto, into: onnx.TensorProto, where: str) -> None:
    """Decode COO (linear or by coordinates) into a dense tensor that remembers where it came from."""
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dims = tuple(sparse.dims)
    dense = np.zeros(dims, values.dtype)
    try:
        if indices.size and indices.min() < 0:
            raise IndexError("negative index")
        if indices.ndim == 2:
            dense[tuple(indices.T)] = values
        else:
            dense.reshape(-1)[indices] = values
    except IndexError:
        raise ModelError(f"{where} has an index outside {list(dims)}; export it again") from None
    into.CopyFrom(onnx.numpy_helper.from_array(dense, sparse.values.name))
    into.metadata_props.add(
        key=SPARSE_KEY, value=base64.b64encode(sparse.SerializeToString(deterministic=True)).decode()
    )


# Back to a proto -----------------------------------------------------------------------------------------------------


def to_proto(model: ir.Model, *, keep_external: bool = False) -> onnx.ModelProto:
    """Serialize `model`. External tensors are read into the message, or stay references if `keep_external`."""
    swaps = {}
    if not keep_external:
        swaps = {id(s.tensor): inlined(s.tensor) for s in slots(model) if isinstance(s.tensor, ir.ExternalTensor)}
    with swapped(model, swaps):
        proto = ir.serde.serialize_model(model)
    for entry in model.meta.get(_TRAINING_KEY, ()):
        proto.training_info.add().ParseFromString(entry)
    _restore_graph(proto.graph)
    _drop_empty_domains(proto.opset_import)
    for function in proto.functions:
        _drop_empty_domains(function.opset_import)
        for info in function.value_info:
            _restore_type(info)
        _restore_nodes(function.node)
    return proto


@contextlib.contextmanager
def swapped(model: ir.Model, replacements: dict[int, Any]) -> Iterator[None]:
    """Put `replacements` (by id of the tensor they stand for) into the model for the duration of a `with` block."""
    changed = [slot for slot in slots(model) if id(slot.tensor) in replacements] if replacements else []
    try:
        for slot in changed:
            slot.put(replacements[id(slot.tensor)])
        yield
    finally:
        for slot in changed:
            slot.put(slot.tensor)


def inlined(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    """`tensor` as one whose bytes are read into the message when it is serialized."""
    return ir.LazyTensor(
        lambda: tensor,
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _restore_graph(graph: onnx.GraphProto) -> None:
    sparse_names = []
    for tensor in graph.initializer:
        sparse = _sparse_origin(tensor)
        if sparse is not None:
            graph.sparse_initializer.add().CopyFrom(sparse)
            sparse_names.append(tensor.name)
    if sparse_names:
        kept = [tensor for tensor in graph.initializer if tensor.name not in sparse_names]
        rest = onnx.GraphProto(initializer=kept)
        graph.ClearField("initializer")
        graph.initializer.extend(rest.initializer)
    constants = {tensor.name for tensor in graph.initializer} | set(sparse_names)
    kept_infos = [
        info for info in graph.value_info if info.name not in constants or info.metadata_props or info.doc_string
    ]
    if len(kept_infos) < len(graph.value_info):
        # A tensor says its own type and shape; one more copy each would make every file larger than it was.
        infos = onnx.GraphProto(value_info=kept_infos)
        graph.ClearField("value_info")
        graph.value_info.extend(infos.value_info)
    for info in (*graph.input, *graph.output, *graph.value_info):
        _restore_type(info)
    _restore_nodes(graph.node)


def _drop_empty_domains(imports: Sequence[onnx.OperatorSetIdProto]) -> None:
    """An absent domain is the standard one; onnx-ir writes the empty string, two bytes."""
    for entry in imports:
        if not entry.domain:
            entry.ClearField("domain")


def _restore_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            for tensor in attribute.tensors:
                _once(tensor)
            if not attribute.HasField("t"):
                continue
            sparse = _sparse_origin(attribute.t)
            if sparse is not None and node.op_type == "Constant" and attribute.name == "value":
                attribute.ClearField("t")
                attribute.sparse_tensor.CopyFrom(sparse)
                attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
        for graph in subgraphs(node):
            _restore_graph(graph)


def _restore_type(info: onnx.ValueInfoProto) -> None:
    for index, entry in enumerate(info.metadata_props):
        if entry.key == TYPE_KEY:
            if not info.type.WhichOneof("value"):
                info.type.ParseFromString(base64.b64decode(entry.value))
            del info.metadata_props[index]
            return


def _once(tensor: onnx.TensorProto) -> None:
    """Undo onnx-ir's doubling of a tensor's metadata (it copies the message and then adds the metadata again)."""
    if len(tensor.metadata_props) < 2:
        return
    entries = {entry.key: entry.value for entry in tensor.metadata_props}
    if len(entries) < len(tensor.metadata_props):
        del tensor.metadata_props[:]
        for key in sorted(entries):
            tensor.metadata_props.add(key=key, value=entries[key])


def _sparse_origin(tensor: onnx.TensorProto) -> onnx.SparseTensorProto | None:
    _once(tensor)
    for entry in tensor.metadata_props:
        if entry.key == SPARSE_KEY:
            sparse = onnx.SparseTensorProto()
            sparse.ParseFromString(base64.b64decode(entry.value))
            sparse.values.name = tensor.name
            return sparse
    return None
