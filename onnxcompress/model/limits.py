"""How large a model may be before it is refused: every bound in one place, checked before anything is allocated."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds that a model file must keep. Sizes in bytes."""

    proto_bytes: int = 2**31 - 1
    """A protobuf message cannot be longer; larger models keep their tensors as external data."""

    inline_bytes: int = 1_900_000_000
    """Above this a saved model gets external data: room below `proto_bytes` for nodes, names and metadata."""

    external_threshold: int = 1024
    """Tensors at least this long go to the data file when external data is written; smaller ones stay in the graph."""

    align_threshold: int = 1 << 20
    """Tensors at least this long start at a multiple of `alignment` in the data file, so that they can be mapped."""

    alignment: int = 4096
    """The page size external data is aligned to."""

    depth: int = 24
    """Nesting of If/Loop/Scan bodies (protobuf itself stops near 30)."""

    nodes: int = 5_000_000
    """Nodes in the file, subgraphs and function bodies included."""

    expanded_nodes: int = 1_000_000
    """Nodes after inlining every local function: a 1.5 kB file can reach 2^100 and hang ONNX Runtime."""

    rank: int = 64
    """Dimensions of one tensor (numpy's own limit)."""

    sparse_dense_bytes: int = 1 << 30
    """A sparse initializer is decoded to at most this many bytes."""

    session_bytes: int = 256 << 20
    """Above this a session reads a model from a temporary file instead of one message: tensors pass one at a time."""

    provenance_bytes: int = 2048
    """All `onnxcompress.*` metadata together, keys, values and protobuf framing."""


DEFAULT = Limits()
