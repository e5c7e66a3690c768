"""Bring a model into the form the engine differentiates: one main graph of operators that have rules, with types known.

In order: local functions are inlined; opsets 13 to 16 become 17 (ScatterElements with addition, LayerNormalization);
constants move out of the bodies of If, Loop and Scan, where no weight could be reached; types and shapes are inferred;
and an operator without a rule that is defined by other operators is replaced by its definition, ours (`definitions/`)
or the one in the ONNX standard (Attention, RotaryEmbedding, GroupNormalization, the losses and more).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common

import onnxcompress.autodiff.definitions as _definitions  # noqa: F401  fills the table
from onnxcompress.autodiff.builder import Builder, graphs_of
from onnxcompress.autodiff.definition import DEFINITIONS, Call
from onnxcompress.autodiff.rule import PARTIALS, RULES, ZERO
from onnxcompress.autodiff.tensor import broadcast, product_of
from onnxcompress.errors import ModelError
from onnxcompress.model.shapes import shapes

LEAST_OPSET = 13
EMITTED_OPSET = 17


def prepare(model: ir.Model, outputs: Sequence[str] = (), wrt: Sequence[str] = ()) -> None:
    """Change `model` in place so that it can be differentiated; its outputs stay what they are.

    `outputs`, `wrt`: names that must exist afterwards (values of the main graph).

    Raises:
        ModelError: the opset is below 13, a function cannot be inlined, or a name is no value of the main graph.
    """
    opset = model.opset_imports.get("", 1)
    if opset < LEAST_OPSET:
        raise ModelError(
            f"the model has opset {opset}; gradients need {LEAST_OPSET} or later: convert it first "
            "(onnx.version_converter)"
        )
    inline(model)
    lift(model)
    hoist(model)
    infer(model)
    while expand(model):
        infer(model)
    known = {value.name for value in _values(model.graph)}
    for name in (*outputs, *wrt):
        if name not in known:
            raise ModelError(f"{name!r} is no value of the model's main graph")


def inline(model: ir.Model) -> None:
    """Replace every call of a local function by its body."""
    if not model.functions:
        return
    try:
        ir.passes.common.InlinePass()(model)
    except Exception as error:
        raise ModelError(f"a local function cannot be inlined: {error.__cause__ or error}") from error
    model.graph.sort()


def lift(model: ir.Model) -> None:
    """Declare opset 17 for models of 13 to 16, in which every operator but RoiAlign means the same."""
    if model.opset_imports[""] < EMITTED_OPSET:
        for node in _nodes(model):
            if node.op_type == "RoiAlign" and not node.domain:
                node.attributes.setdefault(
                    "coordinate_transformation_mode",
                    ir.AttrString("coordinate_transformation_mode", "output_half_pixel"),
                )
        model.opset_imports[""] = EMITTED_OPSET
        model.ir_version = max(model.ir_version or 0, 8)


def hoist(model: ir.Model) -> None:
    """Move float constants of bodies to the main graph, where they can be seen and trained.

    Integers stay: shape inference does not look for their values outside a body (onnx 1.23).
    """
    names = Builder(model.graph, 0)
    for body in list(_bodies(model.graph)):
        for value in list(body.initializers.values()):
            if value.is_graph_input() or value.const_value is None or not value.const_value.dtype.is_floating_point():
                continue
            _move(model.graph, names, value, value.const_value)
        for node in list(body):
            tensor = ir.convenience.get_const_tensor(node.outputs[0]) if node.op_type == "Constant" else None
            if tensor is not None and tensor.dtype.is_floating_point():
                _move(model.graph, names, node.outputs[0], tensor)
                if not node.outputs[0].uses():
                    body.remove(node, safe=True)


def _move(graph: ir.Graph, names: Builder, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """A twin of `value` in the main graph takes over its uses; an output of its body stays one through Identity."""
    body = value.graph
    assert isinstance(body, ir.Graph)
    name = str(value.name)
    if value.is_initializer():
        del body.initializers[name]
    taken = name if name not in {v.name for v in _values(graph)} else names.name(name)
    twin = ir.Value(
        name=taken, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
    )
    value.replace_all_uses_with(twin, replace_graph_outputs=False)
    graph.register_initializer(twin)
    for index, output in enumerate(body.outputs):
        if output is value:
            node = ir.Node("", "Identity", [twin], num_outputs=1)
            node.outputs[0].name = names.name(f"{name}/out")
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            body.append(node)
            body.outputs[index] = node.outputs[0]


def infer(model: ir.Model) -> None:
    """Write the inferred type and shape on every value of the main graph and the bodies."""
    found = shapes(model)
    for path, graph in _scoped(model):
        for value in _values(graph):
            info = found.get(f"{path}{value.name}")
            if info is None:
                continue
            if value.dtype is None and info.dtype is not None:
                value.dtype = info.dtype
            if info.dims is not None:
                value.shape = ir.Shape(info.dims)


def expand(model: ir.Model) -> bool:
    """Replace operators without a rule by their definitions, once around; True when there were any."""
    changed = False
    root = Builder(model.graph, model.opset_imports[""])
    for graph in (model.graph, *_bodies(model.graph)):
        for node in list(graph):
            key = (node.domain, node.op_type)
            _carry(root, node)
            if key in DEFINITIONS:
                changed |= _define(root, graph, node)
            elif key not in RULES and key not in ZERO:
                changed |= _standard_definition(model, node)
    if any(function.domain == _DOMAIN for function in model.functions.values()):
        inline(model)
        model.opset_imports.pop(_DOMAIN, None)
    return changed


def _carry(b: Builder, node: ir.Node) -> None:
    """Carry shapes on from what was just defined, so that definitions further on need no other round of inference."""
    (y, *rest), given = node.outputs, [b.wrap(x).shape for x in node.inputs if x is not None]
    if node.domain or rest or y.shape is not None or None in given:
        return
    if node.op_type == "MatMul":
        shape = product_of(*given)
    elif (node.domain, node.op_type) in PARTIALS or node.op_type in ("Cast", "Clip"):
        shape = functools.reduce(broadcast, given)
    else:
        return
    y.shape = None if shape is None else ir.Shape(shape)
    if y.dtype is None and node.op_type != "Cast" and node.inputs[0] is not None:
        y.type = node.inputs[0].type


def _define(root: Builder, graph: ir.Graph, node: ir.Node) -> bool:
    """Put what `definitions` says in the place of `node`."""
    scratch = root.inside(ir.Graph([], [], nodes=[]))
    scratch.scope = node.name or str(node.outputs[0].name)
    results = DEFINITIONS[node.domain, node.op_type](scratch, Call(scratch, node))
    if results is None:
        return False
    nodes = list(scratch.graph)
    scratch.graph.remove(nodes)
    pairs = [(y, r.value) for y, r in zip(node.outputs, results, strict=False) if r is not None and y.name]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [y for y, _ in pairs], [r for _, r in pairs])
    return True


_DOMAIN = "onnxcompress.autodiff"


def _standard_definition(model: ir.Model, node: ir.Node) -> bool:
    """Turn `node` into a call of the function by which the ONNX standard defines it."""
    if node.domain:
        return False
    opset = model.opset_imports[""]
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset, "")  # its stubs lack the functions
    except onnx.defs.SchemaError:
        return False
    proto = onnx.FunctionProto()
    if schema.has_function:
        version = max(v for v in schema.function_opset_versions if v <= opset)
        proto.ParseFromString(schema.get_function_with_opset_version(version))
    elif schema.has_context_dependent_function:
        version = max(v for v in schema.context_dependent_function_opset_versions if v <= opset)
        call, types = ir.serde.serialize_node(node).SerializeToString(), [_type(value) for value in node.inputs]
        proto.ParseFromString(schema.get_context_dependent_function_with_opset_version(version, call, types))
    made = {name for inner in proto.node for name in inner.output} | set(proto.input)
    results = list(proto.output)[: len(node.outputs)]
    if not proto.node or not made.issuperset(results):
        return False
    del proto.output[:]
    proto.output.extend(results)  # an optional output nobody asked for may be declared and never made
    name = f"{node.op_type}_{len(model.functions)}"
    proto.domain, proto.name = _DOMAIN, name
    del proto.opset_import[:]
    proto.opset_import.add(domain="", version=opset)
    function = ir.serde.deserialize_function(proto)
    for attribute in schema.attributes.values():
        if attribute.name not in node.attributes and attribute.default_value.type:
            node.attributes.add(ir.serde.deserialize_attribute(attribute.default_value))
    model.functions[function.identifier()] = function
    model.opset_imports[_DOMAIN] = 1
    node.domain, node.op_type = _DOMAIN, name
    return True


def _type(value: ir.Value | None) -> bytes:
    """The serialized TypeProto of a value; empty where it is left out or unknown."""
    proto = onnx.TypeProto()
    if value is not None and value.type is not None:
        ir.serde.serialize_type_into(proto, value.type)
        if value.shape is not None:
            ir.serde.serialize_shape_into(proto, value.shape)
    serialized: bytes = proto.SerializeToString()
    return serialized


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _bodies(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        for attribute in node.attributes.values():
            for body in graphs_of(attribute):
                yield body
                yield from _bodies(body)


def _scoped(model: ir.Model) -> Iterator[tuple[str, ir.Graph]]:
    from onnxcompress.model.bridge import scopes

    for path, owner in scopes(model):
        if isinstance(owner, ir.Graph):
            yield path, owner


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from (v for v in graph.initializers.values() if not v.is_graph_input())
    for node in graph:
        yield from node.outputs
