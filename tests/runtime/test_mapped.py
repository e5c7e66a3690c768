"""A model run from files, its encoded weights expanded by pieces, puts out bit for bit what it does as it stands."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.encodings import Affine, Codebook, Masked, Sparse
from onnxcompress.encodings.base import Encoding
from onnxcompress.model.load import load
from onnxcompress.model.save import save
from onnxcompress.model.weights import weights
from onnxcompress.runtime import mapped
from onnxcompress.runtime.session import open_session

SIZE = 520  # 520 x 520 float32: just above 1 MiB
GENERATOR = np.random.default_rng(7)
W = GENERATOR.standard_normal((SIZE, SIZE)).astype(np.float32)
X = GENERATOR.standard_normal((3, SIZE)).astype(np.float32)


def model() -> onnx.ModelProto:
    """x @ a, then x @ b in both branches of an If, b belonging to one of them."""
    branches = {}
    for name in ("then", "else"):
        constants = [numpy_helper.from_array(W[::-1], "b")] if name == "then" else []
        nodes = [helper.make_node("MatMul", ["y", "b" if constants else "a"], [f"{name}.out"])]
        info = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, [3, SIZE])
        branches[f"{name}_branch"] = helper.make_graph(nodes, name, [], [info], constants)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["y"]), helper.make_node("If", ["which"], ["z"], **branches)]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, SIZE]),
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, SIZE])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(W, "a")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def encoded(kind: str) -> Encoding:
    codes = GENERATOR.integers(0, 16, W.shape).astype(np.uint8)
    cut = np.where(np.abs(W) < 0.7, 0, W).astype(np.float32)
    made: dict[str, Encoding] = {
        "codebook": Codebook(codes, np.linspace(-2, 2, 16, dtype=np.float32)),
        "codebook per channel": Codebook(
            codes, GENERATOR.standard_normal((SIZE, 16)).astype(np.float16), 1, np.dtype(np.float32)
        ),
        "sparse": Sparse.pack(cut),
        "masked": Masked(cut),
        "affine": Affine(codes.view(np.int8), np.full(SIZE, 0.1, np.float32), axis=1),
    }
    return made[kind]


@pytest.mark.parametrize("kind", ["codebook", "codebook per channel", "sparse", "masked", "affine"])
@pytest.mark.parametrize("external", [False, True])
def test_runs_as_it_stands(kind: str, external: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "PIECE", 1 << 16)
    work = tmp_path / "work"
    work.mkdir()
    if external:
        save(load(model()), tmp_path / "m.onnx", external=True)
    made = load(tmp_path / "m.onnx" if external else model())
    for weight in weights(made, work):
        weight.replace(encoded(kind))
    feeds = [{"x": X, "which": np.array(which)} for which in (True, False)]
    with open_session(made, optimize=False, config=mapped.CONFIG) as session:
        wanted = [session.run(each)["z"] for each in feeds]
    before = {path.name for path in work.iterdir()}
    with mapped.open_mapped(made, work) as session:
        found = [session.run(each)["z"] for each in feeds]
        (folder,) = [path for path in work.iterdir() if path.name not in before]
        assert len(list(folder.glob("*.expanded"))) == (0 if kind == "masked" else 2)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in wanted]
    assert {path.name for path in work.iterdir()} == before
    assert {weight.encoding.kind for weight in weights(made)} == {kind.split()[0]}


def test_no_copy_of_what_lies_in_a_file_already(tmp_path: pathlib.Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["y"]), helper.make_node("MatMul", ["y", "b"], ["z"])]
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, SIZE]) for name in "xz")
    constants = [numpy_helper.from_array(W, "a"), numpy_helper.from_array(W, "b")]
    proto = helper.make_model(helper.make_graph(nodes, "g", [x], [z], constants), ir_version=8)
    save(load(proto), tmp_path / "m.onnx", external=True)
    made = load(tmp_path / "m.onnx")
    weight, other = weights(made, tmp_path)
    weight.replace(Masked(np.where(np.abs(W) < 0.7, 0, W).astype(np.float32)))
    with mapped.open_mapped(made, tmp_path) as session:
        (folder,) = tmp_path.glob("mapped-*")
        assert len(list(folder.glob("*.link"))) == 2  # the data of the model, and the spilled weight
        assert not list(folder.glob("*.data"))
        found = session.run({"x": X})["z"]
    assert isinstance(other.value.const_value, ir.ExternalTensor)
    with open_session(made, optimize=False, config=mapped.CONFIG) as session:
        assert found.tobytes() == session.run({"x": X})["z"].tobytes()


def test_copies_where_it_cannot_link(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another file system")

    save(load(model()), tmp_path / "m.onnx", external=True)
    monkeypatch.setattr("os.link", refuse)
    with mapped.open_mapped(load(tmp_path / "m.onnx"), tmp_path) as session:
        (folder,) = tmp_path.glob("mapped-*")
        assert sum(path.stat().st_size for path in folder.glob("*.data")) == 2 * W.nbytes
        found = session.run({"x": X, "which": np.array(False)})["z"]
    with open_session(model().SerializeToString(), optimize=False, config=mapped.CONFIG) as session:
        assert found.tobytes() == session.run({"x": X, "which": np.array(False)})["z"].tobytes()
