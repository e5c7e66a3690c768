"""The program around the commands: help, streams, interrupts, progress."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from onnxcompress import __version__
from onnxcompress.cli import COMMANDS
from onnxcompress.cli.progress import progress
from onnxcompress.contract import Silent
from tests.house import (
    PROGRAM,
    ROOT,
    accuracy,
    bundled,
    command,
    initializers,
    split,
)

Capture = pytest.CaptureFixture[str]

C = str(bundled("digits_cnn"))
E = str(split("digits_cnn", "eval"))
T = str(split("digits_cnn", "train"))
JUDGED = ["--eval", E, "--metric", "accuracy"]


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
