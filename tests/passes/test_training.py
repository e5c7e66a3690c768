"""Training as a pass of a recipe: where the teacher comes from, what stays fixed, and going on from its middle."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnxcompress as oc
from onnxcompress import api, pipeline
from onnxcompress.contract import Coverage, Reason, Run, Select
from onnxcompress.errors import DataError, ModelError, PassError
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.passes.distill import Distill
from onnxcompress.passes.finetune import Finetune
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.recipe import Recipe
from onnxcompress.resume import Workplace
from onnxcompress.training import loop
from tests.builders import floats
from tests.house import ROOT, Bad, bundled, split
from tests.training.small import arrays, mlp, outputs

PRUNE = MagnitudePruning(sparsity=0.6)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with model.onnx (6 -> 200 -> 4), and x.npz of inputs alone, xy.npz with labels."""
    monkeypatch.setattr(pipeline, "WORTH_KEEPING", 0)
    (tmp_path / "model.onnx").write_bytes(mlp().SerializeToString())
    np.savez(tmp_path / "x.npz", x=arrays(256)["x"])
    np.savez(tmp_path / "xy.npz", x=arrays(256)["x"], y=arrays(256)["y"])
    return tmp_path


def distance(of: Any, folder: pathlib.Path) -> float:
    """How far the outputs of a model are from the original's."""
    given = {"x": arrays(256)["x"]}
    truth, now = (outputs(load(m), given)["z"] for m in (folder / "model.onnx", of))
    return float(np.abs(truth - now).mean())


# The teacher ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_model_before_the_first_pass(folder: pathlib.Path) -> None:
    cut = oc.compress(folder / "model.onnx", [PRUNE])
    healed = oc.compress(folder / "model.onnx", [PRUNE, Distill(epochs=15, batch=16)], calibration=folder / "x.npz")
    assert distance(healed.model, folder) < 0.4 * distance(cut.model, folder)
    for before, after in zip(weights(cut.model), weights(healed.model), strict=True):
        if before.encoding.kind == "masked":
            np.testing.assert_array_equal(after.array()[before.array() == 0], 0)


def test_a_model_in_memory_needs_no_file_for_its_teacher(folder: pathlib.Path) -> None:
    recipe = [PRUNE, Distill(epochs=2, batch=16)]
    data = folder / "x.npz"
    from_file = oc.compress(folder / "model.onnx", recipe, calibration=data).model
    from_memory = oc.compress(mlp(), recipe, calibration=data).model
    for a, b in zip(weights(from_file), weights(from_memory), strict=True):
        np.testing.assert_array_equal(a.array(), b.array())


def test_passes_see_the_original_and_cannot_change_it_for_the_next(folder: pathlib.Path) -> None:
    seen: list[tuple[ir.Model | None, float]] = []

    class Look(MagnitudePruning):
        def apply(self, model: ir.Model, run: Run) -> Coverage:
            assert run.original is not None
            seen.append((run.original, float(np.abs(weights(run.original)[0].array()).min())))
            return super().apply(model, run)

    oc.compress(folder / "model.onnx", [Look(sparsity=0.5), Look(sparsity=0.7)])
    (first, least), (second, still) = seen
    assert first is second
    assert least == still > 0


def test_another_teacher_is_named(folder: pathlib.Path) -> None:
    other = mlp()
    other.graph.initializer[3].raw_data = (floats(4, seed=4) + 3).astype(np.float32).tobytes()
    (folder / "other.onnx").write_bytes(other.SerializeToString())
    recipe = [Distill(teacher=str(folder / "other.onnx"), epochs=10, batch=16, lr=1e-2)]
    done = oc.compress(folder / "model.onnx", recipe, calibration=folder / "x.npz")
    given = {"x": arrays(256)["x"]}
    theirs = outputs(other, given)["z"]
    assert (
        np.abs(outputs(done.model, given)["z"] - theirs).mean()
        < 0.3 * np.abs(theirs - outputs(mlp(), given)["z"]).mean()
    )
    with pytest.raises(ModelError, match=r"nowhere\.onnx: no such file"):
        oc.compress(folder / "model.onnx", [PRUNE, Distill(teacher="nowhere.onnx")], calibration=folder / "x.npz")
    with pytest.raises(PassError, match="give `teacher: FILE`"):
        Distill().apply(load(mlp()), Run(work=folder))


