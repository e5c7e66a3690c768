"""A run that was killed goes on from its last pass and ends in the same bytes; anything else starts over."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import onnxcompress as oc
from onnxcompress import pipeline
from onnxcompress.contract import Coverage, Pass, Run
from onnxcompress.errors import PassError, SaveError
from onnxcompress.passes.weight_sharing import WeightSharing
from onnxcompress.recipe import Recipe, Step
from onnxcompress.resume import Workplace
from tests.builders import floats
from tests.house import ROOT, Bad, Scale, Wait, bundled, initializers, split, two_layers, untouched

PASSES: list[Pass] = [Scale(factor=0.5), Scale(factor=0.25), WeightSharing(bits=4)]

CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import onnxcompress as oc
from onnxcompress import pipeline
from onnxcompress.passes.weight_sharing import WeightSharing
from tests.house import Scale, Wait
pipeline.WORTH_KEEPING = 0
oc.compress(sys.argv[2], [Scale(factor=0.5), Wait(), WeightSharing(bits=4)], out=sys.argv[3])
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with model.onnx; every pass is worth keeping, and its runs are counted in the file `runs`."""
    monkeypatch.setattr(pipeline, "WORTH_KEEPING", 0)
    monkeypatch.setenv("TEST_RUNS", str(tmp_path / "runs"))
    (tmp_path / "model.onnx").write_bytes(two_layers().SerializeToString())
    return tmp_path


def runs(folder: pathlib.Path) -> list[str]:
    """The runs since this was last asked."""
    file = folder / "runs"
    told = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return told


def interrupted(folder: pathlib.Path, passes: list[Pass], **options: object) -> None:
    """A run of `passes` that ends before the last of them."""
    with pytest.raises(PassError):
        oc.compress(folder / "model.onnx", [*passes, Bad(how="raises")], out=folder / "out.onnx", **options)  # type: ignore[arg-type]
    assert Workplace.folder_for(folder / "out.onnx").is_dir()
    runs(folder)


def test_killed_and_resumed_is_the_same_as_never_killed(folder: pathlib.Path) -> None:
    model, out, work = folder / "model.onnx", folder / "out.onnx", folder / ".out.onnx.work"
    out.write_bytes(b"what was there before")
    environment = {**os.environ, "TEST_WAIT": "60"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, ROOT, model, out], env=environment)
    deadline = time.monotonic() + 60
    while not (work / "after.json").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert out.read_bytes() == b"what was there before"
    assert runs(folder) == ["scale 0.5"]

    passes = [Scale(factor=0.5), Wait(), WeightSharing(bits=4)]
    done = oc.compress(model, passes, out=out, resume=True)
    assert runs(folder) == []
    assert [step.resumed for step in done.steps] == [True, False, False]
    assert not work.exists()

    whole = oc.compress(model, passes, out=folder / "whole.onnx")
    assert runs(folder) == ["scale 0.5"]
    assert (folder / "whole.onnx").read_bytes() == out.read_bytes()
    kept, fresh = done.steps[0].to_json(), whole.steps[0].to_json()
    assert kept["touched"] == fresh["touched"]
    assert kept["left"] == fresh["left"]
    assert kept["bytes_after"] == fresh["bytes_after"]


def test_only_what_is_left_runs(folder: pathlib.Path) -> None:
    interrupted(folder, PASSES[:2])
    done = oc.compress(folder / "model.onnx", PASSES, out=folder / "out.onnx", resume=True)
    assert runs(folder) == []
    assert [step.resumed for step in done.steps] == [True, True, False]
    oc.compress(folder / "model.onnx", PASSES, out=folder / "again.onnx")
    assert (folder / "out.onnx").read_bytes() == (folder / "again.onnx").read_bytes()


def test_without_resume_it_starts_over(folder: pathlib.Path) -> None:
    interrupted(folder, PASSES[:2])
    oc.compress(folder / "model.onnx", PASSES, out=folder / "out.onnx")
    assert runs(folder) == ["scale 0.5", "scale 0.25"]
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "out.onnx"]


def test_resume_with_nothing_to_resume_is_a_run(folder: pathlib.Path) -> None:
    oc.compress(folder / "model.onnx", PASSES, out=folder / "out.onnx", resume=True)
    assert runs(folder) == ["scale 0.5", "scale 0.25"]


