"""A mistake is one clear line and exit status 2, and nothing is written."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.house import (
    bundled,
    command,
    filenames,
    refused,
    split,
)

Capture = pytest.CaptureFixture[str]

C = str(bundled("digits_cnn"))
E = str(split("digits_cnn", "eval"))
T = str(split("digits_cnn", "train"))
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


@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=lambda v: " ".join(v)[-60:] if isinstance(v, list) else ""
)
def test_a_mistake_is_one_line_exit_2_and_nothing_written(
    arguments: list[str], words: str, here: pathlib.Path, capsys: Capture
) -> None:
    (here / "broken.yaml").write_text("passes: [")
    (here / "binary.yaml").write_bytes(b"\xff\xfe")
    (here / "f.py").write_text("x = 1\n")
    (here / "raises.py").write_text("def raises(outputs, labels):\n    raise ValueError('deep inside')\n")
    refused(here, capsys, arguments, words)


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
    assert filenames(here) == ["m.onnx", "o.onnx"]
