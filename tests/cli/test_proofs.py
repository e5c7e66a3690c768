"""lint, verify and diagnose as commands: what they print, their exit status, their report."""

from __future__ import annotations

import json
import pathlib
import tempfile

import pytest
from click.testing import CliRunner

import onnxcompress as oc
from onnxcompress.cli import group
from tests.house import bundled, split

CNN, DATA = str(bundled("digits_cnn")), str(split("digits_cnn", "calib"))


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> str:
    """digits_cnn in int8."""
    out = tmp_path_factory.mktemp("static") / "out.onnx"
    oc.compress(CNN, {"passes": ["static-quantization"]}, out=out, calibration=DATA)
    return str(out)


def run(*words: str) -> tuple[int, str, dict[str, object]]:
    """Exit status, what was printed, the report."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "r.json"
        done = CliRunner().invoke(group, [*words, "--json", str(file)], standalone_mode=False)
        assert done.exception is None, done.exception
        report = json.loads(file.read_text(encoding="utf-8"))
    return done.return_value, done.output, report


def test_lint(static: str) -> None:
    code, said, report = run("lint", static, "--target", "cpu")
    assert (code, report["passed"]) == (0, True)
    assert "cpu: 0 errors" in said
    code, said, report = run("lint", static, "--target", "tensorrt")
    assert (code, report["passed"]) == (1, False)
    assert "quantized-type" in said
    assert "more (--verbose)" in said


def test_verify(static: str) -> None:
    code, said, report = run("verify", static, "--parent", CNN, "--calibration", DATA)
    assert (code, report["holds"], said.splitlines()[-1]) == (0, True, "HOLDS")
    code, said, report = run("verify", static, "--parent", str(bundled("digits_gru")))
    assert (code, report["holds"]) == (1, False)
    assert "DOES NOT HOLD" in said


def test_diagnose(static: str) -> None:
    code, said, report = run("diagnose", CNN, static, "--data", DATA, "--limit", "16")
    assert (code, report["blamed"], report["samples"]) == (0, [], 16)
    assert said.splitlines()[-1] == "no layer stands out"


def test_diagnose_tells_of_made_up_inputs(static: str) -> None:
    code, said, report = run("diagnose", CNN, static)
    assert report["inputs"] == "synthetic"
    assert "made-up sample" in said.splitlines()[0]
    assert ("made-up inputs may leave the ranges" in said) == (code == 1)
    assert run("diagnose", CNN, static, "--data", DATA, "--limit", "8")[2]["inputs"] == "data"


@pytest.mark.parametrize("command", [["train"], ["distill", CNN]])
def test_what_the_training_commands_write_holds(command: list[str], tmp_path: pathlib.Path) -> None:
    out, diagnosis = str(tmp_path / "o.onnx"), ["diagnose", CNN]
    code, _, _ = run(*command, CNN, "-o", out, "--data", DATA, "--epochs", "1", "--limit", "64", "--threads", "1")
    assert code == 0
    code, said, report = run("verify", out, "--parent", CNN)
    assert (code, report["holds"], report["problems"]) == (0, True, [])
    assert "told, not judged" in said
    code, said, report = run(*diagnosis, out, "--data", DATA, "--limit", "8")
    assert "elements differ" not in str(report["blamed"])
    assert ("note: the model was trained" in said) == (code == 1)


def test_counts_of_one_are_singular(static: str, tmp_path: pathlib.Path) -> None:
    assert run("verify", static, "--parent", static)[1].splitlines()[-1] == "DOES NOT HOLD: 1 problem"
    assert "cpu: 0 errors, " in run("lint", static)[1]
