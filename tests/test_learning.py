"""`onnxcompress.distill` and `onnxcompress.train`: the words of the commands, checked as a recipe's are."""

from __future__ import annotations

import hashlib
import inspect
import pathlib

import numpy as np
import onnx
import pytest

import onnxcompress as oc
from onnxcompress import learning, registry
from onnxcompress.errors import PassError, RecipeError
from tests.house import command
from tests.training.small import arrays, mlp

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(mlp(), "whole.onnx")
    np.savez("train.npz", **arrays(64))  # type: ignore[arg-type]
    oc.compress("whole.onnx", [{"magnitude-pruning": {"sparsity": 0.5}}], out="cut.onnx")
    return tmp_path


def _digest(path: str) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["distill", "train"])
def test_it_is_what_the_command_does(here: pathlib.Path, capsys: Capture, name: str) -> None:
    models = ["whole.onnx", "cut.onnx"] if name == "distill" else ["cut.onnx"]
    report = getattr(oc, name)(*models, out="a.onnx", data="train.npz", epochs=2, lr=0.01, ema=0.9, seed=3)
    given = ["--data", "train.npz", "--epochs", "2", "--lr", "0.01", "--ema", "0.9", "--seed", "3", "-o", "b.onnx"]
    assert command(capsys, name, *models, *given)[0] == 0
    assert _digest("a.onnx") == _digest("b.onnx")
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]
    assert report["settings"]["ema"] == 0.9


def test_a_student_may_start_from_nothing(here: pathlib.Path, capsys: Capture) -> None:
    report = oc.distill("whole.onnx", "whole.onnx", out="new.onnx", data="train.npz", init="random", epochs=1, lr=1e-9)
    assert report["settings"]["init"] == "random"
    before, after = (onnx.load(path).graph.initializer for path in ("whole.onnx", "new.onnx"))
    drawn = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after}
    assert all(not np.allclose(onnx.numpy_helper.to_array(t), drawn[t.name]) for t in before if t.name.startswith("w"))
    given = ["--data", "train.npz", "--init", "random", "--epochs", "1", "--lr", "1e-9", "-o", "same.onnx"]
    assert command(capsys, "distill", "whole.onnx", "whole.onnx", *given)[0] == 0
    assert _digest("new.onnx") == _digest("same.onnx")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"epoch": 3}, r"distill: unknown parameter 'epoch'; did you mean 'epochs'\?"),
        ({"schedule": "foo"}, "distill: schedule"),
        ({"lr": -1.0}, "distill: lr"),
        ({"keep_zeros": "foo"}, "distill: keep_zeros"),
        ({"feature_loss": "mse"}, "distill: feature_loss"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(here: pathlib.Path, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        oc.distill("whole.onnx", "cut.onnx", out="o.onnx", data="train.npz", **parameters)  # type: ignore[arg-type]
    assert not pathlib.Path("o.onnx").exists()


def test_weights_that_start_are_kept_or_random(here: pathlib.Path) -> None:
    with pytest.raises(PassError, match="init: wanted keep or random, got 'rand'"):
        oc.train("whole.onnx", out="o.onnx", data="train.npz", init="rand")


def test_no_word_of_a_pass_is_taken_by_an_argument() -> None:
    own = set(inspect.signature(learning.distill).parameters)
    for name in ("distill", "finetune"):
        fields = set(registry.load(name).__dataclass_fields__)
        assert own & fields <= {"data", "teacher"}  # what they are in the pass, they are here
