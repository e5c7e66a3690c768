"""Refuse a broken or hostile ModelProto before the IR touches it.

onnx and onnx-ir accept duplicate names, dimensions of 2^40, wrong external lengths and function-expansion bombs; the
checker misses the last two. Everything here works on the parsed message and on `stat` alone: nothing is allocated for
what a file merely declares.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.model.limits import DEFAULT, Limits

_DATA_TYPES = {value for value in onnx.TensorProto.DataType.values() if value}
_SCHEMA_VERSIONS: dict[str, tuple[int, int]] = dict(onnx.defs.C.schema_version_map())
_OVERLAP = 16  # external tensors may share bytes (tied weights), but not multiply a small file without bound

FunctionId = tuple[str, str, str]


@dataclasses.dataclass
class External:
    """External data files a model names: resolved path by location, and the bytes all tensors together declare."""

    files: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    declared: int = 0


def check(proto: onnx.ModelProto, label: str, folder: pathlib.Path | None, limits: Limits = DEFAULT) -> External:
    """Raise ModelError for the first thing wrong with `proto`; return the external data it refers to.

    `label` names the model in messages; `folder` is where its external data must lie (None: it may have none).
    """
    return _Checker(label, folder, limits).model(proto)


def normalized(domain: str) -> str:
    """The standard operator domain has two spellings."""
    return "" if domain == "ai.onnx" else domain


class _Checker:
    def __init__(self, label: str, folder: pathlib.Path | None, limits: Limits) -> None:
        self.label = label
        self.folder = folder
        self.limits = limits
        self.external = External()
        self.nodes = 0

    def refuse(self, what: str) -> ModelError:
        return ModelError(f"{self.label}: {what}")

    def model(self, proto: onnx.ModelProto) -> External:
        if not proto.HasField("graph") or not proto.ir_version:
            raise self.refuse("not an ONNX model, or cut off (no graph or no IR version in it); export it again")
        if proto.ir_version > onnx.IR_VERSION:
            raise self.refuse(f"IR version {proto.ir_version} is newer than the installed onnx knows; update onnx")
        if not (len(proto.graph.node) or len(proto.graph.output)):
            raise self.refuse("its graph is empty; export it again")
        self._opsets(proto.opset_import, "the model")
        if not proto.opset_import and proto.ir_version >= 3:
            raise self.refuse("imports no operator set; export it again")
        functions: dict[FunctionId, onnx.FunctionProto] = {}
        for function in proto.functions:
            key = (normalized(function.domain), function.name, function.overload)
            if key in functions:
                raise self.refuse(f"function {function.domain}::{function.name} is defined twice")
            functions[key] = function
            self._opsets(function.opset_import, f"function {function.domain}::{function.name}")
        # The bomb first: it makes every later step slow for whoever expands functions.
        self._expansion(proto.graph, functions)
        self._graph(proto.graph, set(), "", 0)
        for key, function in functions.items():
            self._function(function, "::".join(key[:2]))
        if self.external.declared > _OVERLAP * sum(self.external.sizes.values()) + _OVERLAP:
            raise self.refuse("its tensors declare far more bytes than its external data files hold; export it again")
        return self.external

    def _opsets(self, imports: Sequence[onnx.OperatorSetIdProto], where: str) -> None:
        seen: dict[str, int] = {}
        for entry in imports:
            if seen.setdefault(normalized(entry.domain), entry.version) != entry.version:
                domain = normalized(entry.domain) or "ai.onnx"
                raise self.refuse(f"{where} imports two versions of {domain}; export it again")
            known = _SCHEMA_VERSIONS.get(normalized(entry.domain))
            if entry.version < 1 or (known is not None and entry.version > known[1]):
                newest = (
                    f"the installed onnx {onnx.__version__} knows up to {known[1]}" if known else "must be 1 or more"
                )
                domain = normalized(entry.domain) or "ai.onnx"
                raise self.refuse(
                    f"{where} asks for opset {entry.version} of {domain}; {newest}: update onnx or export again"
                )

    # Functions -----------------------------------------------------------------------------------------------------

    def _expansion(self, graph: onnx.GraphProto, functions: dict[FunctionId, onnx.FunctionProto]) -> None:
        """Count the nodes that inlining every function would give, without inlining: memoized over the call graph."""
        own: dict[FunctionId | None, int] = {}
        calls: dict[FunctionId | None, collections.Counter[FunctionId]] = {}
        bodies: dict[FunctionId | None, Sequence[onnx.NodeProto]] = {None: graph.node}
        bodies.update({key: function.node for key, function in functions.items()})
        for key, nodes in bodies.items():
            own[key], calls[key] = 0, collections.Counter()
            for node in self._all_nodes(nodes, 0):
                callee = (normalized(node.domain), node.op_type, node.overload)
                if callee in functions:
                    calls[key][callee] += 1
                else:
                    own[key] += 1
        total: dict[FunctionId | None, int] = {}
        waiting = {key: len(callees) for key, callees in calls.items()}
        callers: dict[FunctionId, list[FunctionId | None]] = collections.defaultdict(list)
        for caller, callees in calls.items():
            for name in callees:
                callers[name].append(caller)
        ready = [key for key, count in waiting.items() if not count]
        while ready:
            key = ready.pop()
            total[key] = own[key] + sum(count * total[callee] for callee, count in calls[key].items())
            # Saturate: 2^(number of functions) would otherwise be a number of megabytes.
            total[key] = min(total[key], self.limits.expanded_nodes + 1)
            for caller in callers[key] if key is not None else ():
                waiting[caller] -= 1
                if not waiting[caller]:
                    ready.append(caller)
        stuck = [key for key in bodies if key not in total and key is not None]
        if stuck:
            raise self.refuse(f"function {'::'.join(stuck[0][:2])} calls itself, which ONNX forbids; export it again")
        if total[None] > self.limits.expanded_nodes:
            raise self.refuse(
                f"its functions expand to more than {self.limits.expanded_nodes:,} nodes; inline or export again"
            )

    def _all_nodes(self, nodes: Sequence[onnx.NodeProto], depth: int) -> Iterator[onnx.NodeProto]:
        if depth > self.limits.depth:
            raise self.refuse(f"subgraphs nest deeper than {self.limits.depth}; export it again")
        self.nodes += len(nodes)
        if self.nodes > self.limits.nodes:
            raise self.refuse(f"has more than {self.limits.nodes:,} nodes")
        for node in nodes:
            yield node
            for graph in subgraphs(node):
                yield from self._all_nodes(graph.node, depth + 1)

    def _function(self, function: onnx.FunctionProto, name: str) -> None:
        where = f"function {name}"
        for attribute in function.attribute_proto:
            self._attribute(attribute, where)
        defined = list(function.input)
        self._body(function.node, defined, set(), where, 0)
        produced = {*defined, *(output for node in function.node for output in node.output)}
        for output in function.output:
            if output not in produced:
                raise self.refuse(f"{where}: no node makes its output {output!r}")

    # Graphs --------------------------------------------------------------------------------------------------------

    def _graph(self, graph: onnx.GraphProto, outer: set[str], path: str, depth: int) -> set[str]:
        """Check one graph; return the names it takes from outside."""
        inputs = [info.name for info in graph.input]
        for info in (*graph.input, *graph.output, *graph.value_info):
            self._type(info.type, f"value {path}{info.name}")
        constants = [tensor.name for tensor in graph.initializer]
        for tensor in graph.initializer:
            if not tensor.name:
                raise self.refuse(f"an initializer of {path or 'the graph'} has no name; export it again")
            self._tensor(tensor, f"initializer {path}{tensor.name}")
        for sparse in graph.sparse_initializer:
            constants.append(sparse.values.name)
            self._sparse(sparse, f"sparse initializer {path}{sparse.values.name}")
        for kind, names in (("inputs", inputs), ("initializers", constants)):
            twice = [name for name, count in collections.Counter(names).items() if count > 1]
            if twice:
                raise self.refuse(f"two {kind} are named {path}{twice[0]}; export it again")
        # An initializer may share its name with a graph input: its default value.
        defined = [*inputs, *(name for name in constants if name not in set(inputs))]
        free = self._body(graph.node, defined, outer, path, depth)
        produced = {*defined, *(output for node in graph.node for output in node.output)}
        for info in graph.output:
            if info.name not in produced:
                raise self.refuse(f"nothing makes the output {path}{info.name}; export it again")
        return free

    def _body(
        self, nodes: Sequence[onnx.NodeProto], defined: list[str], outer: set[str], path: str, depth: int
    ) -> set[str]:
        producer: dict[str, int] = dict.fromkeys(defined, -1)
        for index, node in enumerate(nodes):
            for output in node.output:
                if output and output in producer:
                    raise self.refuse(
                        f"value {path}{output} is made twice, by {_called(node, index)} too; export it again"
                    )
                producer[output] = index
        producer.pop("", None)
        visible = outer | producer.keys()
        needs: list[set[int]] = []
        free: set[str] = set()
        for index, node in enumerate(nodes):
            used = {name for name in node.input if name}
            for attribute in node.attribute:
                self._attribute(attribute, f"{_called(node, index)} of {path or 'the graph'}")
                for graph in (attribute.g, *attribute.graphs) if _is_graph(attribute) else ():
                    used |= self._graph(
                        graph, visible, f"{path}{node.name or node.op_type}/{attribute.name}/", depth + 1
                    )
            for name in used:
                if name not in visible:
                    raise self.refuse(
                        f"{_called(node, index)} reads {path}{name}, which nothing makes; export it again"
                    )
            free |= used - producer.keys()
            needs.append({producer[name] for name in used if producer.get(name, -1) >= 0})
        if any(max(before, default=-1) >= index for index, before in enumerate(needs)):
            self._acyclic(nodes, needs, path)
        return free

    def _acyclic(self, nodes: Sequence[onnx.NodeProto], needs: list[set[int]], path: str) -> None:
        waiting = [len(before) for before in needs]
        after: list[list[int]] = [[] for _ in needs]
        for index, before in enumerate(needs):
            for earlier in before:
                after[earlier].append(index)
        ready = [index for index, count in enumerate(waiting) if not count]
        done = 0
        while ready:
            done += 1
            for index in after[ready.pop()]:
                waiting[index] -= 1
                if not waiting[index]:
                    ready.append(index)
        if done < len(nodes):
            index = next(i for i, count in enumerate(waiting) if count)
            raise self.refuse(
                f"{_called(nodes[index], index)} of {path or 'the graph'} lies on a cycle; export it again"
            )

    # Values, attributes, tensors -----------------------------------------------------------------------------------

    def _attribute(self, attribute: onnx.AttributeProto, where: str) -> None:
        if attribute.type not in onnx.AttributeProto.AttributeType.values():
            raise self.refuse(f"attribute {attribute.name} of {where} has the unknown type {attribute.type}")
        if attribute.HasField("t"):
            self._tensor(attribute.t, f"attribute {attribute.name} of {where}")
        for tensor in attribute.tensors:
            self._tensor(tensor, f"attribute {attribute.name} of {where}")
        if attribute.HasField("sparse_tensor"):
            self._sparse(attribute.sparse_tensor, f"attribute {attribute.name} of {where}")

    def _type(self, proto: onnx.TypeProto, where: str) -> None:
        kind = proto.WhichOneof("value")
        if kind in ("tensor_type", "sparse_tensor_type"):
            code = getattr(proto, kind).elem_type
            if code and code not in _DATA_TYPES:
                raise self.refuse(f"{where} has the unknown element type {code}; update onnx or export again")
        elif kind in ("sequence_type", "optional_type"):
            self._type(getattr(proto, kind).elem_type, where)
        elif kind == "map_type":
            self._type(proto.map_type.value_type, where)

    def _tensor(self, tensor: onnx.TensorProto, where: str) -> None:
        if tensor.data_type not in _DATA_TYPES:
            raise self.refuse(f"{where} has the unknown element type {tensor.data_type}; update onnx or export again")
        count = self._elements(tensor.dims, where)
        if tensor.HasField("segment"):
            raise self.refuse(f"{where} is stored in segments, which no runtime reads; export it again")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            self._external(tensor, count, where)
            return
        stored, declared, unit = _stored(tensor, count)
        if stored != declared:
            dims = "x".join(map(str, tensor.dims)) or "scalar"
            raise self.refuse(
                f"{where} declares {dims}, that is {declared:,} {unit}, but holds {stored:,}; export it again"
            )

    def _elements(self, dims: Sequence[int], where: str) -> int:
        if len(dims) > self.limits.rank:
            raise self.refuse(f"{where} has {len(dims)} dimensions; at most {self.limits.rank}")
        if any(size < 0 for size in dims):
            raise self.refuse(f"{where} has a negative dimension in {list(dims)}; export it again")
        return math.prod(dims)

    def _sparse(self, sparse: onnx.SparseTensorProto, where: str) -> None:
        if not sparse.values.name and where.startswith("sparse"):
            raise self.refuse("a sparse initializer has no name; export it again")
        self._tensor(sparse.values, f"values of {where}")
        self._tensor(sparse.indices, f"indices of {where}")
        count = self._elements(sparse.dims, where)
        stored = math.prod(sparse.values.dims)
        linear, coordinates = [stored], [stored, len(sparse.dims)]
        if sparse.indices.data_type != onnx.TensorProto.INT64 or list(sparse.indices.dims) not in (linear, coordinates):
            raise self.refuse(f"{where} has indices that do not fit its {stored} values; export it again")
        if (
            sparse.values.data_type == onnx.TensorProto.STRING
            or sparse.values.data_location
            or sparse.indices.data_location
        ):
            raise self.refuse(f"{where} holds strings or external data; store it dense")
        if byte_count(sparse.values.data_type, count) > self.limits.sparse_dense_bytes:
            raise self.refuse(f"{where} would be larger than {self.limits.sparse_dense_bytes:,} bytes when dense")

    def _external(self, tensor: onnx.TensorProto, count: int, where: str) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if self.folder is None:
            raise self.refuse(f"{where} lies in the external file {location!r}: load the model by its path")
        if tensor.data_type == onnx.TensorProto.STRING:
            raise self.refuse(f"{where} holds strings, which cannot be external; export it again")
        if location not in self.external.files:
            self._locate(location, where)
        needed = byte_count(tensor.data_type, count)
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", str(needed)))
        except ValueError:
            raise self.refuse(f"{where} has an offset or length that is no number; export it again") from None
        if length != needed:
            raise self.refuse(f"{where} needs {needed:,} bytes but names {length:,} in {location!r}; export it again")
        size = self.external.sizes[location]
        if offset < 0 or offset + length > size:
            raise self.refuse(
                f"{where} ends at byte {offset + length:,} of {location!r}, which has {size:,}: copy the file again"
            )
        self.external.declared += length

    def _locate(self, location: str, where: str) -> None:
        assert self.folder is not None
        parts = pathlib.PurePosixPath(location.replace("\\", "/"))
        outside = not location or "\0" in location or parts.is_absolute() or ".." in parts.parts
        if outside or pathlib.PureWindowsPath(location).drive:
            raise self.refuse(f"{where} names the external file {location!r} outside the model's folder: refused")
        path = self.folder / location
        # No link on the way, of either kind: through one, a model could read any file of its user into its output.
        walked = self.folder
        for part in parts.parts:
            walked = walked / part
            if walked.is_symlink():
                raise self.refuse(f"{where}: external file {location!r} is a symbolic link: put a copy in its place")
        try:
            found = os.stat(path)
        except OSError:
            raise self.refuse(
                f"{where}: external file {location!r} is missing from {self.folder}: copy it there"
            ) from None
        if not stat.S_ISREG(found.st_mode):
            raise self.refuse(f"{where}: external file {location!r} is not a regular file")
        if found.st_nlink > 1:
            raise self.refuse(f"{where}: external file {location!r} is a hard link: put a copy in its place")
        self.external.files[location] = path
        self.external.sizes[location] = found.st_size


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if _is_graph(attribute):
            yield from (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs


def byte_count(data_type: int, count: int) -> int:
    """Bytes of `count` packed elements of an ONNX element type (strings: 0)."""
    if data_type == onnx.TensorProto.STRING:
        return 0
    return -(-count * ir.DataType(data_type).bitwidth // 8)


def _is_graph(attribute: onnx.AttributeProto) -> bool:
    return attribute.HasField("g") or len(attribute.graphs) > 0


def _called(node: onnx.NodeProto, index: int) -> str:
    return f"node {node.name!r} ({node.op_type})" if node.name else f"node number {index} ({node.op_type})"


def _stored(tensor: onnx.TensorProto, count: int) -> tuple[int, int, str]:
    """What the message holds and what its dimensions need, in bytes (raw) or entries of its typed field."""
    code = tensor.data_type
    needed = byte_count(code, count)
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data), needed, "bytes"
    t = onnx.TensorProto
    if code == t.STRING:
        return len(tensor.string_data), count, "strings"
    if code in (t.FLOAT, t.COMPLEX64):
        return len(tensor.float_data), count * (2 if code == t.COMPLEX64 else 1), "values"
    if code in (t.DOUBLE, t.COMPLEX128):
        return len(tensor.double_data), count * (2 if code == t.COMPLEX128 else 1), "values"
    if code == t.INT64:
        return len(tensor.int64_data), count, "values"
    if code in (t.UINT64, t.UINT32):
        return len(tensor.uint64_data), count, "values"
    # Types of 2 and 4 bits are packed by bytes even in int32_data; 6-bit values are not.
    packed = ir.DataType(code).bitwidth in (2, 4)
    return len(tensor.int32_data), needed if packed else count, "values"
