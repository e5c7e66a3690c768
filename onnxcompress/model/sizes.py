"""Where a model's bytes are: in its files, and tensor by tensor."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.model import bridge
from onnxcompress.model.check import subgraphs
from onnxcompress.model.limits import DEFAULT
from onnxcompress.model.provenance import PREFIX


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all tensors of `model`; one that several initializers or constants hold counts once."""
    return sum({id(slot.tensor): slot.tensor.nbytes for slot in bridge.slots(model)}.values())


def tensors(model: ir.Model) -> dict[str, int]:
    """Bytes of each initializer and constant, in subgraphs and functions too, by name with the path of its scope."""
    sizes: dict[str, int] = {}
    for slot in bridge.slots(model):
        name, count = slot.name, 2
        while name in sizes:
            name, count = f"{slot.name}#{count}", count + 1
        sizes[name] = slot.tensor.nbytes
    return sizes


def saved_bytes(model: ir.Model) -> int:
    """Bytes that `save` would write inline, to within a few bytes a tensor, without evaluating any tensor.

    Tensors from 1 KiB on are counted by their type and shape, as raw data.
    """
    large = {
        id(slot.tensor): slot.tensor
        for slot in bridge.slots(model)
        if slot.tensor.dtype != ir.DataType.STRING and slot.tensor.nbytes >= DEFAULT.external_threshold
    }
    # The reference costs about 50 bytes more than the field header of the data it stands for.
    references = {key: weightless(tensor) for key, tensor in large.items()}
    held = sum(tensor.nbytes for tensor in _per_use(model, references))
    overhead = sum(_reference_bytes(tensor) for tensor in _per_use(model, references))
    with bridge.swapped(model, references):
        small = {
            id(slot.tensor): bridge.inlined(slot.tensor)
            for slot in bridge.slots(model)
            if isinstance(slot.tensor, ir.ExternalTensor) and slot.tensor.location != _NOWHERE
        }
        with bridge.swapped(model, small):
            graph = int(bridge.to_proto(model, keep_external=True).ByteSize())
    return graph + held - overhead


def marked_bytes(model: ir.Model) -> int:
    """Bytes of this project's own metadata on tensors (a mask its zeros do not show), of which at most 2 KiB count."""
    found = {id(slot.tensor): slot.tensor for slot in bridge.slots(model)}
    entries = [(k, v) for tensor in found.values() for k, v in tensor.metadata_props.items() if k.startswith(PREFIX)]
    # An entry of a message is two strings with a tag and a length each, and a tag and a length around them.
    return min(sum(len(k.encode()) + len(v.encode()) + 8 for k, v in entries), DEFAULT.provenance_bytes)


def model_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a model file and of the external data files it names.

    Raises:
        ModelError: the file cannot be read, or one it names is missing.
    """
    return _sizes(pathlib.Path(path))[0]


def payload_bytes(path: str | os.PathLike[str]) -> int:
    """`model_bytes` less this project's own metadata, of which at most 2 KiB are forgiven."""
    total, provenance = _sizes(pathlib.Path(path))
    return total - min(provenance, DEFAULT.provenance_bytes)


def weightless(tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """A stand-in of the same type and shape without data, for work on the graph alone."""
    return ir.ExternalTensor(
        _NOWHERE, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or ""
    )


_NOWHERE = "weightless"


def _per_use(model: ir.Model, references: dict[int, ir.ExternalTensor]) -> list[ir.TensorProtocol]:
    return [slot.tensor for slot in bridge.slots(model) if id(slot.tensor) in references]


def _reference_bytes(tensor: ir.TensorProtocol) -> int:
    """What a stand-in takes in the message, less the tag and length (6 bytes) of the raw data it stands for."""
    bare = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", _NOWHERE), ("offset", "0"), ("length", str(tensor.nbytes))):
        bare.external_data.add(key=key, value=value)
    return int(bare.ByteSize()) - 6


def _sizes(path: pathlib.Path) -> tuple[int, int]:
    """Bytes in all, and bytes of `onnxcompress.*` metadata."""
    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
        own = path.stat().st_size
        files = {os.path.normpath(path.parent / location) for location in locations(proto)}
        total = own + sum(os.stat(file).st_size for file in files)
    except OSError as error:
        raise ModelError(f"{error.filename or path}: {error.strerror or error}") from error
    except Exception as error:
        raise ModelError(f"{path}: is not an ONNX model, or is cut off") from error
    # One byte of tag and up to two of length before each entry.
    entries = [entry.ByteSize() for entry in proto.metadata_props if entry.key.startswith(PREFIX)]
    return total, sum(size + (2 if size < 128 else 3) for size in entries)


def locations(proto: onnx.ModelProto) -> set[str]:
    """The external data files a message names, subgraphs, constants and functions included."""
    return {
        entry.value
        for tensor in _proto_tensors(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _proto_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes.extend(graph.node)
            continue
        node = nodes.pop()
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        graphs.extend(subgraphs(node))
