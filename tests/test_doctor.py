"""`doctor`: what runs, what does not and why, what mends it; and the exit status."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from onnxcompress import doctor as module
from onnxcompress.cli.doctor_command import command
from onnxcompress.doctor import doctor
from onnxcompress.errors import RuntimeUnavailable
from onnxcompress.runtime import nvidia, obstacles, session
from onnxcompress.runtime.obstacles import Obstacle


@pytest.fixture
def fresh() -> Iterator[None]:
    session.onnxruntime.cache_clear()
    yield
    session.onnxruntime.cache_clear()


def test_this_machine_runs_the_cpu() -> None:
    found = doctor()
    assert found.works
    assert found.problem is None
    assert found.version == session.onnxruntime().__version__
    assert found.builds[next(iter(found.builds))] == found.version
    assert found.providers[0] == module.ProviderState("cpu", True)
    assert found.cpu.cores == len(os.sched_getaffinity(0))
    assert found.cpu.memory is not None
    assert found.cpu.memory_free is not None
    assert 0 < found.cpu.memory_free < found.cpu.memory
    assert "cpu" not in found.absent
    assert "azure" not in {state.name for state in found.providers}
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["works"] is True
    assert next(iter(json.loads(text))) == "schema"


def test_a_provider_that_does_not_start_is_told_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = session.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(obstacles, "obstacle", lambda ort, name: Obstacle("libfoo.so.1 is missing", "get foo"))
    real = session.open_session

    def opened(model: Any, provider: str, **rest: Any) -> Any:
        if provider == "CUDAExecutionProvider":
            raise RuntimeUnavailable("did not start")
        return real(model, provider=provider, **rest)

    monkeypatch.setattr(module, "open_session", opened)
    state = next(state for state in doctor().providers if state.name == "cuda")
    assert (state.runs, state.reason, state.mend) == (False, "libfoo.so.1 is missing", "get foo")
    # A session that comes up, and runs the product on the CPU.
    monkeypatch.setattr(module, "open_session", lambda model, provider, **rest: real(model, provider="cpu", **rest))
    state = next(state for state in doctor().providers if state.name == "cuda")
    assert (state.runs, state.reason) == (False, "starts, but does not take a float MatMul")


@pytest.mark.usefixtures("fresh")
def test_two_builds_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution
    with monkeypatch.context() as patch:
        patch.setattr(session, "_BUILDS", ("onnxruntime", "onnxruntime-gpu"))
        patch.setattr(importlib.metadata, "distribution", lambda name: real("numpy"))
        patch.setattr(importlib.metadata, "version", lambda name: "1.0")
        found = doctor()
    assert not found.works
    assert found.builds == {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    assert found.problem is not None
    assert "onnxruntime and onnxruntime-gpu are both installed" in found.problem
    assert found.mend == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxcompress[gpu]'"
    with monkeypatch.context() as patch:
        patch.setattr(module, "installed", list)
        patch.setattr(module, "onnxruntime", lambda: types.SimpleNamespace())
        found = doctor()
    assert (found.works, found.mend) == (False, "pip install 'onnxcompress[cpu]'")
    assert found.problem is not None
    assert "left by a build that was removed" in found.problem
    monkeypatch.setattr(module, "installed", lambda: ["onnxruntime"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9")
    found = doctor()
    assert found.works
    assert found.mend == "pip install --force-reinstall --no-deps onnxruntime==0.9"


def test_command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "doctor.json"
    done = CliRunner().invoke(command, ["--json", str(path), "-v"], standalone_mode=False)
    assert done.return_value == 0
    shown = done.output.splitlines()
    assert shown[0].startswith(f"onnxruntime {session.onnxruntime().__version__} (")
    assert any(line.split() == ["cpu", "runs"] for line in shown)
    assert json.loads(path.read_text())["cpu"]["kind"] in done.output
    none = module.Health(
        builds={},
        version=None,
        problem="not installed",
        mend="pip install it",
        cpu=doctor().cpu,
        gpu=nvidia.Driver("x"),
    )
    monkeypatch.setattr("onnxcompress.cli.doctor_command.doctor", lambda: none)
    done = CliRunner().invoke(command, [], standalone_mode=False)
    assert done.return_value == 1
    assert "  mend: pip install it" in done.output.splitlines()