# The data ---------------------------------------------------------------------------------------------------------


def test_data_is_asked_for_before_the_first_pass_runs(folder: pathlib.Path) -> None:
    for kind in (Distill, Finetune):
        with pytest.raises(DataError, match=rf"{kind.name} trains and needs data: .* or --calibration DATA"):
            oc.compress(folder / "model.onnx", [Bad(how="raises"), kind()])
        with pytest.raises(DataError, match=r"nowhere\.npz: no such file"):
            oc.compress(folder / "model.onnx", [Bad(how="raises"), kind(data="nowhere.npz")])
    np.savez(folder / "other.npz", image=floats(4, 6))
    with pytest.raises(DataError, match="'x'"):
        oc.compress(folder / "model.onnx", [Bad(how="raises"), Distill(data=str(folder / "other.npz"))])


def test_own_data_is_read_as_the_run_reads_its_own(folder: pathlib.Path) -> None:
    given = arrays(256)
    np.savez(folder / "named.npz", inputs=given["x"], truth=given["y"])
    reading = api.DataOptions(labels="truth", mapping={"inputs": "x"})
    named = [Finetune(data=str(folder / "named.npz"), epochs=2)]
    plain = [Finetune(data=str(folder / "xy.npz"), epochs=2)]
    a = oc.compress(folder / "model.onnx", named, data_options=reading).model
    b = oc.compress(folder / "model.onnx", plain).model
    for one, other in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(one.array(), other.array())


def test_labels_alone_train(folder: pathlib.Path) -> None:
    done = oc.compress(folder / "model.onnx", [Finetune(epochs=30, lr=1e-2)], calibration=folder / "xy.npz")
    given = arrays(256)
    right = [(outputs(load(m), {"x": given["x"]})["z"].argmax(1) == given["y"]).mean() for m in (mlp(), done.model)]
    assert right[0] < 0.5
    assert right[1] > 0.9
    with pytest.raises(DataError, match="needs labels"):
        oc.compress(folder / "model.onnx", [Finetune()], calibration=folder / "x.npz")


def test_what_counts_of_a_file_is_what_it_holds(folder: pathlib.Path) -> None:
    def digest(name: str) -> str:
        return Recipe.load([Distill(data=str(folder / name))]).digest()

    before = digest("x.npz")
    (folder / "copy.npz").write_bytes((folder / "x.npz").read_bytes())
    assert digest("copy.npz") == before != digest("xy.npz")
    out = folder / "o.onnx"
    oc.compress(folder / "model.onnx", [Distill(data=str(folder / "x.npz"), epochs=1)], out=out)
    assert str(folder).encode() not in out.read_bytes()
    assert b"x.npz" not in out.read_bytes()


# A recipe that heals twice ----------------------------------------------------------------------------------------


def test_prune_distill_share_distill(folder: pathlib.Path) -> None:
    data, out = split("digits_cnn", "train"), folder / "o.onnx"
    judged: dict[str, Any] = {"evaluate": split("digits_cnn", "eval"), "metric": "accuracy"}
    steps = ["simplify", {"magnitude-pruning": {"sparsity": 0.8}}, {"distill": {"epochs": 1}}, "weight-sharing"]
    done = oc.compress(bundled("digits_cnn"), [*steps, {"distill": {"epochs": 1}}], calibration=data, out=out, **judged)
    scores = [step.score for step in done.steps]
    assert all(score is not None for score in scores)
    simplified, cut, healed, _, last = (score or 0.0 for score in scores)
    assert cut < simplified - 0.1
    assert min(healed, last) > simplified - 0.2 * (simplified - cut)
    assert done.ratio < 0.2
    kinds = {w.key: w for w in weights(load(out)) if w.encoding.kind == "codebook"}
    assert len(kinds) == 13
    zeros = sum(int((w.array() == 0).sum()) for w in kinds.values())
    assert zeros >= 0.79 * sum(w.size for w in kinds.values())