def test_another_recipe_seed_target_or_preference_does_not_resume(folder: pathlib.Path) -> None:
    model, out = folder / "model.onnx", folder / "out.onnx"
    changed: list[dict[str, object]] = [{"seed": 1}, {"target": "portable"}, {"prefer": "speed"}]
    for options in changed:
        interrupted(folder, PASSES[:2])
        oc.compress(model, PASSES, out=out, resume=True, **options)  # type: ignore[arg-type]
        assert runs(folder) == ["scale 0.5", "scale 0.25"], options
    interrupted(folder, PASSES[:2])
    oc.compress(model, [Scale(factor=0.5), Scale(factor=0.125), PASSES[2]], out=out, resume=True)
    assert runs(folder) == ["scale 0.5", "scale 0.125"]
    interrupted(folder, PASSES[:2])
    oc.compress(model, PASSES[:1], out=out, resume=True)
    assert runs(folder) == ["scale 0.5"]
    interrupted(folder, PASSES[:2])
    oc.compress(model, Recipe(tuple(Step(p, "skip") for p in PASSES)), out=out, resume=True)
    assert runs(folder) == ["scale 0.5", "scale 0.25"]


def test_the_same_model_elsewhere_resumes_and_another_there_does_not(folder: pathlib.Path) -> None:
    interrupted(folder, PASSES[:2])
    (folder / "model.onnx").rename(folder / "moved.onnx")
    oc.compress(folder / "moved.onnx", PASSES, out=folder / "out.onnx", resume=True)
    assert runs(folder) == []
    (folder / "moved.onnx").rename(folder / "model.onnx")

    interrupted(folder, PASSES[:2])
    other = two_layers()
    other.graph.initializer[2].raw_data = floats(8, seed=7).tobytes()
    (folder / "model.onnx").write_bytes(other.SerializeToString())
    oc.compress(folder / "model.onnx", PASSES, out=folder / "out.onnx", resume=True)
    assert runs(folder) == ["scale 0.5", "scale 0.25"]
    np.testing.assert_array_equal(initializers(folder / "out.onnx")["bias"], floats(8, seed=7) / 8)


def test_a_model_changed_in_memory_does_not_resume(folder: pathlib.Path) -> None:
    out = folder / "out.onnx"
    for change in (False, True):
        model = oc.load(folder / "model.onnx")
        with pytest.raises(PassError):
            oc.compress(model, [*PASSES[:2], Bad(how="raises")], out=out)
        runs(folder)
        if change:
            model.graph.initializers["bias"].const_value = ir.tensor(floats(8, seed=7), name="bias")
        oc.compress(model, PASSES, out=out, resume=True)
        assert runs(folder) == (["scale 0.5", "scale 0.25"] if change else [])


def test_other_data_does_not_resume(folder: pathlib.Path) -> None:
    model, out, data = folder / "model.onnx", folder / "out.onnx", folder / "data.npz"
    np.savez(data, x=floats(4, 16), y=np.arange(4))
    interrupted(folder, PASSES[:2], calibration=data, evaluate=data, metric="accuracy")
    np.savez_compressed(folder / "same.npz", x=floats(4, 16), y=np.arange(4))
    same = folder / "same.npz"
    done = oc.compress(model, PASSES, out=out, calibration=same, evaluate=same, metric="accuracy", resume=True)
    assert runs(folder) == []
    assert [step.score for step in done.steps][:2] != [None, None]

    np.savez(folder / "other.npz", x=floats(4, 16, seed=1), y=np.arange(4))
    for options in (
        {"calibration": folder / "other.npz", "evaluate": data, "metric": "accuracy"},
        {"calibration": data, "evaluate": folder / "other.npz", "metric": "accuracy"},
        {"calibration": data, "evaluate": data, "metric": "top5"},
        {"evaluate": data, "metric": "accuracy"},
        {"calibration": data},
        {},
    ):
        interrupted(folder, PASSES[:2], calibration=data, evaluate=data, metric="accuracy")
        oc.compress(model, PASSES, out=out, resume=True, **options)
        assert runs(folder) == ["scale 0.5", "scale 0.25"], options


@pytest.mark.parametrize("harm", ["text", "cut", "no model", "cut model", "other key", "wrong reason", "list", "empty"])
def test_a_state_that_is_broken_is_no_state(harm: str, folder: pathlib.Path) -> None:
    interrupted(folder, PASSES[:2])
    state, model = (folder / ".out.onnx.work" / name for name in ("after.json", "after.onnx"))
    content = json.loads(state.read_text())
    match harm:
        case "text":
            state.write_text("not JSON")
        case "cut":
            state.write_bytes(state.read_bytes()[:100])
        case "no model":
            model.unlink()
        case "cut model":
            model.write_bytes(model.read_bytes()[:500])
        case "other key":
            state.write_text(json.dumps({**content, "key": "0" * 64}))
        case "wrong reason":
            content["steps"][0]["left"] = [{"weight": "a", "bytes": 1, "reason": "mood", "detail": ""}]
            state.write_text(json.dumps(content))
        case "list":
            state.write_text("[]")
        case "empty":
            state.write_text("")
    done = oc.compress(folder / "model.onnx", PASSES, out=folder / "out.onnx", resume=True)
    assert runs(folder) == ["scale 0.5", "scale 0.25"]
    assert not any(step.resumed for step in done.steps)
    oc.compress(folder / "model.onnx", PASSES, out=folder / "again.onnx")
    assert (folder / "out.onnx").read_bytes() == (folder / "again.onnx").read_bytes()


