"""The command line does what it says: files, figures, exit statuses, the JSON report."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.cli.report import plain, size
from tests.builders import floats
from tests.house import (
    BUNDLED_QUICK,
    MODELS,
    PROGRAM,
    accuracy,
    bundled,
    command,
    filenames,
    split,
    two_layers,
)

Capture = pytest.CaptureFixture[str]


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
    assert filenames(here) == ["m.onnx", "o.onnx", "r.json"]


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
    kilobytes = round(bundled("digits_cnn").stat().st_size / 1000)
    assert re.search(rf"^simplify: {kilobytes} kB -> 7\d\d kB, \d+\.\d s$", out, re.M)
    assert re.search(r"^weight-sharing: 7\d\d kB -> 1\d\d kB, \d+\.\d s$", out, re.M)
    assert re.search(r"touched 13 weights: 691 kB -> 1\d\d kB", out)
    assert re.search(r"left 13 weights, 4.65 kB: role 13", out)
    stated = json.loads((MODELS / "digits_cnn" / "model.json").read_text())["score"]
    scores = rf"{stated:.4f} -> (0\.99\d\d|1\.0000)"
    assert re.search(rf"score {scores}, cosine of the outputs 0\.9\d+, .*\d\.\d\d x as fast", out)
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
    assert filenames(here) == ["i.onnx", "m.onnx"]


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


def test_a_report_is_replaced_whole_and_holds_no_nan(here: pathlib.Path, capsys: Capture) -> None:
    assert plain({"a": [float("nan"), 1.5, (float("inf"),)], "b": None}) == {"a": [None, 1.5, [None]], "b": None}
    (here / "r.json").write_text("old")
    assert command(capsys, "share", "m.onnx", "-o", "o.onnx", "--json", "r.json")[0] == 0
    check_report(json.loads((here / "r.json").read_text()))
    assert filenames(here) == ["m.onnx", "o.onnx", "r.json"]


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
