"""Ctrl-C on the command line: exit status 130, and a report of what was measured, marked partial."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

LINEAR = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 6] x) => (float[N, 3] logits) { logits = MatMul(x, w) }"""

DATA = """
import os, signal
import numpy as np

def batches():
    generator = np.random.default_rng(0)
    for at in range(400):
        if at == {at} and os.environ.get("INTERRUPT"):
            os.kill(os.getpid(), signal.SIGINT)
        yield {{"x": generator.standard_normal((16, 6)).astype(np.float32), "y": generator.integers(0, 3, 16)}}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_an_interrupt_leaves_a_partial_report(tmp_path: pathlib.Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((6, 3))
    for name, values in (("good", weight), ("near", weight + 1e-4)):
        model = onnx.parser.parse_model(LINEAR)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), "w"))
        onnx.save(model, tmp_path / f"{name}.onnx")
    (tmp_path / "data.py").write_text(DATA.format(at=200))
    command = [sys.executable, "-m", "onnxcompress", "validate", "good.onnx", "near.onnx", "--data", "data.py:batches"]
    command += ["--metric", "accuracy", "--max-drop", "0.5", "--json", "report.json"]
    environment = {"INTERRUPT": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["partial"], report["verdict"]) == (True, "INCONCLUSIVE")
    assert 0 < report["samples"] <= 200 * 16
    assert report["score"]["n"] == report["samples"]
    assert report["agreement"][0]["elements"] == 3 * report["samples"]
    assert f"interrupted after {report['samples']:,} samples" in report["reasons"][0]
