"""The benchmark that compares engines says who ran, who differs, and who could not run."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from tests.house import ROOT, two_layers

SCRIPT = ROOT / "benchmarks" / "engines.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not in this copy")


@pytest.fixture(scope="module")
def engines() -> Any:
    spec = importlib.util.spec_from_file_location("engines", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["engines"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def task(engines: Any, tmp_path: pathlib.Path) -> Any:
    model = tmp_path / "m.onnx"
    model.write_bytes(two_layers().SerializeToString())
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros(64, np.int64))
    return engines.Task("small", model, tmp_path / "d.npz", tmp_path / "d.npz")


def _given(*engine: str) -> argparse.Namespace:
    return argparse.Namespace(python=[], engine=list(engine), samples=64, max_drop=0.1, timeout=100)


def test_engines_that_agree_and_one_that_is_not_here(
    engines: Any, task: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines.compare(task, "itself", task.model, _given("cpu", "exact", "openvino"), tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert "| cpu | PASS |" in out[0]
    assert "| exact | PASS |" in out[1]
    assert "| openvino | not run |" in out[2]
    assert "openvino is not in the installed onnxruntime" in out[2]
    assert out[3] == "  -> the same on cpu, exact: PASS; not run: openvino"


def test_an_engine_that_differs_is_named(
    engines: Any, task: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = {"original": 1.0, "compressed": 0.5, "bound": 0.6, "lower": 0.4, "max_drop": 0.1}
    said = engines.Said(engines._verdict(score), "", engines._figures(score))
    monkeypatch.setattr(engines, "elsewhere", lambda *_: said)
    assert not engines.compare(task, "itself", task.model, _given("cpu", "qnn"), tmp_path)
    assert "DIFFERS from cpu (PASS): qnn: FAIL (1.0000 -> 0.5000" in capsys.readouterr().out
    assert engines._verdict({**score, "bound": 0.1}) == "PASS"
    assert engines._verdict({**score, "lower": 0.05}) == "INCONCLUSIVE"