def test_the_kept_model_of_another_state_is_never_taken(folder: pathlib.Path) -> None:
    interrupted(folder, PASSES[:2])
    model = folder / ".out.onnx.work" / "after.onnx"
    other = two_layers()
    other.graph.initializer[2].raw_data = floats(8, seed=7).tobytes()
    model.write_bytes(other.SerializeToString())
    oc.compress(folder / "model.onnx", PASSES, out=folder / "out.onnx", resume=True)
    assert runs(folder) == ["scale 0.5", "scale 0.25"]


def test_a_short_run_keeps_nothing(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "WORTH_KEEPING", 60)
    with pytest.raises(PassError):
        oc.compress(folder / "model.onnx", [*PASSES, Bad(how="raises")], out=folder / "out.onnx")
    assert not (folder / ".out.onnx.work").exists()


def test_quantization_resumes_to_the_same_bytes(folder: pathlib.Path) -> None:
    passes = ["simplify", Bad(how="raises"), "static-quantization"]
    settings: dict[str, object] = {"calibration": split("digits_cnn", "calib")}
    model, out = bundled("digits_cnn"), folder / "out.onnx"
    with pytest.raises(PassError, match="bad: raised KeyError"):
        oc.compress(model, passes, out=out, **settings)  # type: ignore[arg-type]
    done = oc.compress(model, ["simplify", "static-quantization"], out=out, resume=True, **settings)  # type: ignore[arg-type]
    assert [step.resumed for step in done.steps] == [True, False]
    oc.compress(model, ["simplify", "static-quantization"], out=folder / "whole.onnx", **settings)  # type: ignore[arg-type]
    assert out.read_bytes() == (folder / "whole.onnx").read_bytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(Pass):
    """Works in two halves and keeps the first; is interrupted between them the first time."""

    name: ClassVar[str] = "halves"
    size: int = 1

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        assert run.state is not None
        half = run.state / "half"
        SEEN.append(half.read_text() if half.exists() else "nothing")
        if not half.exists():
            half.write_text(f"half of {self.size}")
            raise KeyboardInterrupt
        return Coverage(left=untouched(model))


SEEN: list[str] = []


def test_a_pass_finds_the_state_it_left_and_no_other(folder: pathlib.Path) -> None:
    def run(size: int, resume: bool, *before: Pass) -> list[str]:
        SEEN.clear()
        with contextlib.suppress(KeyboardInterrupt):
            oc.compress(folder / "model.onnx", [*before, Halves(size=size)], out=folder / "out.onnx", resume=resume)
        return SEEN

    work = folder / ".out.onnx.work"
    assert run(1, False) == ["nothing"]
    assert Workplace(work, {}).resumable
    assert run(1, True) == ["half of 1"]
    assert not work.exists()
    for size, resume, before, found in (
        (1, False, (), "nothing"),  # a run without --resume starts over
        (2, True, (), "nothing"),  # other parameters
        (2, True, (Scale(factor=0.5),), "nothing"),  # other passes before
        (2, True, (Scale(factor=0.5),), "half of 2"),
    ):
        assert run(size, resume, *before) == [found]
    assert not work.exists()


def test_without_an_output_no_state_is_kept(folder: pathlib.Path) -> None:
    with pytest.raises(PassError, match="AssertionError"):
        oc.compress(folder / "model.onnx", [Halves()])


def test_targets_that_can_never_be_written_are_refused_before_the_work(folder: pathlib.Path) -> None:
    with pytest.raises(SaveError, match="is a folder; name a file in it"):
        oc.compress(folder / "model.onnx", PASSES, out=folder)
    with pytest.raises(SaveError, match="nowhere does not exist; create it"):
        oc.compress(folder / "model.onnx", PASSES, out=folder / "nowhere" / "out.onnx")
    assert runs(folder) == []


def test_a_second_run_with_the_same_output_is_refused_and_the_first_goes_on(folder: pathlib.Path) -> None:
    model, out, again = folder / "model.onnx", folder / "out.onnx", []

    def meanwhile(_: object) -> None:
        with pytest.raises(SaveError, match=r"out\.onnx: another run is writing it") as refused:
            oc.compress(model, PASSES, out=out)
        again.append(refused)
        assert (folder / ".out.onnx.work").is_dir()

    oc.compress(model, PASSES, out=out, on_step=meanwhile)
    assert len(again) == len(PASSES)
    assert not (folder / ".out.onnx.work").exists()
    first = out.read_bytes()
    oc.compress(model, PASSES, out=out)
    assert out.read_bytes() == first
