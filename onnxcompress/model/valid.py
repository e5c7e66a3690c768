"""onnx's checker for what ONNX Runtime reads: that has operators in the standard's domain which onnx has not."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator

import onnx

from onnxcompress.model import durable

RUNTIME_OWN = frozenset(
    {
        *("Affine", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler", "ParametricSoftplus", "Scale"),
        *("ScaledTanh", "SimplifiedLayerNormalization"),  # the latter in every model of onnxruntime-genai
        *("DisentangledAttention_TRT", "EfficientNMS_TRT", "MultilevelCropAndResize_TRT", "PyramidROIAlign_TRT"),
    }
)
"""Operators that ONNX Runtime 1.32 has in the standard's own domain, beyond those of onnx 1.23."""

OWN_DOMAIN = "onnxruntime"  # one that onnx knows nothing of, so it believes what is in it


def check(model: onnx.ModelProto) -> None:
    """Check a model in memory, without shape inference, which cannot see through every custom domain.

    Operators of `RUNTIME_OWN` are given a domain of their own, in place.

    Raises:
        onnx.checker.ValidationError: it is not valid.
    """
    set_apart(model)
    onnx.checker.check_model(model, full_check=False)


def check_file(path: pathlib.Path, data: bytes) -> None:
    """Check a stored model, with its external data. `data`: what is in the file.

    Raises:
        onnx.checker.ValidationError: it is not valid.
    """
    try:
        onnx.checker.check_model(as_utf8(path) or data)
    except onnx.checker.ValidationError as error:
        if "No Op registered for" not in str(error):
            raise
        model = onnx.load_model_from_string(data)
        if not set_apart(model):
            raise
        changed = model.SerializeToString()
        with durable.temporary(path) as beside:  # external data is looked for beside it
            beside.write_bytes(changed)
            onnx.checker.check_model(as_utf8(beside) or changed)


def as_utf8(path: pathlib.Path) -> str | None:
    """The path as onnx and protobuf take it, whatever the locale; None where its bytes are not UTF-8."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return None


def set_apart(model: onnx.ModelProto) -> bool:
    """Give operators of `RUNTIME_OWN` the domain `OWN_DOMAIN`, in place; whether there were any."""
    found = [node for node in _nodes(model) if not node.domain and node.op_type in RUNTIME_OWN]
    for node in found:
        node.domain = OWN_DOMAIN
    if found:
        for owner in (model, *model.functions):
            owner.opset_import.add(domain=OWN_DOMAIN, version=1)
    return bool(found)


def put_back(model: onnx.ModelProto) -> None:
    """Undo `set_apart`, in place."""
    for node in _nodes(model):
        if node.domain == OWN_DOMAIN:
            node.domain = ""
    for owner in (model, *model.functions):
        kept = [entry for entry in owner.opset_import if entry.domain != OWN_DOMAIN]
        del owner.opset_import[:]
        owner.opset_import.extend(kept)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from _within(model.graph.node)
    for function in model.functions:
        yield from _within(function.node)


def _within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _within(body.node)
