"""The command line: exit statuses, one clear line for a mistake, outputs untouched by what fails, the JSON report."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress import __version__
from onnxcompress.cli import COMMANDS
from onnxcompress.cli.progress import progress
from onnxcompress.cli.report import plain, size
from onnxcompress.contract import Silent
from tests.builders import floats, graph, info, model, node, tensors
from tests.house import BUNDLED_QUICK, MODELS, ROOT, accuracy, bundled, command, initializers, split, two_layers

Capture = pytest.CaptureFixture[str]
PROGRAM = [sys.executable, "-m", "onnxcompress"]


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty current folder with a small model in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(two_layers().SerializeToString())
    return tmp_path


def names(folder: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# What works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED_QUICK)
@pytest.mark.parametrize(
    ("arguments", "ratio", "drop"),
    [
        (["share", "--bits", "4"], 0.27, 0.01),
        (["prune", "--sparsity", "0.3", "--storage", "sparse"], 0.76, 0.01),
        (["quantize", "--mode", "dynamic"], 0.33, 0.01),
        (["quantize", "--mode", "static", "--calibration", "CALIB"], 0.35, 0.02),
        (["compress"], 0.33, 0.01),
        (["compress", "--recipe", "lossless"], 1.0, 0.0),
        (["compress", "--recipe", "small"], 0.27, 0.01),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_each_command_on_each_bundled_model(
    name: str, arguments: list[str], ratio: float, drop: float, here: pathlib.Path, capsys: Capture
) -> None:
    verb, *rest = [str(split(name, "calib")) if a == "CALIB" else a for a in arguments]
    code, out, err = command(capsys, verb, bundled(name), "-o", "o.onnx", *rest, "--json", "r.json")
    assert (code, err) == (0, "")
    given = bundled(name).stat().st_size
    assert pathlib.Path("o.onnx").stat().st_size <= ratio * given + 2048
    stated = json.loads((MODELS / name / "model.json").read_text())["score"]
    assert accuracy(name, here / "o.onnx") >= stated - drop - 0.0015
    report = json.loads((here / "r.json").read_text())
    check_report(report)
    assert report["bytes_before"] == given
    assert f"o.onnx: {size(given)} -> {size(report['bytes_after'])}" in out
    assert names(here) == ["m.onnx", "o.onnx", "r.json"]


def check_report(report: dict[str, Any]) -> None:
    """The schema that scripts rely on."""
    assert report["schema"] == 1
    assert report["passes"]
    for entry in report["passes"]:
        assert isinstance(entry["name"], str)
        assert entry["seconds"] >= 0
        assert entry["bytes_before"] >= entry["bytes_after"] > 0
        for touched in entry["touched"]:
            assert isinstance(touched["weight"], str)
            assert isinstance(touched["bytes_before"], int)
            assert isinstance(touched["bytes_after"], int)
        for left in entry["left"]:
            assert set(left) == {"weight", "bytes", "reason", "detail"}
            assert isinstance(left["bytes"], int)
            assert re.fullmatch("[a-z-]+", left["reason"])


def test_main_job_says_size_coverage_score_and_latency_for_each_pass(here: pathlib.Path, capsys: Capture) -> None:
    code, out, err = command(
        capsys,
        *("compress", bundled("digits_cnn"), "-o", "o.onnx", "--recipe", "small"),
        *("--eval", split("digits_cnn", "eval"), "--metric", "accuracy", "--max-drop", "0.02", "--json", "r.json"),
    )
    assert (code, err) == (0, "")
    assert out.startswith("recipe small: simplify -> weight-sharing\n")
    assert re.search(r"^simplify: 718 kB -> 7\d\d kB, \d+\.\d s$", out, re.M)
    assert re.search(r"^weight-sharing: 7\d\d kB -> 1\d\d kB, \d+\.\d s$", out, re.M)
    assert re.search(r"touched 13 weights: 691 kB -> 1\d\d kB", out)
    assert re.search(r"left 13 weights, 4.65 kB: role 13", out)
    assert re.search(r"score 0\.99\d\d -> 0\.99\d\d, cosine of the outputs 0\.9\d+, .*\d\.\d\d x as fast", out)
    assert re.search(r"^PASS$", out, re.M)
    report = json.loads((here / "r.json").read_text())
    check_report(report)
    assert report["validation"]["verdict"] == "PASS"
    assert report["passes"][1]["score_before"] == report["passes"][0]["score"]


def test_the_default_recipe_is_named(here: pathlib.Path, capsys: Capture) -> None:
    code, out, _ = command(capsys, "compress", bundled("digits_gru"), "-o", "o.onnx")
    assert code == 0
    assert out.startswith("recipe int8 (the default): simplify -> dynamic-quantization\n")


def test_a_budget_that_does_not_hold_is_exit_1_and_the_file_is_there(here: pathlib.Path, capsys: Capture) -> None:
    (here / "one.yaml").write_text("passes: [weight-sharing: {bits: 1}]")
    judged = ["--eval", split("digits_cnn", "eval"), "--metric", "accuracy"]
    given = ["compress", bundled("digits_cnn"), "-o", "o.onnx", "--recipe", "one.yaml", *judged]
    code, out, _ = command(capsys, *given, "--max-drop", "0.02")
    assert code == 1
    assert "FAIL" in out
    assert accuracy("digits_cnn", here / "o.onnx") < 0.5
    code, out, _ = command(capsys, *given[:4], "--recipe", "small", *judged, "--max-drop", "0.0001")
    assert code == 1
    assert "INCONCLUSIVE" in out or "FAIL" in out


def test_validate_exits_by_its_verdict(here: pathlib.Path, capsys: Capture) -> None:
    original = bundled("digits_cnn")
    command(capsys, "share", original, "-o", "good.onnx", "-q")
    command(capsys, "share", original, "-o", "bad.onnx", "--bits", "1", "-q")
    asked = ["--data", split("digits_cnn", "eval"), "--metric", "accuracy", "--max-drop", "0.02", "--json", "r.json"]
    code, out, _ = command(capsys, "validate", original, "good.onnx", *asked)
    assert code == 0
    report = json.loads((here / "r.json").read_text())
    assert (report["schema"], report["verdict"]) == (1, "PASS")
    code, out, _ = command(capsys, "validate", original, "bad.onnx", *asked)
    assert code == 1
    assert json.loads((here / "r.json").read_text())["verdict"] == "FAIL"
    assert "FAIL" in out
    code, out, _ = command(capsys, "validate", original, "good.onnx", "--provider", "cuda", "-q")
    assert (code, out) == (1, "")


def test_output_in_the_place_of_the_input(here: pathlib.Path, capsys: Capture) -> None:
    for verb, *rest in (["share"], ["compress", "--recipe", "small"], ["quantize", "--mode", "dynamic"]):
        (here / "i.onnx").write_bytes(bundled("digits_cnn").read_bytes())
        code, _, err = command(capsys, verb, "i.onnx", "-o", "i.onnx", *rest)
        assert (code, err) == (0, "")
        assert (here / "i.onnx").stat().st_size < 0.3 * bundled("digits_cnn").stat().st_size
        assert accuracy("digits_cnn", here / "i.onnx") >= 0.985
    assert names(here) == ["i.onnx", "m.onnx"]


def test_select_from_the_command_line(here: pathlib.Path, capsys: Capture) -> None:
    given = ["share", "m.onnx", "-o", "o.onnx", "--bits", "2", "--json", "r.json"]
    for options, wanted in (
        (["--include", "first"], {"first"}),
        (["--exclude", "one"], {"second"}),
        (["--include", "MatMul", "--exclude", "sec*"], {"first"}),
    ):
        code, _, _ = command(capsys, *given, *options)
        assert code == 0
        entry = json.loads((here / "r.json").read_text())["passes"][0]
        assert {touched["weight"] for touched in entry["touched"]} == wanted


def test_quiet_says_nothing_and_verbose_says_every_weight(here: pathlib.Path, capsys: Capture) -> None:
    for arguments in (
        ["share", "m.onnx", "-o", "o.onnx"],
        ["compress", "m.onnx", "-o", "o.onnx", "--recipe", "small"],
        ["prune", "m.onnx", "-o", "o.onnx"],
        ["inspect", "m.onnx"],
        ["passes"],
        ["validate", "m.onnx", "m.onnx"],
    ):
        assert command(capsys, *arguments, "-q") == (0, "", "")
    code, out, err = command(capsys, "share", "nowhere.onnx", "-o", "o.onnx", "-q")
    assert (code, out, err) == (2, "", "error: nowhere.onnx: no such file\n")
    _, out, _ = command(capsys, "share", "m.onnx", "-o", "o.onnx", "-v")
    assert re.search(r"first: 4.1 kB -> \d+ B, error 0\.09\d per tensor", out)
    assert re.search(r"bias: left, 32 B: role bias", out)


def test_seed_and_threads_do_not_change_the_bytes_of_these(here: pathlib.Path, capsys: Capture) -> None:
    for threads in ("1", "2"):
        arguments = ["share", bundled("digits_gru"), "-o", f"{threads}.onnx", "--threads", threads, "--seed", "0"]
        assert command(capsys, *arguments)[0] == 0
    assert (here / "1.onnx").read_bytes() == (here / "2.onnx").read_bytes()


def test_passes_lists_every_pass_parameter_and_recipe(here: pathlib.Path, capsys: Capture) -> None:
    code, out, _ = command(capsys, "passes", "--json", "p.json")
    assert code == 0
    report = json.loads((here / "p.json").read_text())
    found = {entry["name"]: entry for entry in report["passes"]}
    assert set(found) >= {"simplify", "magnitude-pruning", "weight-sharing", "dynamic-quantization"}
    bits = next(p for p in found["weight-sharing"]["parameters"] if p["name"] == "bits")
    assert bits["default"] == 4
    assert all(p["doc"] for entry in found.values() for p in entry["parameters"])
    assert "bits: Literal[1, 2, 4, 8] = 4    bits a code" in out
    assert "sparsity: float = 0.5" in out
    assert "(>= 0.0, <= 1.0)" in out
    for name in ("lossless", "int8", "int8-static", "small"):
        assert f"    {name}: " in out


def test_a_broken_pass_of_a_third_party_does_not_hide_the_others(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    from onnxcompress import registry

    entries = [*importlib.metadata.entry_points(group=registry.GROUP)]
    entries.append(importlib.metadata.EntryPoint("zz-broken", "nowhere.at_all:Pass", registry.GROUP))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    registry.names.cache_clear()
    code, out, _ = command(capsys, "passes")
    registry.names.cache_clear()
    assert code == 0
    assert "zz-broken: pass 'zz-broken' (nowhere.at_all:Pass) cannot be imported" in out
    assert "weight-sharing: " in out


@pytest.mark.parametrize(("verb", "name"), [("distill", "distill"), ("train", "finetune")])
def test_a_training_has_one_set_of_words(verb: str, name: str) -> None:
    """Python (`Settings`, `Objective`), recipe and command line: the same names and the same defaults."""
    import importlib

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


# Mistakes ---------------------------------------------------------------------------------------------------------

C = str(bundled("digits_cnn"))
E = str(split("digits_cnn", "eval"))
JUDGED = ["--eval", E, "--metric", "accuracy"]

MISTAKES: list[tuple[list[str], str]] = [
    (["share", "nowhere.onnx", "-o", "o.onnx"], "nowhere.onnx: no such file"),
    (["share", ".", "-o", "o.onnx"], ".: is a folder"),
    (["share", "/dev/null", "-o", "o.onnx"], "/dev/null: is not a regular file"),
    (["share", "text.onnx", "-o", "o.onnx"], "text.onnx: is text"),
    (["share", C, "-o", "nowhere/o.onnx"], "the folder nowhere does not exist"),
    (["share", C, "-o", "."], ".: is a folder"),
    (["share", C], "'-o' / '--out'"),
    (["share"], "'MODEL'"),
    (["share", C, "-o", "o.onnx", "--bits", "3"], "bits = 3: input should be 1, 2, 4 or 8"),
    (["share", C, "-o", "o.onnx", "--bits", "four"], "'four' is not a valid integer"),
    (["share", C, "-o", "o.onnx", "--clusters", "1"], "clusters must be at least 2, not 1"),
    (["share", C, "-o", "o.onnx", "--granularity", "row"], "'auto', 'tensor', 'channel'"),
    (["share", C, "-o", "o.onnx", "--seed", "-1"], "--seed"),
    (["share", C, "-o", "o.onnx", "--threads", "0"], "--threads"),
    (["share", C, "-o", "o.onnx", "--json", "nowhere/r.json"], "the folder nowhere does not exist"),
    (["share", C, "-o", "o.onnx", "--json", "."], ".: is a folder"),
    (["share", C, "-o", "o.onnx", "--json", "./o.onnx"], "is also a model of this command"),
    (["share", "m.onnx", "-o", "o.onnx", "--json", "m.onnx"], "is also a model of this command"),
    (["inspect", "m.onnx", "--json", "m.onnx"], "is also a model of this command"),
    (["validate", "m.onnx", C, "--json", "m.onnx"], "is also a model of this command"),
    (["compress", C, "-o", "f.py", "--recipe", "f.py"], "f.py: is also the recipe or data"),
    (["compress", C, "-o", "o.onnx", "--recipe", "f.py", "--json", "f.py"], "f.py: is also the recipe or data"),
    (["compress", C, "-o", "f.py", "--eval", "f.py", "--metric", "accuracy"], "f.py: is also the recipe or data"),
    (["quantize", C, "-o", "f.py", "--mode", "static", "--calibration", "f.py"], "f.py: is also the recipe or data"),
    (["validate", C, C, "--data", "f.py", "--json", "f.py"], "f.py: is also the recipe or data"),
    (["share", C, "-o", "/dev/null"], "/dev/null: is not a regular file"),
    (["share", C, "-o", "n" * 241], "the name is too long"),
    (["share", C, "-o", os.fsdecode(b"\xff.onnx")], "not valid UTF-8"),
    (["share", C, "-o", "o.onnx", "--nonesuch"], "--nonesuch"),
    (["prune", C, "-o", "o.onnx", "--sparsity", "1.5"], "sparsity must be at most 1.0, not 1.5"),
    (["prune", C, "-o", "o.onnx", "--sparsity", "-0.5"], "sparsity must be at least 0.0, not -0.5"),
    (["prune", C, "-o", "o.onnx", "--sparsity", "nan"], "sparsity must be at least 0.0, not nan"),
    (["prune", C, "-o", "o.onnx", "--sparsity", "half"], "'half' is not a valid float"),
    (["prune", C, "-o", "o.onnx", "--scope", "all"], "'global', 'layer'"),
    (["prune", C, "-o", "o.onnx", "--sparsity", "1.0"], "leaves no weight of the model; give a share below 1"),
    (["quantize", C, "-o", "o.onnx"], "'--mode'"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static"], "needs data: --calibration"),
    (["quantize", C, "-o", "o.onnx", "--mode", "dynamic", "--method", "minmax"], "--method belongs to --mode static"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static", "--calibration", "none.npz"], "none.npz"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static", "--calibration", "m.onnx"], "m.onnx"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static", "--calibration", E, "--map", "image"], "write KEY=INPUT"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static", "--calibration", E, "--map", "a=image"], "'a'"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static", "--calibration", E, "--map", "image=b"], "'b'"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static", "--calibration", E, "--target", "tpu"], "'tensorrt'"),
    (["quantize", C, "-o", "o.onnx", "--mode", "static", "--calibration", "f.py:none"], "f.py"),
    (["compress", C, "-o", "o.onnx", "--recipe", "smal"], "did you mean 'small'"),
    (["compress", C, "-o", "o.onnx", "--recipe", "broken.yaml"], "broken.yaml: is not YAML"),
    (["compress", C, "-o", "o.onnx", "--recipe", "."], "neither a file nor a built-in recipe"),
    (["compress", C, "-o", "o.onnx", "--recipe", "binary.yaml"], "binary.yaml: cannot be read"),
    (["compress", C, "-o", "o.onnx", "--recipe", "int8-static"], "--calibration DATA"),
    (["compress", C, "-o", "o.onnx", "--eval", E], "needs a metric"),
    (["compress", C, "-o", "o.onnx", "--metric", "accuracy"], "needs data: --eval"),
    (["compress", C, "-o", "o.onnx", "--max-drop", "0.1"], "--max-drop is the budget of a metric"),
    (["compress", C, "-o", "o.onnx", "--eval", E, "--metric", "acuracy"], "did you mean 'accuracy'"),
    (["compress", C, "-o", "o.onnx", "--eval", E, "--metric", "f.py:none"], "f.py"),
    (["compress", C, "-o", "o.onnx", "--eval", E, "--metric", "raises.py:raises"], "raises"),
    (["compress", C, "-o", "o.onnx", *JUDGED, "--max-drop", "-1"], "at least 0"),
    (["compress", C, "-o", "o.onnx", *JUDGED, "--output", "nowhere"], "nowhere"),
    (["compress", C, "-o", "o.onnx", *JUDGED, "--labels", "nowhere"], "nowhere"),
    (["compress", C, "-o", "o.onnx", *JUDGED, "--preprocess", "nowhere.yaml"], "nowhere.yaml"),
    (["validate", C, "nowhere.onnx"], "nowhere.onnx: no such file"),
    (["validate", C], "'COMPRESSED'"),
    (["validate", C, "m.onnx"], "image"),
    (["validate", C, C, "--metric", "accuracy"], "needs data"),
    (["validate", C, C, "--max-drop", "0.1"], "--metric"),
    (["validate", C, C, "--provider", "tpu"], "tpu"),
    (["inspect", "nowhere.onnx"], "nowhere.onnx: no such file"),
    (["inspect", "text.onnx"], "text.onnx: is text"),
    (["compres"], "Did you mean 'compress'?"),
    (["frobnicate"], "Commands: compress"),
    (["--nonesuch"], "--nonesuch"),
]


S = ["distill", C, C, "-o", "o.onnx"]
N = ["train", C, "-o", "o.onnx"]
T = str(split("digits_cnn", "train"))

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
    (["distill", "five.onnx", "m.onnx", "-o", "o.onnx", "--data", "x.npz"], "they do not fit"),
    (["distill", C, C, "-o", "o.onnx", "--data", T, "--output", "nowhere"], "has no such output, only logits"),
    (["distill", "trees.onnx", "trees.onnx", "-o", "o.onnx", "--data", "x.npz"], "nothing in it can be trained"),
    (["train", "trees.onnx", "-o", "o.onnx", "--data", "x.npz"], "nothing in it can be trained"),
    ([*S, "--data", T, "--include", "nothing*"], "nothing in it can be trained: 62 x not selected"),
    (["train", "shape.onnx", "-o", "o.onnx", "--data", "x.npz"], "has no output that can be learned"),
    ([*S, "--data", T, "--epochs", "0"], "--epochs"),
    ([*S, "--data", T, "--batch", "0"], "--batch"),
    ([*S, "--data", T, "--lr", "0"], "--lr"),
    ([*S, "--data", T, "--lr", "nan"], "--lr"),
    ([*S, "--data", T, "--weight-decay", "inf"], "--weight-decay"),
    ([*S, "--data", T, "--temperature", "-1"], "--temperature"),
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
    (["compress", C, "-o", "o.onnx", "--recipe", "rate.yaml"], "lr must be above 0, not 0"),
]


def _training_files(folder: pathlib.Path) -> None:
    """Models and data in which something does not fit."""
    with np.load(split("digits_cnn", "train")) as stored:
        image, y = stored["image"][:40], stored["y"][:40]
    np.savez(folder / "inputless.npz", picture=image, y=y)
    np.savez(folder / "wide.npz", image=np.repeat(image, 2, axis=-1), y=y)
    np.savez(folder / "beyond.npz", image=image, y=np.where(np.arange(40) == 3, 10, y))
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
    (folder / "rate.yaml").write_text("passes: [distill: {lr: 0}]")


@pytest.mark.parametrize(
    ("arguments", "words"), TRAINING_MISTAKES, ids=lambda v: " ".join(v)[-60:] if isinstance(v, list) else ""
)
def test_a_mistake_in_a_training_is_one_line_too(
    arguments: list[str], words: str, here: pathlib.Path, capsys: Capture
) -> None:
    _training_files(here)
    test_a_mistake_is_one_line_exit_2_and_nothing_written(arguments, words, here, capsys)


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
    assert "the data holds values that are not finite" in err
    kept = re.search(r"the last good state is kept in (\S+?);", err)
    assert kept is not None
    assert pathlib.Path(kept[1]).is_file()
    assert not (here / "o.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=lambda v: " ".join(v)[-60:] if isinstance(v, list) else ""
)
def test_a_mistake_is_one_line_exit_2_and_nothing_written(
    arguments: list[str], words: str, here: pathlib.Path, capsys: Capture
) -> None:
    (here / "o.onnx").write_bytes(b"what was there")
    (here / "text.onnx").write_text("hello")
    (here / "broken.yaml").write_text("passes: [")
    (here / "binary.yaml").write_bytes(b"\xff\xfe")
    (here / "f.py").write_text("x = 1\n")
    (here / "raises.py").write_text("def raises(outputs, labels):\n    raise ValueError('deep inside')\n")
    before = {entry: entry.read_bytes() for entry in here.rglob("*") if entry.is_file()}
    code, _, err = command(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert words in err
    assert len(err) < 600
    left = {e: e.read_bytes() for e in here.rglob("*") if e.is_file() and e.parent.name != "__pycache__"}
    assert left == before


def test_a_single_pass_that_can_touch_nothing_writes_nothing(here: pathlib.Path, capsys: Capture) -> None:
    command(capsys, "share", "m.onnx", "-o", "s.onnx", "-q")
    (here / "o.onnx").write_bytes(b"what was there")
    for arguments, why in (
        (["share", "s.onnx"], "is stored as codebook"),
        (["prune", "s.onnx"], "prune before sharing or quantizing"),
        (["prune", "m.onnx", "--sparsity", "0"], "none of its elements is among the least"),
        (["share", "m.onnx", "--include", "nothing*"], "3 x excluded"),
        (["quantize", "s.onnx", "--mode", "dynamic"], "codebook"),
    ):
        code, _, err = command(capsys, *arguments, "-o", "o.onnx", "--json", "r.json")
        assert code == 2
        assert err.count("\n") == 1
        assert re.match(r"error: [a-z-]+: can touch none of the 3 weights: ", err)
        assert why in err
        assert (here / "o.onnx").read_bytes() == b"what was there"
        assert not (here / "r.json").exists()


def test_pruning_twice_touches_nothing_the_second_time(here: pathlib.Path, capsys: Capture) -> None:
    assert command(capsys, "prune", "m.onnx", "-o", "p.onnx", "--sparsity", "0.5")[0] == 0
    code, _, err = command(capsys, "prune", "p.onnx", "-o", "p.onnx", "--sparsity", "0.5")
    assert code == 2
    assert "zero already" in err


def test_a_disk_that_is_full_leaves_what_was_there(here: pathlib.Path) -> None:
    code = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import onnxcompress.cli; onnxcompress.cli.main()"
    )
    (here / "o.onnx").write_bytes(b"what was there")
    arguments = ["share", C, "-o", "o.onnx", "-q"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "o.onnx: cannot be written" in done.stderr
    assert (here / "o.onnx").read_bytes() == b"what was there"
    assert names(here) == ["m.onnx", "o.onnx"]


def test_a_report_is_replaced_whole_and_holds_no_nan(here: pathlib.Path, capsys: Capture) -> None:
    assert plain({"a": [float("nan"), 1.5, (float("inf"),)], "b": None}) == {"a": [None, 1.5, [None]], "b": None}
    (here / "r.json").write_text("old")
    assert command(capsys, "share", "m.onnx", "-o", "o.onnx", "--json", "r.json")[0] == 0
    check_report(json.loads((here / "r.json").read_text()))
    assert names(here) == ["m.onnx", "o.onnx", "r.json"]


def test_a_report_goes_through_a_pipe_and_never_in_its_place(here: pathlib.Path, capsys: Capture) -> None:
    pipe = here / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([*PROGRAM, "inspect", "m.onnx", "-q", "--json", "pipe"]) as reporting:
        assert json.loads(pipe.read_text())["schema"] == 1
    assert reporting.returncode == 0
    assert pipe.is_fifo()
    link = here / "stdout"  # as /dev/stdout is one
    link.symlink_to("/proc/self/fd/1")
    done = subprocess.run([*PROGRAM, "inspect", "m.onnx", "-q", "--json", "stdout"], capture_output=True, check=True)
    assert json.loads(done.stdout)["schema"] == 1
    assert link.is_symlink()


# The program ------------------------------------------------------------------------------------------------------


def test_help_imports_click_alone() -> None:
    code = """
