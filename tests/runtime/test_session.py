"""Sessions: the provider asked for or an error, errors in one line, nothing left behind."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import DataError, ModelError, OnnxCompressError, RuntimeUnavailable
from onnxcompress.model.load import load
from onnxcompress.model.save import save
from onnxcompress.runtime import providers, session
from onnxcompress.runtime.session import open_session

W = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)


def message(op: str = "MatMul") -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["t"]), helper.make_node("Relu", ["t"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32]) for name in ("y", "t")],
        [numpy_helper.from_array(W, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_every_form_of_a_model(tmp_path: pathlib.Path) -> None:
    plain = tmp_path / "plain.onnx"
    plain.write_bytes(message().SerializeToString())
    external = save(load(plain), tmp_path / "external.onnx", external=True).path
    forms: list[Any] = [plain, str(plain), plain.read_bytes(), load(plain), external, load(external)]
    for form in forms:
        with open_session(form) as opened:
            got = opened.run({"x": X})
            np.testing.assert_allclose(got["t"], X @ W, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(got["y"], np.maximum(got["t"], 0))
            assert list(got) == ["y", "t"]
            assert opened.providers == ("CPUExecutionProvider",)
            assert [(p.name, p.type, p.shape, p.dtype) for p in opened.inputs] == [
                ("x", "tensor(float)", ("n", 64), np.dtype(np.float32))
            ]
            assert list(opened.run({"x": X}, ["t"])) == ["t"]


def test_large_models_go_through_a_folder_that_goes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of two folders, and tensors in memory too large for one message."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private"))
    (tmp_path / "private").mkdir()
    models = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        models.append(load(save(load(message()), tmp_path / name / "m.onnx", external=True).path))
    tensor = models[1].graph.initializers["w"].const_value
    models[0].graph.register_initializer(ir.Value(name="other", const_value=tensor))
    opened = open_session(models[0])
    assert len(list((tmp_path / "private").iterdir())) == 1
    np.testing.assert_allclose(opened.run({"x": X})["t"], X @ W, rtol=1e-4, atol=1e-5)
    opened.close()
    opened.close()
    assert not list((tmp_path / "private").iterdir())
    with pytest.raises(RuntimeUnavailable, match="closed"):
        opened.run({"x": X})


def test_feeds_that_do_not_fit() -> None:
    with open_session(load(message())) as opened:
        with pytest.raises(DataError, match="no data for input 'x'"):
            opened.run({})
        with pytest.raises(DataError, match="has no input 'z'"):
            opened.run({"x": X, "z": X})
        with pytest.raises(DataError, match="do not fit") as caught:
            opened.run({"x": X[:, :5]})
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(ModelError, match="has no output 'q'"):
            opened.run({"x": X}, ["q"])


def test_scalars_and_overridden_initializers() -> None:
    proto = message()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 32]))
    proto.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, []))
    proto.graph.node.append(helper.make_node("Mul", ["y", "s"], ["z"]))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 32]))
    with open_session(load(proto)) as opened:
        assert [port.name for port in opened.inputs] == ["x", "s"]
        got = opened.run({"x": X, "s": np.float32(3)})
        np.testing.assert_array_equal(got["z"], got["y"] * np.float32(3))
        np.testing.assert_array_equal(opened.run({"x": X, "s": np.float32(3), "w": W * 0})["y"], 0)


def test_refused_by_the_runtime() -> None:
    with pytest.raises(ModelError, match=r"small: ONNX Runtime refuses it: .*NoSuchOperator") as caught:
        open_session(load(message("NoSuchOperator")))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ModelError, match="no such file"):
        open_session("nowhere.onnx")


def test_nothing_on_stderr() -> None:
    code = (
        "from onnxcompress.runtime.session import open_session\n"
        "try: open_session(b'not a model')\n"
        "except Exception as error: print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ModelError"
    assert not done.stderr


def test_unknown_and_missing_providers() -> None:
    assert providers.provider_class("CPU") == "CPUExecutionProvider"
    assert providers.provider_class("TensorrtExecutionProvider") == "TensorrtExecutionProvider"
    with pytest.raises(OnnxCompressError, match="did you mean 'cuda'"):
        open_session(load(message()), provider="cuba")
    available = session.onnxruntime().get_available_providers()
    absent = next(name for name, known in providers.PROVIDERS.items() if known not in available)
    with pytest.raises(RuntimeUnavailable, match=f"provider {absent} is not in the installed onnxruntime"):
        open_session(load(message()), provider=absent)


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with CUDA on a machine without: listed, asked for, and not there in the session."""
    ort = session.onnxruntime()
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda source, options, **_: real(source, options, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(
        RuntimeUnavailable, match=r"cuda is in the installed onnxruntime but did not start \(running: cpu\)"
    ):
        open_session(load(message()), provider="cuda")


def test_no_runtime_and_two_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    session.onnxruntime.cache_clear()
    real = importlib.metadata.distribution
    try:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "distribution", lambda name: real("numpy"))
            with pytest.raises(RuntimeUnavailable, match="onnxruntime and onnxruntime-gpu"):
                open_session(load(message()))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "onnxruntime", None)
            patch.setattr(importlib.metadata, "distribution", _not_found)
            with pytest.raises(RuntimeUnavailable, match=r"pip install 'onnxcompress\[cpu\]'"):
                open_session(load(message()))
    finally:
        session.onnxruntime.cache_clear()


def _not_found(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_profile(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "profile.json"
    with open_session(load(message()), profile=path) as opened:
        opened.run({"x": X})
    events = json.loads(path.read_text())
    ran = {event["args"].get("op_name") for event in events if event.get("cat") == "Node"}
    assert ran & {"MatMul", "FusedMatMul"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.json"]


def test_config_and_optimization_arrive() -> None:
    proto = message()
    with open_session(load(proto), optimize=False, config={"session.disable_prepacking": "1"}) as opened:
        assert opened.raw.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"
        assert opened.raw.get_session_options().intra_op_num_threads == 1
        assert opened.raw.get_session_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_importing_does_not_load_the_runtime() -> None:
    code = "import sys, onnxcompress.runtime.session; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
