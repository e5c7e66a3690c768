"""Saving: whole or not at all, the same bytes, nothing lost, nothing added."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import SaveError
from onnxcompress.model import bridge, durable
from onnxcompress.model.limits import Limits
from onnxcompress.model.load import load, source_of
from onnxcompress.model.save import save, to_bytes
from onnxcompress.runtime.session import open_session

RNG = np.random.default_rng(0)
W = RNG.normal(size=(64, 64)).astype(np.float32)
X = {"x": RNG.normal(size=(1, 64)).astype(np.float32)}


def message(scale: float = 1.0) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
        [
            numpy_helper.from_array(W * np.float32(scale), "w"),
            helper.make_tensor("b", TensorProto.FLOAT, [64], W[0].tolist()),
        ],
    )
    return helper.make_model(graph, opset_imports=[onnx.OperatorSetIdProto(version=17)], ir_version=8)


def run(path: pathlib.Path) -> np.ndarray[Any, Any]:
    with open_session(path) as session:
        result: np.ndarray[Any, Any] = session.run(X)["y"]
        return result


def doubled(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy() * np.float32(2))

    return ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape([64, 64]))


def files(folder: pathlib.Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_round_trip_is_byte_equal(tmp_path: pathlib.Path) -> None:
    data = message().SerializeToString(deterministic=True)
    out = tmp_path / "out.onnx"
    saved = save(load(data), out)
    # The typed float_data of `b`, which onnx-ir can hold, stays as it is.
    assert onnx.load(out) == message()
    assert (saved.path, saved.bytes, saved.files) == (out, out.stat().st_size, (out,))
    assert saved.bytes <= len(data)
    assert files(tmp_path) == {"out.onnx"}
    assert out.read_bytes() == to_bytes(load(data))


def test_external_and_back(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.onnx"
    first = save(load(message()), out, external=True)
    data = first.files[1]
    assert first.bytes == out.stat().st_size + data.stat().st_size
    assert data.stat().st_size == W.nbytes  # the bias is below the threshold and stays in the graph
    assert data.name.startswith("out.onnx.")
    again = load(out)
    source = source_of(again)
    assert source is not None
    assert source.external
    # None keeps the form the model was loaded in; saved over itself it is the same file.
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    save(again, out)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    inline = save(again, tmp_path / "inline.onnx", external=False)
    assert len(inline.files) == 1
    plain = tmp_path / "plain.onnx"
    plain.write_bytes(message().SerializeToString())
    expected = run(plain)
    np.testing.assert_array_equal(run(out), expected)
    np.testing.assert_array_equal(run(inline.path), expected)


def test_external_is_chosen_where_it_must_be(tmp_path: pathlib.Path) -> None:
    small = Limits(inline_bytes=10_000)
    assert len(save(load(message()), tmp_path / "a.onnx", limits=small).files) == 2
    with pytest.raises(SaveError, match="external data"):
        save(load(message()), tmp_path / "b.onnx", external=False, limits=small)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W))
    proto = message()
    del proto.graph.initializer[0]
    proto.graph.node.insert(0, constant)
    saved = save(load(proto), tmp_path / "c.onnx", limits=small)
    assert saved.files[1].stat().st_size == W.nbytes
    np.testing.assert_array_equal(run(saved.path), run(tmp_path / "a.onnx"))


def test_large_tensors_start_on_a_page(tmp_path: pathlib.Path) -> None:
    model = load(message())
    out = tmp_path / "out.onnx"
    model.graph.initializers["b"].const_value = ir.tensor(np.zeros(300, np.float32), name="b")
    large = ir.tensor(np.ones((1 << 18) + 1, np.float32), name="large")
    model.graph.register_initializer(ir.Value(name="large", const_value=large))
    save(model, out, external=True, check=False)
    places = {}
    for tensor in onnx.load(out, load_external_data=False).graph.initializer:
        places[tensor.name] = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
    assert places == {"w": 0, "b": 16384, "large": 20480}


def test_compress_in_place(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "m.onnx"
    for external in (False, True, True, False):
        save(load(message()), out, external=external)
        model = load(out)
        value = model.graph.initializers["w"]
        tensor = value.const_value
        assert tensor is not None
        value.const_value = doubled(tensor)
        saved = save(model, out)
        expected = tmp_path / "expected.onnx"
        expected.write_bytes(message(2.0).SerializeToString())
        np.testing.assert_array_equal(run(out), run(expected))
        expected.unlink()
        # The data of the model that was replaced is gone, and nothing else is left.
        assert files(tmp_path) == {path.name for path in saved.files}


def test_unchanged_tensors_follow_data_that_goes(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "m.onnx"
    save(load(message()), out, external=True)
    for external in (True, False):
        model = load(out)
        # Another tensor moves to the data file: new content, new name, and the old file goes.
        model.graph.initializers["b"].const_value = ir.tensor(np.zeros((300,), np.float32))
        save(model, out, external=external, check=False)
        tensor = model.graph.initializers["w"].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), W)
        assert tensor.tobytes() == W.tobytes()


def test_data_of_a_copy_beside_it_stays(tmp_path: pathlib.Path) -> None:
    out, copy = tmp_path / "m.onnx", tmp_path / "copy.onnx"
    data = save(load(message()), out, external=True).files[1]
    copy.write_bytes(out.read_bytes())
    save(load(message(2.0)), out, external=True)
    assert data.exists()
    assert np.isfinite(run(copy)).all()


def test_same_bytes_in_every_process(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(message().SerializeToString())
    code = (
        "import sys; from onnxcompress.model.load import load; from onnxcompress.model.save import save;"
        "m = load(sys.argv[1]); m.metadata_props.update({k: k for k in set('abcdef')});"
        "save(m, sys.argv[2], external=True)"
    )
    seen = set()
    for seed in ("0", "1"):
        out = tmp_path / seed / "out.onnx"
        out.parent.mkdir()
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, source, out], check=True, env=env)
        seen.add(tuple((path.name, path.read_bytes()) for path in sorted(out.parent.iterdir())))
    assert len(seen) == 1


def test_full_disk_leaves_the_target(tmp_path: pathlib.Path) -> None:
    """A file size limit stands for the full disk: writing fails in the middle, with an OSError."""
    out = tmp_path / "m.onnx"
    save(load(message()), out)
    before = out.read_bytes()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from onnxcompress.model.load import load; from onnxcompress.model.save import save;"
        "from onnxcompress.errors import SaveError; m = load(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "for external in (False, True):\n"
        "    try: save(m, sys.argv[1], external=external)\n"
        "    except SaveError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, check=True)
    assert done.stdout.count("untouched") == 2
    assert out.read_bytes() == before
    assert files(tmp_path) == {"m.onnx"}


@pytest.mark.parametrize("stage", range(12))
def test_killed_at_any_moment(tmp_path: pathlib.Path, stage: int) -> None:
    """Kill before each system call that changes the folder: the old model whole, or the new one whole."""
    out = tmp_path / "m.onnx"
    save(load(message()), out, external=True)
    old = run(out)
    source = tmp_path / "in"
    source.mkdir()
    (source / "new.onnx").write_bytes(message(2.0).SerializeToString())
    new = run(source / "new.onnx")
    code = (
        "import os, signal, sys, pathlib\n"
        "from onnxcompress.model.load import load; from onnxcompress.model.save import save\n"
        "m = load(sys.argv[1]); left = [int(sys.argv[3])]\n"
        "def counted(call):\n"
        "    def wrapped(*a, **k):\n"
        "        left[0] -= 1\n"
        "        if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(*a, **k)\n"
        "    return wrapped\n"
        "for name in ('fsync', 'replace', 'close', 'unlink'): setattr(os, name, counted(getattr(os, name)))\n"
        "save(m, sys.argv[2], external=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, source / "new.onnx", out, str(stage)], check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    got = run(out)
    load(out)
    assert np.array_equal(got, new) if done.returncode == 0 else np.array_equal(got, old) or np.array_equal(got, new)
    # What a kill leaves behind is never taken for a model.
    assert all(name == "m.onnx" or not name.endswith(".onnx") for name in files(tmp_path) - {"in"})


def test_data_that_does_not_read_back(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.onnx"
    save(load(message()), out)
    before = out.read_bytes()
    monkeypatch.setattr(durable, "file_digest", lambda path: "0" * 64)
    for external in (False, True):
        with pytest.raises(SaveError, match="read back"):
            save(load(message(2.0)), out, external=external)
    assert out.read_bytes() == before
    assert files(tmp_path) == {"m.onnx"}


def test_invalid_model_is_not_written(tmp_path: pathlib.Path) -> None:
    model = load(message())
    model.graph.append(ir.Node("", "NoSuchOperator", [model.graph.inputs[0]], name="n"))
    model.graph[-1].outputs[0].name = "z"
    out = tmp_path / "m.onnx"
    with pytest.raises(SaveError, match="NoSuchOperator"):
        save(model, out)
    assert not files(tmp_path)
    save(model, out, check=False)
    assert out.exists()


def test_bad_targets(tmp_path: pathlib.Path) -> None:
    model = load(message())
    with pytest.raises(SaveError, match="is a folder"):
        save(model, tmp_path)
    with pytest.raises(SaveError, match="does not exist"):
        save(model, tmp_path / "none" / "m.onnx")


def test_its_own_data_is_not_written_over(tmp_path: pathlib.Path) -> None:
    saved = save(load(message()), tmp_path / "m.onnx", external=True)
    data, link = saved.files[1], tmp_path / "link.onnx"
    link.symlink_to(data)
    model, before = load(saved.path), data.read_bytes()
    for name in (data, link):
        with pytest.raises(SaveError, match=r"holds the external data of .*m\.onnx; name another file"):
            save(model, name)
    assert data.read_bytes() == before
    assert link.is_symlink()


def test_a_link_to_what_a_process_has_open_is_never_replaced(tmp_path: pathlib.Path) -> None:
    link = tmp_path / "stdout"  # as /dev/stdout is one
    with open(tmp_path / "file", "wb") as file:
        link.symlink_to(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises(SaveError, match="is not a regular file"):
            save(load(message()), link)
    assert link.is_symlink()


def test_a_name_that_is_not_ascii_in_the_c_locale(tmp_path: pathlib.Path) -> None:
    save(load(message()), tmp_path / "m.onnx")
    code = "import sys, onnxcompress as oc; oc.save(oc.load('m.onnx'), sys.argv[1])"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, "模型.onnx"], cwd=tmp_path, env={**os.environ, **plain}, check=True)
    assert (tmp_path / "模型.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_permissions_stay(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "m.onnx"
    save(load(message()), out)
    plain = tmp_path / "plain"
    plain.touch()
    assert out.stat().st_mode == plain.stat().st_mode
    out.chmod(0o640)
    save(load(message()), out)
    assert out.stat().st_mode & 0o777 == 0o640


def _sequence_of_maps() -> onnx.ModelProto:
    proto = message()
    proto.opset_import.add(domain="ai.onnx.ml", version=3)
    node = helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=list(range(64)))
    proto.graph.node.append(node)
    value = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    proto.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(value)))
    return proto


def _annotated() -> onnx.ModelProto:
    proto = message()
    annotation = proto.graph.quantization_annotation.add(tensor_name="t")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    proto.training_info.add().initialization.name = "init"
    for key in ("one", "two"):
        proto.graph.initializer[0].metadata_props.add(key=key, value="1")
        proto.graph.node[0].metadata_props.add(key=key, value="2")
    proto.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 64]))
    return proto


def _inputs_as_initializers() -> onnx.ModelProto:
    proto = message()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 64]))
    proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [64]))
    return proto


def _sparse_constant() -> onnx.ModelProto:
    proto = message()
    del proto.graph.initializer[1]
    values = numpy_helper.from_array(np.array([2.0], np.float32), "b")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([3], np.int64), "i"), [64])
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["b"], sparse_value=sparse))
    return proto


def _function() -> onnx.ModelProto:
    proto = message()
    nodes = [helper.make_node("Relu", ["a"], ["c"])]
    proto.functions.append(helper.make_function("f", "F", ["a"], ["c"], nodes, [onnx.OperatorSetIdProto(version=17)]))
    proto.opset_import.add(domain="f", version=1)
    proto.graph.node[1].output[0] = "u"
    proto.graph.node.append(helper.make_node("F", ["u"], ["y"], domain="f"))
    return proto


@pytest.mark.parametrize("make", [_sequence_of_maps, _annotated, _inputs_as_initializers, _sparse_constant, _function])
def test_nothing_is_lost(make: Callable[[], onnx.ModelProto]) -> None:
    """Twice, for what doubles at every round trip."""
    proto = make()
    once = onnx.ModelProto.FromString(to_bytes(load(proto)))
    twice = onnx.ModelProto.FromString(to_bytes(load(once)))
    assert once == proto
    assert twice == proto


def test_attributes_without_a_type_keep_their_value() -> None:
    proto = message()
    proto.graph.node.append(helper.make_node("Cast", ["y"], ["z"], to=1))
    proto.graph.node[-1].attribute[0].ClearField("type")
    model = load(proto)
    assert model.graph[-1].attributes["to"].as_int() == 1


def test_clone_shares_tensors_and_keeps_the_source() -> None:
    model = load(message())
    copy = bridge.clone(model)
    assert source_of(copy) is source_of(model)
    assert copy.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    assert to_bytes(copy) == to_bytes(model)


def zoo() -> Iterator[pathlib.Path]:
    root = os.environ.get("ONNXCOMPRESS_ZOO")
    if root:
        yield from sorted(pathlib.Path(root).glob("*/model*.onnx"))


@pytest.mark.skipif(not os.environ.get("ONNXCOMPRESS_ZOO"), reason="ONNXCOMPRESS_ZOO is not set")
@pytest.mark.parametrize("path", list(zoo()), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_zoo_round_trip(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    saved = save(load(path), tmp_path / "out.onnx")
    assert saved.bytes <= path.stat().st_size
    external = save(load(path), tmp_path / "ext.onnx", external=True)
    assert len(external.files) in (1, 2)
    original = {slot.name: slot.tensor for slot in bridge.slots(load(path))}
    for out in (saved.path, external.path):
        again = {slot.name: slot.tensor for slot in bridge.slots(load(out))}
        assert again.keys() == original.keys()
        for name, tensor in again.items():
            assert tensor.tobytes() == original[name].tobytes()
