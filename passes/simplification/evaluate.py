"""Computes one node on constants with ONNX Runtime itself, so that folding gives the bits that a run would."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.errors import OnnxCompressError
from onnxcompress.runtime.session import Session, open_session

Kind = tuple[ir.DataType, tuple[int, ...]]

_NUMPY_TYPES = {
    ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT16,
    ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32,
    ir.DataType.UINT64,
}  # fmt: skip
_CACHED = 64


def supported(dtype: ir.DataType) -> bool:
    """True for types that pass through ONNX Runtime's Python interface as numpy arrays."""
    return dtype in _NUMPY_TYPES


def nbytes(kind: Kind) -> int:
    """Bytes of a tensor of this type and shape."""
    return int(math.prod(kind[1]) * kind[0].itemsize)


class Evaluator:
    """Runs and infers single nodes of one opset; sessions of equal nodes are opened once."""

    def __init__(self, ir_version: int) -> None:
        self._ir_version = max(ir_version, 7)
        self._sessions: dict[bytes, Session | None] = {}

    def infer(
        self, node: ir.Node, opset: int, kinds: Sequence[Kind | None], data: Sequence[np.ndarray | None]
    ) -> list[Kind] | None:
        """Type and shape of every output, or None where they do not follow from the inputs and the small `data`."""
        proto = _renamed(node)
        types, tensors = {}, {}
        for name, kind, array in zip(proto.input, kinds, data, strict=True):
            if name and kind is not None:
                types[name] = onnx.helper.make_tensor_type_proto(int(kind[0]), kind[1])
                if array is not None:
                    tensors[name] = onnx.numpy_helper.from_array(array, name)
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, tensors, opset_imports=[onnx.helper.make_opsetid("", opset)]
            )
        except Exception:  # an invalid node, or none that onnx knows: not this pass's to judge
            return None
        out: list[Kind] = []
        for name in proto.output:
            tensor = found[name].tensor_type if name in found and found[name].HasField("tensor_type") else None
            if tensor is None or not tensor.HasField("shape"):
                return None
            if not all(d.HasField("dim_value") for d in tensor.shape.dim):
                return None
            dtype = ir.DataType(tensor.elem_type)
            if not supported(dtype):
                return None
            out.append((dtype, tuple(d.dim_value for d in tensor.shape.dim)))
        return out

    def run(
        self, node: ir.Node, opset: int, inputs: Sequence[np.ndarray | None], kinds: Sequence[Kind]
    ) -> list[np.ndarray] | None:
        """Every output of `node`, or None when ONNX Runtime cannot compute it."""
        proto = _renamed(node)
        feeds = {name: array for name, array in zip(proto.input, inputs, strict=True) if name and array is not None}
        graph = onnx.helper.make_graph(
            [proto],
            "fold",
            [_info(name, ir.DataType.from_numpy(array.dtype), array.ndim) for name, array in feeds.items()],
            [_info(name, kind[0], None) for name, kind in zip(proto.output, kinds, strict=True)],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=self._ir_version
        )
        session = self._session(model.SerializeToString(deterministic=True))
        if session is None:
            return None
        try:
            found = list(session.run(feeds).values())
        except OnnxCompressError:
            return None
        fits = all(
            isinstance(a, np.ndarray) and a.shape == kind[1] and a.dtype == kind[0].numpy()
            for a, kind in zip(found, kinds, strict=True)
        )
        return found if fits else None

    def _session(self, data: bytes) -> Session | None:
        if data not in self._sessions:
            if len(self._sessions) >= _CACHED:
                self.close()
            session = None
            with contextlib.suppress(OnnxCompressError):
                session = open_session(data, optimize=False)
            self._sessions[data] = session
        return self._sessions[data]

    def close(self) -> None:
        """Release all sessions."""
        for session in self._sessions.values():
            if session is not None:
                session.close()
        self._sessions.clear()


def _renamed(node: ir.Node) -> onnx.NodeProto:
    """The node with names that say the position alone, so that equal nodes serialize equally."""
    proto = ir.serde.serialize_node(node)
    for names, letter in ((proto.input, "i"), (proto.output, "o")):
        for index, name in enumerate(names):
            names[index] = f"{letter}{index}" if name else ""
    proto.name = ""
    proto.doc_string = ""
    del proto.metadata_props[:]
    return proto


def _info(name: str, dtype: ir.DataType, rank: int | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, int(dtype), None if rank is None else [None] * rank)
