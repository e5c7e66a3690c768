"""`distill` and `train`: one set of words, what is refused, and going on after an interrupt."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.builders import floats, graph, info, model, node, tensors
from tests.house import (
    bundled,
    command,
    filenames,
    initializers,
    refused,
    split,
    two_layers,
)

Capture = pytest.CaptureFixture[str]

C = str(bundled("digits_cnn"))
E = str(split("digits_cnn", "eval"))
T = str(split("digits_cnn", "train"))
JUDGED = ["--eval", E, "--metric", "accuracy"]

S = ["distill", C, C, "-o", "o.onnx"]
N = ["train", C, "-o", "o.onnx"]


# What is wrong with models and data of a training; the files are made by `_training_files`.
TRAINING_MISTAKES: list[tuple[list[str], str]] = [
    (S, "'--data'"),
    (["distill", C, "-o", "o.onnx", "--data", T], "'STUDENT'"),
    (["distill", "nowhere.onnx", C, "-o", "o.onnx", "--data", T], "nowhere.onnx: no such file"),
    (["distill", C, "text.onnx", "-o", "o.onnx", "--data", T], "text.onnx: is text"),
    ([*S, "--data", "nowhere.npz"], "nowhere.npz: no such file or folder"),
    ([*N, "--data", "nowhere.npz"], "nowhere.npz: no such file or folder"),
    ([*S, "--data", "inputless.npz"], "'image'"),
    ([*N, "--data", "inputless.npz"], "'image'"),
    ([*S, "--data", "wide.npz"], "'image'"),
    ([*S, "--data", T, "--labels", "nowhere"], "'nowhere'"),
    ([*S, "--data", T, "--map", "image"], "write KEY=INPUT"),
    ([*S, "--data", T, "--preprocess", "nowhere.yaml"], "nowhere.yaml"),
    ([*S, "--data", "beyond.npz"], "label 10 of sample 3 is out of range: output 'logits' has classes 0 to 9"),
    ([*N, "--data", "beyond.npz"], "label 10 of sample 3 is out of range: output 'logits' has classes 0 to 9"),
    ([*N, "--data", "misfit.npz"], "labels of shape [40, 3] (int64) fit no output: logits"),
    ([*N, "--data", "unlabelled.npz"], "training without a teacher needs labels"),
    (["distill", "m.onnx", C, "-o", "o.onnx", "--data", T], "the teacher wants an input 'x' that the student does not"),
    ([*S, "--data", T, "--input", "nowhere=image"], "--input nowhere=image: the student has no such input, only image"),
    (["distill", "five.onnx", "m.onnx", "-o", "o.onnx", "--data", "x.npz"], "they do not fit"),
    (["distill", C, C, "-o", "o.onnx", "--data", T, "--output", "nowhere"], "has no such output, only logits"),
    (["distill", "trees.onnx", "trees.onnx", "-o", "o.onnx", "--data", "x.npz"], "nothing in it can be trained"),
    (["train", "trees.onnx", "-o", "o.onnx", "--data", "x.npz"], "nothing in it can be trained"),
    ([*S, "--data", T, "--include", "nothing*"], "nothing in it can be trained: 62 x not selected"),
    (["train", "shape.onnx", "-o", "o.onnx", "--data", "x.npz"], "has no output that can be learned"),
    ([*S, "--data", T, "--patience", "1"], "--patience needs --eval and --metric"),
    ([*N, "--data", T, "--output", "logits=logits"], "names a teacher's output, and there is no teacher"),
    ([*S, "--data", T, "--epochs", "0"], "--epochs"),
    ([*S, "--data", T, "--batch", "0"], "--batch"),
    ([*S, "--data", T, "--lr", "0"], "--lr"),
    ([*S, "--data", T, "--lr", "nan"], "--lr"),
    ([*S, "--data", T, "--weight-decay", "inf"], "--weight-decay"),
    ([*S, "--data", T, "--temperature", "-1"], "--temperature"),
    ([*S, "--data", T, "--temperature", "1e30"], "--temperature"),
    ([*S, "--data", T, "--alpha", "2"], "--alpha"),
    ([*S, "--data", "nan.npz"], "the label of sample 3 holds nan: mend it, or leave the sample out of the data"),
    ([*N, "--data", "between.npz"], "not all of them whole numbers, as those of classes are, fit no output: logits"),
    ([*S, "--data", "zero.npz"], "zero.npz: holds no samples"),
    ([*S, "--data", "cut.npz"], "cut.npz: not a readable .npz file"),
    ([*S, "--data", "words.npz"], "words.npz: input 'image': wanted float32"),
    ([*S, "--data", T, "--alpha", "1.5"], "--alpha"),
    ([*S, "--data", T, "--clip", "-1"], "--clip"),
    ([*S, "--data", T, "--ema", "1"], "--ema"),
    ([*S, "--data", T, "--l1", "-1"], "--l1"),
    ([*S, "--data", T, "--optimizer", "adam"], "'adamw', 'sgd'"),
    ([*S, "--data", T, "--schedule", "cosin"], "'cosine', 'linear', 'step', 'constant'"),
    ([*S, "--data", T, "--loss", "mse"], "'auto', 'classes', 'binary', 'values', 'cosine'"),
    ([*S, "--data", T, "--keep-zeros", "yes"], "'auto', 'always', 'never'"),
    ([*S, "--data", T, "--batch-norm", "off"], "'frozen', 'trained'"),
    ([*S, "--data", T, "--feature", "nowhere"], "nowhere"),
    ([*S, "--data", T, "--provider", "tpu"], "tpu"),
    ([*S, "--data", T, "--eval", E], "--eval and --metric go together"),
    ([*S, "--data", T, "--metric", "accuracy"], "--eval and --metric go together"),
    ([*S, "--data", T, "--eval", E, "--metric", "acuracy"], "did you mean 'accuracy'"),
    ([*N, "--data", T, "--init", "zero"], "'keep', 'random'"),
    (["distill", C, C, "-o", "/dev/null", "--data", T], "/dev/null: is not a regular file"),
    (["distill", C, C, "-o", "nowhere/o.onnx", "--data", T], "the folder nowhere does not exist"),
    (["distill", "e.onnx", "m.onnx", "-o", "e.bin", "--data", "x.npz"], "e.bin: holds the external data of e.onnx"),
    (["distill", "m.onnx", "copy.onnx", "-o", "m.onnx", "--data", "x.npz"], "m.onnx: is the teacher"),
    (["distill", C, "m.onnx", "-o", "x.npz", "--data", "x.npz"], "x.npz: is also the recipe or data"),
    (["train", "m.onnx", "-o", "o.onnx", "--data", "x.npz", "--json", "x.npz"], "x.npz: is also the recipe or data"),
    (
        ["train", "m.onnx", "-o", "o.onnx", "--data", "data", "--json", "data/x.npy"],
        "x.npy: is also the recipe or data",
    ),
    (["train", "e.onnx", "-o", "o.onnx", "--data", "x.npz", "--json", "e.bin"], "e.bin: holds weights of e.onnx"),
    (["prune", "e.onnx", "-o", "o.onnx", "--json", "e.bin"], "e.bin: holds weights of e.onnx"),
    (["inspect", "e.onnx", "--json", "e.bin"], "e.bin: holds weights of e.onnx"),
    (["validate", "e.onnx", "m.onnx", "--json", "e.bin"], "e.bin: holds weights of e.onnx"),
    (["compress", C, "-o", "o.onnx", "--recipe", "heal.yaml"], "distill trains and needs data"),
    (["compress", C, "-o", "o.onnx", "--recipe", "healed"], "distill trains and needs data"),
    (["compress", C, "-o", "o.onnx", "--recipe", "heal-from.yaml"], "nowhere.npz: no such file"),
    (["compress", C, "-o", "o.onnx", "--recipe", "over.yaml"], "one training has one setting for all its weights"),
    (["compress", C, "-o", "o.onnx", "--recipe", "rate.yaml"], "lr must be above 0, not 0"),
]


def _training_files(folder: pathlib.Path) -> None:
    """Models and data in which something does not fit."""
    with np.load(split("digits_cnn", "train")) as stored:
        image, y = stored["image"][:40], stored["y"][:40]
    np.savez(folder / "inputless.npz", picture=image, y=y)
    np.savez(folder / "wide.npz", image=np.repeat(image, 2, axis=-1), y=y)
    np.savez(folder / "beyond.npz", image=image, y=np.where(np.arange(40) == 3, 10, y))
    np.savez(folder / "nan.npz", image=image, y=np.where(np.arange(40) == 3, np.nan, y))
    np.savez(folder / "between.npz", image=image, y=y + 0.5)
    np.savez(folder / "zero.npz", image=image[:0], y=y[:0])
    np.savez(folder / "words.npz", image=np.array(["a"] * 40), y=y)
    (folder / "cut.npz").write_bytes((folder / "beyond.npz").read_bytes()[:2000])
    np.savez(folder / "misfit.npz", image=image, y=np.zeros((40, 3), np.int64))
    np.savez(folder / "unlabelled.npz", image=image)
    np.savez(folder / "x.npz", x=floats(40, 16), y=np.arange(40) % 8)
    (folder / "data").mkdir()
    np.save(folder / "data" / "x.npy", floats(40, 16))
    (folder / "copy.onnx").write_bytes((folder / "m.onnx").read_bytes())
    other = graph([node("MatMul", ["x", "w"], ["y"])], [info("x", ["n", 16])], [info("y", ["n", 5])])
    other.initializer.extend(tensors(w=floats(16, 5)))
    (folder / "five.onnx").write_bytes(model(other).SerializeToString())
    trees = node("LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[0.5] * 16, intercepts=[0.0])
    body = graph([trees], [info("x", ["n", 16])], [info("y", ["n", 1])])
    (folder / "trees.onnx").write_bytes(model(body, domains={"ai.onnx.ml": 3}).SerializeToString())
    body = graph([node("Shape", ["x"], ["y"])], [info("x", ["n", 16])], [info("y", [2], onnx.TensorProto.INT64)])
    (folder / "shape.onnx").write_bytes(model(body).SerializeToString())
    onnx.save(two_layers(), folder / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    (folder / "heal.yaml").write_text("passes: [magnitude-pruning, distill]")
    (folder / "heal-from.yaml").write_text("passes: [magnitude-pruning, distill: {data: nowhere.npz}]")
    (folder / "over.yaml").write_text("passes: [distill: {select: {overrides: {fc: {lr: 0.1}}}}]")
    (folder / "rate.yaml").write_text("passes: [distill: {lr: 0}]")


@pytest.mark.parametrize(
    ("arguments", "words"), TRAINING_MISTAKES, ids=lambda v: " ".join(v)[-60:] if isinstance(v, list) else ""
)
def test_a_mistake_in_a_training_is_one_line_too(
    arguments: list[str], words: str, here: pathlib.Path, capsys: Capture
) -> None:
    _training_files(here)
    refused(here, capsys, arguments, words)


@pytest.mark.parametrize("verb", [["distill", C, C], ["train", C]])
def test_a_number_in_the_data_that_is_none_is_told_with_the_step(
    verb: list[str], here: pathlib.Path, capsys: Capture
) -> None:
    with np.load(split("digits_cnn", "train")) as stored:
        image, y = stored["image"][:96].astype(np.float32), stored["y"][:96]
    image[70, ..., 3] = np.nan
    np.savez(here / "nan.npz", image=image, y=y)
    code, _, err = command(capsys, *verb, "-o", "o.onnx", "--data", "nan.npz", "--batch", "32")
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(r"^error: step \d \(epoch 1\): the loss is nan", err)
    assert "the data holds values that are not finite: sample 70 holds nan in the input 'image'" in err
    kept = re.search(r"the last good state is kept in (\S+?);", err)
    assert kept is not None
    assert pathlib.Path(kept[1]).is_file()
    assert not (here / "o.onnx").exists()


@pytest.mark.parametrize(("verb", "name"), [("distill", "distill"), ("train", "finetune")])
def test_a_training_has_one_set_of_words(verb: str, name: str) -> None:
    """Python (`Settings`, `Objective`), recipe and command line: the same names and the same defaults."""
    from onnxcompress.registry import load
    from onnxcompress.training.settings import Settings
    from onnxcompress.training.targets import Objective

    python = {f.name: f.default for kind in (Settings, Objective) for f in dataclasses.fields(kind)}
    recipe = {f.name: f.default for f in dataclasses.fields(load(name))}
    module = importlib.import_module(f"onnxcompress.cli.{verb}_command")
    line = {option.name: option.default for option in module.command.params}
    beside = {"seed", "select", "patience"}  # the run's; --include and --exclude; for what --eval scores
    soft = {f.name for f in dataclasses.fields(load("distill"))} - {
        f.name for f in dataclasses.fields(load("finetune"))
    }
    wanted = python.keys() - beside - (soft if name == "finetune" else set())
    assert wanted <= recipe.keys() & line.keys()
    assert {word: recipe[word] for word in wanted} == {word: python[word] for word in wanted}
    assert {word: line[word] for word in wanted} == {word: recipe[word] for word in wanted}
    assert recipe.keys() - wanted == {"select", "data", "provider"} | ({"teacher"} if name == "distill" else set())
    assert line.keys() >= {"seed", "include", "exclude", "patience", "data", "provider", "evaluate", "metric", "resume"}


SLOW_TRAINING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from onnxcompress.training import loop
loop.SAVED_EVERY = 0.05
update = loop.Loop._update
loop.Loop._update = lambda *given: (update(*given), time.sleep(0.005))
import onnxcompress.cli
onnxcompress.cli.main()
"""


