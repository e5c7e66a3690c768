"""Broken and hostile files: each refused in one clear line, in time, before anything is allocated."""

from __future__ import annotations

import hashlib
import os
import pathlib
import time
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.model.limits import DEFAULT
from onnxcompress.model.load import load, source_of
from onnxcompress.model.save import to_bytes

W = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)


def proto(
    initializers: Sequence[TensorProto], nodes: Sequence[onnx.NodeProto] | None = None, opset: int = 17
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def dense(name: str = "w", scale: float = 1.0) -> TensorProto:
    return numpy_helper.from_array(W * np.float32(scale), name)


def model(*args: object, **kwargs: object) -> bytes:
    data: bytes = proto(*args, **kwargs).SerializeToString()  # type: ignore[arg-type]
    return data


def external(location: str, offset: object = None, length: object = None, dims: Sequence[int] = (64, 64)) -> bytes:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return model([tensor])


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    inside = tmp_path / "models"
    inside.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(W.tobytes())
    os.symlink(secret, inside / "sym.bin")
    os.link(secret, inside / "hard.bin")
    (inside / "sub").mkdir()
    (inside / "short.bin").write_bytes(b"abc")
    (inside / "full.bin").write_bytes(W.tobytes())
    return inside


def refused(folder: pathlib.Path, data: bytes) -> str:
    """The message a file is refused with; one line, in under 5 seconds, naming the file."""
    path = folder / "m.onnx"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load(path)
    assert time.perf_counter() - start < 5
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(str(path))
    return text


def test_truncated(folder: pathlib.Path) -> None:
    good = model([dense()])
    assert "cut off" in refused(folder, good[: len(good) // 2])


def test_empty(folder: pathlib.Path) -> None:
    assert "empty" in refused(folder, b"")


def test_text(folder: pathlib.Path) -> None:
    assert "is text" in refused(folder, b"hello world, not a model\n" * 50)
    assert "git lfs pull" in refused(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_no_graph(folder: pathlib.Path) -> None:
    assert "no graph" in refused(folder, onnx.ModelProto(ir_version=10, producer_name="x").SerializeToString())


@pytest.mark.parametrize(
    ("location", "offset", "length", "says"),
    [
        ("nowhere.bin", None, None, "missing"),
        ("../secret.bin", None, None, "outside"),
        ("sub/../../secret.bin", None, None, "outside"),
        ("..\\secret.bin", None, None, "outside"),
        ("/etc/passwd", None, None, "outside"),
        ("C:\\secret.bin", None, None, "outside"),
        ("", None, None, "outside"),
        ("sub", None, None, "not a regular file"),
        ("sym.bin", None, None, "symbolic link"),
        ("hard.bin", None, None, "hard link"),
        ("short.bin", None, None, "which has 3"),
        ("full.bin", 0, 16, "names 16"),
        ("full.bin", 1, None, "ends at byte 16,385"),
        ("full.bin", -4, None, "ends at byte"),
        ("full.bin", "many", None, "no number"),
    ],
)
def test_external(folder: pathlib.Path, location: str, offset: object, length: object, says: str) -> None:
    assert says in refused(folder, external(location, offset, length))


def test_external_data_needs_a_path() -> None:
    with pytest.raises(ModelError, match="by its path"):
        load(external("full.bin"))


def test_external_bytes_counted_many_times(folder: pathlib.Path) -> None:
    message = onnx.ModelProto.FromString(external("full.bin"))
    for index in range(64):
        message.graph.initializer.add().CopyFrom(message.graph.initializer[0])
        message.graph.initializer[-1].name = f"w{index}"
    assert "far more bytes" in refused(folder, message.SerializeToString())


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (TensorProto(name="w", data_type=1, dims=[2**20, 2**20], raw_data=b"\0" * 16), "4,398,046,511,104"),
        (TensorProto(name="w", data_type=1, dims=[2**62, 2**62], float_data=[1.0]), "holds 1"),
        (TensorProto(name="w", data_type=1, dims=[-1, 64], raw_data=b"\0" * 16), "negative dimension"),
        (TensorProto(name="w", data_type=1, dims=[64, 64]), "holds 0"),
        (TensorProto(name="w", data_type=99, dims=[1], raw_data=b"\0"), "unknown element type 99"),
        (TensorProto(name="w", data_type=0, dims=[1], raw_data=b"\0"), "unknown element type 0"),
        (TensorProto(name="w", data_type=22, dims=[3], int32_data=[1, 2, 3]), "holds 3"),
        (TensorProto(name="w", data_type=1, dims=[1] * 100, raw_data=b"\0" * 4), "100 dimensions"),
        (TensorProto(name="", data_type=1, dims=[1], raw_data=b"\0" * 4), "no name"),
    ],
    ids=["2^40", "2^124", "negative", "nothing", "type 99", "type 0", "int4 unpacked", "rank", "nameless"],
)
def test_declared_size_is_not_stored_size(folder: pathlib.Path, tensor: TensorProto, says: str) -> None:
    assert says in refused(folder, model([tensor]))


def test_duplicate_initializers(folder: pathlib.Path) -> None:
    assert "two initializers are named w" in refused(folder, model([dense(), dense(scale=2)]))


def test_value_made_twice(folder: pathlib.Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["x"], ["y"])]
    assert "y is made twice" in refused(folder, model([dense()], nodes))


def test_unknown_input(folder: pathlib.Path) -> None:
    assert "reads nowhere" in refused(folder, model([dense()], [helper.make_node("MatMul", ["nowhere", "w"], ["y"])]))


def test_newer_than_onnx(folder: pathlib.Path) -> None:
    assert "opset 99" in refused(folder, model([dense()], opset=99))
    newer = proto([dense()])
    newer.ir_version = 99
    assert "IR version 99" in refused(folder, newer.SerializeToString())


def test_two_versions_of_one_opset(folder: pathlib.Path) -> None:
    twice = proto([dense()])
    twice.opset_import.add(domain="ai.onnx", version=17)  # the same one, by its other name
    assert load(twice).opset_imports == {"": 17}
    twice.opset_import[1].version = 16
    assert "two versions of ai.onnx" in refused(folder, twice.SerializeToString())


def test_cycle(folder: pathlib.Path) -> None:
    node = helper.make_node
    nodes = [node("Add", ["x", "b"], ["a"]), node("MatMul", ["a", "w"], ["b"]), node("Identity", ["b"], ["y"])]
    assert "cycle" in refused(folder, model([dense()], nodes))
    assert "cycle" in refused(folder, model([dense()], [node("Add", ["x", "y"], ["y"], name="self")]))


def test_cycle_through_a_subgraph(folder: pathlib.Path) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["y"], ["t"])], "b", [], [_float("t")])
    condition = numpy_helper.from_array(np.array(True), "c")
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    assert "cycle" in refused(folder, model([condition], [node]))