def test_every_weight_is_touched_or_left_with_its_reason() -> None:
    given = Distill(epochs=1, select=Select(exclude=("fc*", "*bias")))
    (step,) = oc.compress(bundled("digits_cnn"), given, calibration=split("digits_cnn", "calib")).steps
    held = {weight.key: weight for weight in oc.weights(oc.load(bundled("digits_cnn")))}
    assert step.coverage.keys() == held.keys()
    reasons = {entry.key: (entry.reason, entry.detail) for entry in step.coverage.left}
    for key, weight in held.items():
        if not given.select.allows(weight):
            assert reasons[key] == (Reason.EXCLUDED, "not selected")
        elif key.endswith((".norm.mean", ".norm.variance")):
            assert reasons[key] == (Reason.ROLE, "running statistics, measured and not learned")
        else:
            assert key not in reasons
    assert all(touched.error > 0 for touched in step.coverage.touched)
    assert step.coverage.rewrites == {"training steps": len_of("calib") // 32}


def len_of(part: str) -> int:
    with np.load(split("digits_cnn", part)) as stored:
        return len(stored["image"])


# An evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_what_made_the_score_worse_is_not_kept(metric: str, sparsity: float | None, folder: pathlib.Path) -> None:
    x = arrays(64)["x"]
    z = outputs(mlp(), {"x": x})["z"]
    np.savez(folder / "eval.npz", x=x, y=z.argmax(-1) if metric == "accuracy" else z)
    np.savez(folder / "wrong.npz", x=x, y=(z.argmax(-1) + 1) % 4)
    wrong = Finetune(data=str(folder / "wrong.npz"), epochs=5, lr=0.1, sparsity=sparsity)
    done = oc.compress(folder / "model.onnx", [wrong], evaluate=folder / "eval.npz", metric=metric)
    (step,) = done.steps
    if sparsity is None:
        (said,) = step.coverage.warnings
        assert said.startswith(f"what was learned is not kept: the score went from {1 - (metric == 'mse'):.4f} to ")
        assert {(entry.reason, entry.detail) for entry in step.coverage.left} == {(Reason.WORSE, said)}
        assert not step.coverage.changed
        for before, after in zip(weights(load(mlp())), weights(done.model), strict=True):
            np.testing.assert_array_equal(before.array(), after.array())
    else:  # what it would go back to is not pruned
        assert step.coverage.changed


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
def test_what_made_the_score_better_is_kept_whichever_way_the_metric_counts(metric: str, folder: pathlib.Path) -> None:
    x = arrays(64)["x"]
    z = outputs(mlp(), {"x": x})["z"]
    np.savez(folder / "eval.npz", x=x, y=z.argmax(-1) if metric == "accuracy" else z)
    recipe = [MagnitudePruning(sparsity=0.9), Distill(epochs=15, batch=16)]
    given: dict[str, Any] = {"evaluate": folder / "eval.npz", "metric": metric}
    step = oc.compress(folder / "model.onnx", recipe, calibration=folder / "x.npz", **given).steps[1]
    assert step.coverage.changed
    assert step.score is not None
    assert step.score_before is not None
    assert step.score > step.score_before if metric == "accuracy" else step.score < step.score_before


# An interrupted training ------------------------------------------------------------------------------------------

CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import onnxcompress as oc
from onnxcompress import pipeline
from onnxcompress.training import loop
pipeline.WORTH_KEEPING = float(sys.argv[5])
loop.SAVED_EVERY = 0.05
update = loop.Loop._update
loop.Loop._update = lambda *given: (update(*given), time.sleep(0.005))  # slow enough to be caught
oc.compress(sys.argv[2], sys.argv[4], out=sys.argv[3], calibration=sys.argv[6])
"""

RECIPE = """
passes:
  - magnitude-pruning: {sparsity: 0.6}
  - distill: {epochs: 10, batch: 8}
  - weight-sharing: {bits: 4}
  - distill: {epochs: 20, batch: 8, lr: 0.0005}
"""


@pytest.mark.parametrize(("which", "worth"), [(0, 0.0), (1, 0.0), (1, 1e9)])
def test_killed_within_a_training_it_goes_on_to_the_same_bytes(
    which: int, worth: float, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, recipe, data = (folder / name for name in ("model.onnx", "o.onnx", "r.yaml", "x.npz"))
    recipe.write_text(RECIPE)
    child = subprocess.Popen([sys.executable, "-c", CHILD, ROOT, model, out, recipe, str(worth), data])
    work, deadline = folder / ".o.onnx.work", time.monotonic() + 60
    seen: list[pathlib.Path] = []
    while len(seen) <= which:
        assert child.poll() is None
        assert time.monotonic() < deadline
        seen += [path for path in work.glob("state.*") if (path / "training.npz").is_file() and path not in seen]
    time.sleep(random.uniform(0, 0.2))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    kept = work / "after.json"
    finished = len(json.loads(kept.read_text())["steps"]) if kept.exists() else 0

    update, count = loop.Loop._update, 0

    def counted(self: loop.Loop, *arguments: Any) -> None:
        nonlocal count
        count += 1
        update(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_update", counted)
    done = oc.compress(model, recipe, out=out, calibration=data, resume=True)
    resumed, count = count, 0
    assert [step.resumed for step in done.steps] == [at < finished for at in range(4)]
    oc.compress(model, recipe, out=folder / "whole.onnx", calibration=data)
    assert count == 10 * 32 + 20 * 32
    assert resumed < (20 * 32 if finished >= 2 else count)
    assert out.read_bytes() == (folder / "whole.onnx").read_bytes()
    assert not work.exists()


def test_another_training_does_not_go_on_from_it(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out, data = folder / "model.onnx", folder / "o.onnx", folder / "x.npz"
    monkeypatch.setattr(loop, "SAVED_EVERY", 0.0)
    update, left, count = loop.Loop._update, 10**9, 0

    def limited(self: loop.Loop, *arguments: Any) -> None:
        nonlocal left, count
        left, count = left - 1, count + 1
        if left < 0:
            raise KeyboardInterrupt
        update(self, *arguments)

    monkeypatch.setattr(loop.Loop, "_update", limited)
    other = folder / "other.npz"
    np.savez(other, x=floats(256, 6, seed=9))
    settings: list[tuple[Any, Any, dict[str, Any]]] = [
        (Distill(epochs=2), data, {"seed": 1}),
        (Distill(epochs=3), data, {}),
        (Distill(epochs=2, temperature=3), data, {}),
        (Distill(epochs=2), other, {}),
        (Distill(epochs=2, data=str(other)), data, {}),
        (Finetune(epochs=2), folder / "xy.npz", {}),
    ]
    for last, calibration, options in settings:
        left = 5
        with pytest.raises(KeyboardInterrupt):
            oc.compress(model, [PRUNE, Distill(epochs=2)], out=out, calibration=data)
        assert Workplace(Workplace.folder_for(out), {}).resumable
        left, count = 10**9, 0
        oc.compress(model, [PRUNE, last], out=out, calibration=calibration, resume=True, **options)
        assert count == 8 * last.epochs, last
    left = 5
    with pytest.raises(KeyboardInterrupt):
        oc.compress(model, [PRUNE, Distill(epochs=2)], out=out, calibration=data)
    left, count = 10**9, 0
    oc.compress(model, [PRUNE, Distill(epochs=2)], out=out, calibration=data, resume=True)
    assert count == 16 - 5


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_update", stop)
    monkeypatch.setattr(pipeline, "WORTH_KEEPING", 60)
    before = sorted(os.listdir(folder))
    with pytest.raises(KeyboardInterrupt):
        oc.compress(folder / "model.onnx", [PRUNE, Distill()], out=folder / "o.onnx", calibration=folder / "x.npz")
    assert sorted(os.listdir(folder)) == before


def test_a_training_that_fails_may_be_skipped(folder: pathlib.Path) -> None:
    given = arrays(64)
    given["x"][40] = np.nan
    np.savez(folder / "nan.npz", x=given["x"], y=given["y"])
    recipe = {"passes": ["magnitude-pruning", {"finetune": {"data": str(folder / "nan.npz"), "on_error": "skip"}}]}
    done = oc.compress(folder / "model.onnx", recipe, out=folder / "o.onnx")
    assert "the loss is nan" in (done.steps[1].skipped or "")
    assert not (folder / ".o.onnx.work").exists()