import sys
sys.argv = ["onnxcompress", "--help"]
import onnxcompress.cli
try:
    onnxcompress.cli.main()
except SystemExit as done:
    heavy = {"numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pydantic", "rich", "yaml", "importlib.metadata"}
    print("LOADED", sorted(heavy & set(sys.modules)), done.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED [] 0" in done.stdout
    for name, words in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(words[:30])}", done.stdout, re.M)


def test_every_command_explains_itself(capsys: Capture) -> None:
    for name in COMMANDS:
        code, out, err = command(capsys, name, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"Usage: onnxcompress {name} ")
        for option in ("--json", "--seed", "--threads", "--quiet", "--verbose"):
            assert option in out


def test_without_arguments_it_shows_its_help(capsys: Capture) -> None:
    code, out, err = command(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: onnxcompress [OPTIONS] COMMAND")
    assert "\n  compress " in err


def test_version(capsys: Capture) -> None:
    assert command(capsys, "--version") == (0, f"onnxcompress, version {__version__}\n", "")


def test_python_m_onnxcompress(here: pathlib.Path) -> None:
    done = subprocess.run([*PROGRAM, "inspect", "m.onnx"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6.")
    done = subprocess.run([*PROGRAM, "inspect", "none.onnx"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: none.onnx: no such file\n")


def test_streams_that_the_caller_closed_are_no_reason_to_fail(here: pathlib.Path) -> None:
    line = f"{sys.executable} -m onnxcompress share m.onnx -o o.onnx"
    for closed in (">&-", "<&- >&- 2>&-"):
        (here / "o.onnx").unlink(missing_ok=True)
        done = subprocess.run(["bash", "-c", f"{line} {closed}"], capture_output=True, text=True, check=True)
        assert set(initializers(here / "o.onnx")) >= {"bias"}, closed
        told = closed == ">&-"
        assert done.stderr == (
            "note: stdout is closed, so that what is found cannot be shown; --json FILE keeps it\n" if told else ""
        )
    quiet = subprocess.run(["bash", "-c", f"{line} -q >&-"], capture_output=True, text=True, check=True)
    assert quiet.stderr == ""


def test_a_reader_that_leaves_does_not_stop_the_work(here: pathlib.Path) -> None:
    given = ["compress", C, "-o", "o.onnx", "--recipe", "small", *JUDGED, "-v"]
    child = subprocess.Popen(
        [*PROGRAM, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline().startswith("recipe small")
    child.stdout.close()
    assert (child.wait(60), child.stderr.read()) == (0, "")
    assert accuracy("digits_cnn", here / "o.onnx") > 0.98


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
sys.path.insert(0, sys.argv.pop(1))
from onnxcompress import pipeline, registry
from tests.house import Scale, Wait
pipeline.WORTH_KEEPING = 0
kinds = {"scale": Scale, "wait": Wait}
load = registry.load
registry.load = lambda name: kinds.get(name) or load(name)
import onnxcompress.cli
onnxcompress.cli.main()
"""


@pytest.mark.parametrize(("recipe", "hint"), [("[scale, wait, scale]", True), ("[wait, scale]", False)])
def test_ctrl_c_says_what_is_left_and_exits_130(recipe: str, hint: bool, here: pathlib.Path) -> None:
    (here / "r.yaml").write_text(f"passes: {recipe}\n")
    (here / "o.onnx").write_bytes(b"what was there")
    arguments = [str(ROOT), "compress", "m.onnx", "-o", "o.onnx", "--recipe", "r.yaml"]
    environment = {**os.environ, "TEST_WAIT": "60", "TEST_RUNS": str(here / "runs"), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    deadline = time.monotonic() + 60
    work = here / ".o.onnx.work"
    while not ((work / "after.json").exists() if hint else work.exists()):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # into the pass that waits
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.count("\n") == 1
    assert err.startswith("interrupted, nothing was written")
    assert ("the same command with --resume goes on" in err) is hint
    assert (here / "o.onnx").read_bytes() == b"what was there"
    assert work.exists() is hint
    if hint:
        environment["TEST_WAIT"] = "0"
        command_line = [sys.executable, "-c", SLOW, *arguments, "--resume"]
        done = subprocess.run(command_line, env=environment, capture_output=True, text=True, check=True)
        assert "scale (resumed): " in done.stdout
        assert (here / "runs").read_text().count("scale") == 2
        assert not work.exists()


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


@pytest.mark.parametrize("with_what", [signal.SIGINT, signal.SIGKILL])
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
    if with_what == signal.SIGINT:
        assert child.returncode == 130
        said = "interrupted, nothing was written; the same command with --resume goes on from the last epoch\n"
        assert err == said
    assert not (here / "o.onnx").exists()
    assert command(capsys, *given, "--resume", "--json", "r.json", "-q") == (0, "", "")
    assert len(json.loads((here / "r.json").read_text())["epochs"]) <= 8
    given[given.index("o.onnx")] = "whole.onnx"
    assert command(capsys, *given, "-q") == (0, "", "")
    assert (here / "o.onnx").read_bytes() == (here / "whole.onnx").read_bytes()
    assert names(here) == ["cut.onnx", "m.onnx", "o.onnx", "r.json", "whole.onnx", "x.npz"]


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
    assert names(here) == ["m.onnx", "s.onnx", "x.npz"]


def test_progress_is_a_bar_on_a_terminal_lines_in_a_log_nothing_when_quiet(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(progress(True), Silent)
    lines = progress(False)
    clock = iter([0.0, 5.0, 11.0, 12.0, 25.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    lines.start("weight-sharing", 8)
    for _ in range(4):
        lines.step()
    lines.done()
    assert capsys.readouterr() == (
        "",
        "weight-sharing: 2 of 8, about 33 s left\nweight-sharing: 4 of 8, about 25 s left\n",
    )
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress(False)
    bar.done()  # before anything began
    bar.start("a", 2)
    bar.step()
    bar.start("b", 2)  # the pass before it failed without an end
    bar.done()
    bar.done()


def test_log_of_a_run_holds_no_control_characters(here: pathlib.Path) -> None:
    given = ["compress", C, "-o", "o.onnx", "--recipe", "small", *JUDGED]
    done = subprocess.run([*PROGRAM, *given], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 717_713, 90_500_000, 3_000_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "718 kB",
        "90.5 MB",
        "3 GB",
    ]


def test_external_data_goes_along(here: pathlib.Path, capsys: Capture) -> None:
    proto = two_layers()
    onnx.save(proto, here / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    code, _, _ = command(capsys, "prune", "e.onnx", "-o", "o.onnx", "--json", "r.json")
    assert code == 0
    report = json.loads((here / "r.json").read_text())
    assert report["bytes_before"] == (here / "e.onnx").stat().st_size + (here / "e.bin").stat().st_size
    loaded = onnx.load(here / "o.onnx")
    kept = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    assert sum(np.count_nonzero(kept[name]) for name in ("first", "second")) == 768
    np.testing.assert_array_equal(kept["first"][kept["first"] != 0], floats(16, 64)[kept["first"] != 0])
