"""`inspect --trainable` says beforehand what a training does."""

from __future__ import annotations

import json
import pathlib
import time

import numpy as np
import onnx
import pytest

import onnxcompress as oc
from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.contract import Select
from onnxcompress.model.load import load
from onnxcompress.trainable import NO_EFFECT, trainable
from onnxcompress.training.distill import distill
from onnxcompress.training.settings import Settings
from tests.builders import floats, graph, info, model, node, tensors
from tests.house import BUNDLED, bundled, command, split
from tests.training.small import arrays, opened


def blocked() -> onnx.ModelProto:
    """z = x w1 + b1 + Det(x w0) w2, and an unused w3: Det has no gradient here."""
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["a"], name="one"),
        node("MatMul", ["x", "w0"], ["h"], name="zero"),
        node("Reshape", ["h", "square"], ["s"], name="fold"),
        node("Det", ["s"], ["d"], name="volume"),
        node("Unsqueeze", ["d", "last"], ["e"], name="column"),
        node("MatMul", ["e", "w2"], ["f"], name="two"),
        node("Add", ["a", "f"], ["z"], name="sum"),
        node("MatMul", ["x", "w3"], ["unused"], name="three"),
    ]
    held = tensors(
        w0=floats(6, 4),
        w1=floats(6, 4, seed=1),
        b1=floats(4, seed=2),
        w2=floats(1, 4, seed=3),
        w3=floats(6, 3000, seed=4),
    )
    held += tensors(square=np.array([-1, 2, 2]), last=np.array([1]))
    return model(graph(nodes, [info("x", ["n", 6])], [info("z", ["n", 4])], held))


@pytest.mark.parametrize("name", BUNDLED)
def test_it_names_what_a_training_then_trains(name: str) -> None:
    of = load(bundled(name))
    found = trainable(of)
    with np.load(split(name, "train")) as stored:
        few = {key: array[:32] for key, array in stored.items()}
    done = distill(of, of, opened(of, few, 32), settings=Settings(epochs=1))
    assert found.blocked == []
    assert {key: {p: a.size for p, a in parts.items()} for key, parts in done.parameters.items()} == found.trained
    assert done.left == found.left
    assert list(found.outputs) == ["logits"]


def test_a_compressed_model_tells_the_parts_that_are_trained(tmp_path: pathlib.Path) -> None:
    oc.compress(bundled("digits_cnn"), "small", out=tmp_path / "o.onnx")
    found = trainable(load(tmp_path / "o.onnx"))
    books = {key: parts for key, parts in found.trained.items() if "codebook" in parts}
    assert len(books) == 13
    assert sum(parts["codebook"] for parts in books.values()) < 20_000
    assert all(list(parts) == ["w"] for key, parts in found.trained.items() if key not in books)


def test_an_operator_without_a_gradient_is_named_with_what_it_cuts_off() -> None:
    of = load(blocked())
    found = trainable(of)
    (entry,) = found.blocked
    assert (entry.node, entry.operator, entry.weights) == ("volume", "Det", ["w0"])
    assert "no gradient rule" in entry.reason
    assert set(found.trained) == {"w1", "b1", "w2"}
    assert found.left == {"w3": NO_EFFECT}
    assert found.cut_off == ["w0"]
    with pytest.raises(NoGradient, match="'volume'"):
        distill(None, of, opened(of, arrays(64)))
    done = distill(None, of, opened(of, arrays(64)), settings=Settings(select=Select(exclude=("w0",))))
    assert set(done.parameters) == set(found.trained)


def test_without_an_output_to_learn_nothing_is_trained() -> None:
    body = graph([node("ArgMax", ["x"], ["y"], axis=1)], [info("x", ["n", 6])], [info("y", ["n", 1], 7)])
    assert trainable(load(model(body))).trained == {}
    body = graph([node("Shape", ["x"], ["y"])], [info("x", ["n", 6])], [info("y", [2], 7)])
    found = trainable(load(model(body)))
    assert (found.outputs, found.trained, found.left) == ({}, {}, {})


def test_looking_changes_nothing() -> None:
    of = load(bundled("digits_gru"))
    before = oc.inspect(of)
    assert before.trainable is None
    found = oc.inspect(of, trainable=True)
    assert found.trainable is not None
    assert oc.inspect(of) == before
    assert len(found.trainable.trained) + len(found.trainable.left) == len(found.weights)


def test_the_command_says_it(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, report = tmp_path / "m.onnx", tmp_path / "r.json"
    file.write_bytes(blocked().SerializeToString())
    code, out, err = command(capsys, "inspect", file, "--trainable", "--json", report)
    assert (code, err) == (0, "")
    told = out[out.index("what distill and train would train, for z:") :].splitlines()[1:]
    assert told[0] == "  3 weights, 32 numbers"
    assert told[1] == f"  left, 1 weights: {NO_EFFECT}"
    assert told[2].startswith("  node 'volume' (Det) has no gradient rule")
    assert told[2].endswith("cuts off w0")
    assert told[3].endswith("both refuse the model: --exclude w0")
    written = json.loads(report.read_text())["trainable"]
    assert written["trained"] == {"w1": {"w": 24}, "b1": {"w": 4}, "w2": {"w": 4}}
    assert written["left"] == {"w3": NO_EFFECT}
    assert [(entry["node"], entry["weights"]) for entry in written["blocked"]] == [("volume", ["w0"])]
    _, out, _ = command(capsys, "inspect", file, "--trainable", "-v")
    assert "    w1: 24 of w\n" in out
    assert "    w3\n" in out
    _, out, _ = command(capsys, "inspect", file, "--json", report)
    assert "train" not in out
    assert json.loads(report.read_text())["trainable"] is None


def test_every_model_of_the_zoo_is_looked_at_in_seconds(zoo: pathlib.Path) -> None:
    counts = {}
    for file in sorted(zoo.glob("*/model.onnx")):
        start = time.process_time()
        of = load(file)
        found = trainable(of)
        assert time.process_time() - start < 20, file
        keys = [*found.trained, *found.left, *found.cut_off]
        assert sorted(keys) == sorted({weight.key for weight in oc.weights(of)}), file
        assert found.blocked == [], file
        counts[file.parent.name] = len(found.trained)
    untrainable = {name for name, count in counts.items() if not count}
    assert untrainable <= {"sk_forest_digits", "sk_logreg_zipmap", "ultraface_rfb320"}