def test_everything_is_checked_in_subgraphs(folder: pathlib.Path) -> None:
    bad = TensorProto(name="v", data_type=1, dims=[2**20, 2**20], raw_data=b"\0" * 16)
    body = helper.make_graph([helper.make_node("MatMul", ["x", "v"], ["t"])], "b", [], [_float("t")], [bad])
    condition = numpy_helper.from_array(np.array(True), "c")
    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body)
    assert "if/else_branch/v" in refused(folder, model([condition], [node]))
    constant = helper.make_node("Constant", [], ["y"], name="constant", value=bad)
    assert "'constant'" in refused(folder, model([], [constant]))


def test_function_bomb_and_recursion(folder: pathlib.Path) -> None:
    def function(name: str, callee: str, domain: str) -> onnx.FunctionProto:
        nodes = [
            helper.make_node(callee, ["x"], ["t"], domain=domain),
            helper.make_node(callee, ["t"], ["y"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        return helper.make_function("f", name, ["x"], ["y"], nodes, opsets)

    bomb = proto([], [helper.make_node("F60", ["x"], ["y"], domain="f")])
    bomb.opset_import.add(domain="f", version=1)
    bomb.functions.append(function("F0", "Relu", ""))
    bomb.functions.extend(function(f"F{i}", f"F{i - 1}", "f") for i in range(1, 61))
    assert "expand to more than" in refused(folder, bomb.SerializeToString())
    del bomb.functions[:]
    bomb.functions.append(function("F60", "F60", "f"))
    assert "calls itself" in refused(folder, bomb.SerializeToString())


@pytest.mark.parametrize("depth", [DEFAULT.depth + 1, 30, 5000])
def test_nesting_bomb(folder: pathlib.Path, depth: int) -> None:
    graph = b""
    for _ in range(depth):
        graph = _field(1, _field(5, _field(6, graph) + _field(1, b"body")) + _field(4, b"If"))
    assert "deep" in refused(folder, model([dense()]) + _field(7, graph))


@pytest.mark.parametrize("size", [2**31, 5 * 2**30])
def test_file_larger_than_protobuf_reads(folder: pathlib.Path, size: int) -> None:
    path = folder / "large.onnx"
    with open(path, "wb") as file:
        file.truncate(size)  # sparse: takes no space
    with pytest.raises(ModelError, match="export it with external data"):
        load(path)


def test_missing_and_folder(folder: pathlib.Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load(folder / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(folder)


def test_good_models_load_from_every_source(folder: pathlib.Path) -> None:
    data = model([dense()])
    path = folder / "m.onnx"
    path.write_bytes(data)
    message = onnx.ModelProto.FromString(data)
    for source in (path, str(path), data, message):
        loaded = load(source)
        array = loaded.graph.initializers["w"].const_value
        assert array is not None
        np.testing.assert_array_equal(array.numpy(), W)
        found = source_of(loaded)
        assert found is not None
        assert found.sha256 == hashlib.sha256(data).hexdigest()
        assert found.bytes == len(data)
    assert message.SerializeToString() == data
    assert load(loaded) is loaded


def test_external_data_is_mapped_and_hashed_when_asked(folder: pathlib.Path) -> None:
    path = folder / "m.onnx"
    path.write_bytes(external("./full.bin", 0, 16384))
    loaded = load(path)
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), W)
    found = source_of(loaded)
    assert found is not None
    assert found.bytes == path.stat().st_size + 16384
    digests = [hashlib.sha256(p.read_bytes()).digest() for p in (path, folder / "full.bin")]
    assert found.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()
    late = source_of(load(path))
    assert late is not None
    (folder / "full.bin").write_bytes(W.tobytes()[::-1])
    with pytest.raises(ModelError, match="changed after it was loaded"):
        _ = late.sha256


def test_sparse_initializer_is_kept(folder: pathlib.Path) -> None:
    """onnx-ir alone drops it without a word."""
    values = numpy_helper.from_array(np.array([1.5, -2.0], np.float32), "w")
    indices = numpy_helper.from_array(np.array([[0, 1], [63, 62]], np.int64), "i")
    message = proto([])
    message.graph.sparse_initializer.add().CopyFrom(helper.make_sparse_tensor(values, indices, [64, 64]))
    loaded = load(message)
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    array = tensor.numpy()
    assert (float(array[0, 1]), float(array[63, 62]), int(np.count_nonzero(array))) == (1.5, -2.0, 2)
    again = onnx.ModelProto.FromString(to_bytes(loaded))
    assert again.graph.sparse_initializer[0] == message.graph.sparse_initializer[0]
    assert not again.graph.initializer
    message.graph.sparse_initializer[0].indices.raw_data = np.array([[0, 1], [64, 0]], np.int64).tobytes()
    assert "outside" in refused(folder, message.SerializeToString())
    message.graph.sparse_initializer[0].dims[:] = [2**30, 2**30]
    assert "when dense" in refused(folder, message.SerializeToString())


def test_unsorted_graph_is_sorted() -> None:
    nodes = [helper.make_node("Relu", ["a"], ["y"]), helper.make_node("MatMul", ["x", "w"], ["a"])]
    assert [node.op_type for node in load(proto([dense()], nodes)).graph] == ["MatMul", "Relu"]


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, size = bytearray(), len(content)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes(length) + bytes([size]) + content


def _float(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
