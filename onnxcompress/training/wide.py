"""Half precision computed in single for training: gradients underflow in half, and stock ONNX Runtime lacks kernels.

(ONNX Runtime 1.32 on the CPU has no float16 ScatterND with addition, which is what an embedding's gradient is, and runs
most float16 operators by casting around each.) Weights are stored in half again when training ends.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcompress.autodiff.builder import Builder, graphs_of
from onnxcompress.encodings import recognize

HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_TYPES = ("to", "dtype", "output_dtype")  # attributes that name the type of an output


def widen(model: ir.Model) -> bool:
    """Let everything of `model` that is float16 or bfloat16 be float32, in place; whether there was any.

    Constants, encoded weights and inputs stay half and are cast where they are used; all else becomes float32. So do
    bfloat16 inputs: ONNX Runtime (1.32) takes no such arrays from numpy.
    """
    names = Builder(model.graph, 0)
    found = False
    for graph in _graphs(model.graph):
        sources = list(_sources(graph, graph is model.graph))
        held = {id(value) for value, _ in sources}
        for node in graph:
            found |= _retype(node)
            for output in node.outputs:
                if output.dtype in HALF and id(output) not in held:
                    output.type, found = ir.TensorType(ir.DataType.FLOAT), True  # a clone shares the type itself
        for value in graph.inputs if graph is not model.graph else ():
            if value.dtype in HALF:
                value.type = ir.TensorType(ir.DataType.FLOAT)
        for value, anchor in sources:
            _cast(graph, names, value, anchor)
        found |= bool(sources)
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return found


def _sources(graph: ir.Graph, is_main: bool) -> Iterator[tuple[ir.Value, ir.Node | None]]:
    """What is half in itself, with the node that makes it: inputs of the model, constants, encoded weights."""
    for value in (*(graph.inputs if is_main else ()), *graph.initializers.values()):
        tensor = recognize.constant(value)
        kind = value.dtype if tensor is None else tensor.dtype
        if kind in HALF and not recognize.only_part(value):
            yield value, None
    for node in graph:
        output = node.outputs[0] if node.outputs else None
        tensor = recognize.constant(output)
        if output is None or (tensor is None and recognize.parts(node) is None):
            continue
        kind = tensor.dtype if tensor is not None else ir.DataType.from_numpy(recognize.encoded(node).dtype)
        if kind in HALF and not recognize.only_part(output):
            yield output, node


def _cast(graph: ir.Graph, names: Builder, value: ir.Value, after: ir.Node | None) -> None:
    uses = [use for use in value.uses() if recognize.parts(use.node) is None]
    if not uses:
        return
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], num_outputs=1)
    node.name = names.name(f"{value.name}/wide")
    fresh = node.outputs[0]
    fresh.name, fresh.type, fresh.shape = node.name, ir.TensorType(ir.DataType.FLOAT), value.shape
    for use in uses:
        use.node.replace_input_with(use.idx, fresh)
    if after is not None:
        graph.insert_after(after, node)
    elif len(graph):
        graph.insert_before(graph[0], node)


def _retype(node: ir.Node) -> bool:
    changed = False
    if node.domain or recognize.parts(node) is not None:
        return False
    for name in _TYPES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.as_int() in HALF:
            node.attributes.add(ir.AttrInt64(name, int(ir.DataType.FLOAT)))
            changed = True
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype in HALF:
            node.attributes.add(ir.AttrTensor("value", ir.tensor(tensor.numpy().astype("float32"))))
            changed = True
    return changed


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            for body in graphs_of(attribute):
                yield from _graphs(body)