@pytest.mark.parametrize("with_what", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_distillation_goes_on_to_the_same_bytes(
    with_what: signal.Signals, here: pathlib.Path, capsys: Capture
) -> None:
    command(capsys, "prune", "m.onnx", "-o", "cut.onnx", "--sparsity", "0.6", "-q")
    np.savez(here / "x.npz", x=floats(256, 16))
    given = ["distill", "m.onnx", "cut.onnx", "-o", "o.onnx", "--data", "x.npz", "--batch", "8", "--epochs", "8"]
    child = subprocess.Popen([sys.executable, "-c", SLOW_TRAINING, *given], stderr=subprocess.PIPE, text=True)
    deadline, work = time.monotonic() + 60, here / ".o.onnx.work"
    while not list(work.glob("state.*/training.npz")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(with_what)
    _, err = child.communicate(timeout=30)
    if with_what != signal.SIGKILL:
        assert child.returncode == 130
        said = "interrupted, nothing was written; the same command with --resume goes on from the last epoch\n"
        assert err == said
    assert not (here / "o.onnx").exists()
    code, resumed, _ = command(capsys, *given, "--resume", "--json", "r.json")
    assert code == 0
    given[given.index("o.onnx")] = "whole.onnx"
    code, whole, _ = command(capsys, *given, "--json", "w.json")
    assert code == 0
    assert (here / "o.onnx").read_bytes() == (here / "whole.onnx").read_bytes()
    assert _without_seconds(here / "r.json") == _without_seconds(here / "w.json")
    told = [re.sub(r", \d+ s$", "", line) for line in resumed.splitlines()]
    assert told[:8] == [re.sub(r", \d+ s$", "", line) for line in whole.splitlines()][:8]
    assert told[7].startswith("epoch 8 of 8: loss")
    assert filenames(here) == ["cut.onnx", "m.onnx", "o.onnx", "r.json", "w.json", "whole.onnx", "x.npz"]


def _without_seconds(path: pathlib.Path) -> dict[str, Any]:
    """A report less what depends on the clock; there are eight epochs in it."""
    report: dict[str, Any] = json.loads(path.read_text())
    assert [epoch.pop("seconds") >= 0 for epoch in report["epochs"]] == [True] * 8
    return report


@pytest.mark.parametrize("verb", ["distill", "train"])
def test_a_training_in_the_place_of_its_student(verb: str, here: pathlib.Path, capsys: Capture) -> None:
    command(capsys, "prune", "m.onnx", "-o", "s.onnx", "--sparsity", "0.6", "-q")
    np.savez(here / "x.npz", x=floats(64, 16), y=np.arange(64) % 8)
    before = initializers(here / "s.onnx")
    models = ["m.onnx", "s.onnx"] if verb == "distill" else ["s.onnx"]
    code, out, err = command(capsys, verb, *models, "-o", "s.onnx", "--data", "x.npz", "--epochs", "2", "-v")
    assert (code, err) == (0, "")
    assert re.search(r"^epoch 2 of 2: loss \d+\.\d+, \d+ s$", out, re.M)
    assert re.search(r"^    first: changed by 0\.\d+$", out, re.M)
    after = initializers(here / "s.onnx")
    for name in ("first", "second"):
        assert not np.array_equal(before[name], after[name])
        np.testing.assert_array_equal(after[name][before[name] == 0], 0)
    assert filenames(here) == ["m.onnx", "s.onnx", "x.npz"]


def test_a_training_that_would_make_it_worse_keeps_what_came_in(here: pathlib.Path, capsys: Capture) -> None:
    x = floats(64, 16)
    z = onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0]
    np.savez(here / "x.npz", x=x, y=(z.argmax(-1) + 1) % 8)  # wrong labels to learn, right ones to be judged by
    np.savez(here / "e.npz", x=x, y=z.argmax(-1))
    given = ["train", "m.onnx", "--data", "x.npz", "-o", "o.onnx", "--epochs", "9", "--lr", "0.1"]
    given += ["--metric", "accuracy", "--eval", "e.npz", "--json", "r.json"]
    code, out, _ = command(capsys, *given)
    assert code == 0
    report = json.loads((here / "r.json").read_text())
    best = max(epoch["score"] for epoch in report["epochs"])
    assert f"kept the model as it came in, which scores 1.0000: the best epoch scores {best:.4f}\n" in out
    assert (report["before"], report["kept_epoch"], report["touched"]) == (1, 0, [])
    assert {entry["weight"] for entry in report["left"]} == {"first", "bias", "second"}
    before, after = initializers(here / "m.onnx"), initializers(here / "o.onnx")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    code, out, _ = command(capsys, *given, "--init", "random")  # what was drawn is no model anybody came with
    assert code == 0
    report = json.loads((here / "r.json").read_text())
    assert report["kept_epoch"] >= 1
    assert re.search(r"^(warning: )?kept epoch \d, which scores 0\.\d+, 0\.\d+ before", out, re.M)


def test_the_report_says_all_that_was_used(here: pathlib.Path, capsys: Capture) -> None:
    """Given again as options, what it says was used makes the same file."""
    command(capsys, "prune", "m.onnx", "-o", "cut.onnx", "--sparsity", "0.6", "-q")
    np.savez(here / "x.npz", x=floats(90, 16), y=np.arange(90) % 8)
    given = ["distill", "m.onnx", "cut.onnx", "--data", "x.npz", "-q"]
    assert command(capsys, *given, "-o", "a.onnx", "--json", "a.json")[0] == 0
    report = json.loads((here / "a.json").read_text())
    used = report["settings"]
    assert {used[name] for name in ("epochs", "batch", "lr", "weight_decay", "alpha")} == {30, 32, 1e-3, 0.01, 0.1}
    assert (used["optimizer"], used["schedule"], used["batch_norm"], used["seed"]) == ("adamw", "cosine", "frozen", 0)
    assert report["epochs"][-1]["epoch"] == used["epochs"]
    assert report["steps"] == 30 * 90 // 32
    (temperature,) = used["temperature"].values()
    assert report["sha256"]["student"] == hashlib.sha256((here / "cut.onnx").read_bytes()).hexdigest()
    assert report["versions"]["onnxruntime"] == onnxruntime.__version__
    for name in ("epochs", "batch", "lr", "weight_decay", "batch_norm", "alpha", "clip", "warmup", "schedule"):
        given += [f"--{name.replace('_', '-')}", str(used[name])]
    assert command(capsys, *given, "--temperature", repr(temperature), "-o", "b.onnx", "--json", "b.json")[0] == 0
    again = json.loads((here / "b.json").read_text())
    assert again["settings"] == used
    for (name, a), (other, b) in zip(initializers(here / "a.onnx").items(), initializers(here / "b.onnx").items(),
                                     strict=True):  # fmt: skip
        assert name == other
        assert a.tobytes() == b.tobytes()


def test_the_score_before_is_told_and_the_data_it_is_of_is_part_of_what_resumes(
    here: pathlib.Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxcompress import healing
    from onnxcompress.training.distill import distill

    np.savez(here / "x.npz", x=floats(64, 16), y=np.arange(64) % 8)
    np.savez(here / "e.npz", x=floats(32, 16), y=np.zeros(32, np.int64))
    np.savez(here / "f.npz", x=floats(32, 16), y=np.ones(32, np.int64))
    known = []

    def noted(*given: Any, conditions: Any, **options: Any) -> Any:
        known.append(conditions.identity)
        return distill(*given, conditions=conditions, **options)

    monkeypatch.setattr(healing, "distill", noted)
    given = ["train", "m.onnx", "--data", "x.npz", "-o", "o.onnx", "--epochs", "1", "--metric", "accuracy", "--eval"]
    code, out, err = command(capsys, *given, "e.npz", "--json", "r.json")
    assert code == 0
    before = json.loads((here / "r.json").read_text())["before"]
    assert f"before: score {before:.4f}\n" in out + err
    assert command(capsys, *given, "f.npz", "-q")[0] == 0
    assert known[0]["evaluate"] != known[1]["evaluate"]
    assert known[0]["data"] == known[1]["data"]
