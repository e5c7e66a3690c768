"""After each pass the pipeline asserts that it was honest and that its result holds; what does not hold is undone."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxcompress as oc
from onnxcompress import proof
from onnxcompress.contract import Coverage, Left, Needs, Pass, Reason, Run, Touched
from onnxcompress.encodings import Dense
from onnxcompress.errors import DataError, OnnxCompressError, PassError
from onnxcompress.model.limits import DEFAULT
from onnxcompress.model.save import to_bytes
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.passes.simplify import Simplify
from onnxcompress.passes.weight_sharing import WeightSharing
from onnxcompress.pipeline import check_coverage
from onnxcompress.recipe import Recipe, Step
from tests.builders import floats, graph, info, model, node, opened, run, tensors
from tests.house import BUNDLED_QUICK, Bad, Scale, bundled, initializers, split, two_layers, untouched

X = {"x": floats(5, 16, seed=9)}


def skipping(*passes: Pass) -> Recipe:
    return Recipe(tuple(Step(p, "skip") for p in passes))


# Honesty ----------------------------------------------------------------------------------------------------------

FAULTS = {
    "raises": "bad: cannot treat this model",
    "has a bug": "bad: raised KeyError: 'nowhere' (at house.py:",
    "forgets": "bad: does not say what it did to 1 weights, 'bias' among them",
    "counts twice": "bad: accounts for the weight 'first' more than once",
    "invents": "bad: speaks of a weight 'third' that the model does not have",
    "not finite": "bad: output 'y' of what it made holds ",
    "other shape": "bad: output 'y' of what it made does not fit the original's",
    "loses an output": "bad: ",
    "unknown operator": "bad: what it made is not valid ONNX",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_pass_that_fails_stops_the_run_with_its_name(how: str, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(PassError) as caught:
        oc.compress(two_layers(), [Scale(), Bad(how=how), Scale()], out=out)
    assert str(caught.value).startswith(FAULTS[how])
    assert list(tmp_path.iterdir()) == []  # no output, no work folder


@pytest.mark.parametrize("how", [*FAULTS, "grows"])
def test_with_skip_its_work_is_undone_and_the_rest_runs(how: str) -> None:
    done = oc.compress(two_layers(), skipping(Scale(factor=0.5), Bad(how=how), Scale(factor=0.5)))
    clean = oc.compress(two_layers(), [Scale(factor=0.5), Scale(factor=0.5)])
    assert to_bytes(done.model) == to_bytes(clean.model)
    assert [step.skipped is not None for step in done.steps] == [False, True, False]
    undone = done.steps[1]
    assert undone.bytes_after == undone.bytes_before
    assert {(x.key, x.bytes) for x in undone.coverage.left} == {("first", 4096), ("second", 2048), ("bias", 32)}
    reason = Reason.TOO_SMALL if how == "grows" else Reason.FAILED
    assert {x.reason for x in undone.coverage.left} == {reason}
    assert undone.coverage.touched == []
    assert undone.proof is None
    assert undone.coverage.warnings == [f"undone: {undone.skipped}"]
    assert not undone.coverage.changed


def test_a_result_larger_than_before_is_undone_without_on_error() -> None:
    done = oc.compress(two_layers(), [Bad(how="grows"), Scale()])
    assert "would make the file larger" in (done.steps[0].skipped or "")
    assert "ballast" not in initializers(to_bytes(done.model))
    np.testing.assert_array_equal(initializers(to_bytes(done.model))["first"], floats(16, 64) / 2)


def test_running_out_of_memory_is_no_fault_of_a_pass() -> None:
    with pytest.raises(MemoryError):
        oc.compress(two_layers(), skipping(Bad(how="runs out of memory")))


def test_account_of_a_pass() -> None:
    before = {"a": 4, "b": 8}
    check_coverage(Scale(), before, Coverage([Touched("a", 4, 1)], [Left("b", 8, Reason.ROLE)]))
    for wrong in (
        Coverage([Touched("a", 4, 1)], []),
        Coverage([Touched("a", 4, 1), Touched("b", 8, 1)], [Left("b", 8, Reason.ROLE)]),
        Coverage([Touched("a", 4, 1), Touched("c", 8, 1)], [Left("b", 8, Reason.ROLE)]),
    ):
        with pytest.raises(PassError, match="a bug of the pass"):
            check_coverage(Scale(), before, wrong)


@pytest.mark.parametrize("name", BUNDLED_QUICK)
def test_every_installed_pass_accounts_for_every_weight(name: str) -> None:
    passes = ["simplify", "magnitude-pruning", "weight-sharing", "dynamic-quantization"]
    for chosen in (*passes, "static-quantization"):
        keys = {weight.key for weight in oc.weights(oc.load(bundled(name)))}
        done = oc.compress(bundled(name), [chosen], calibration=split(name, "calib"))
        step = done.steps[0]
        told = [t.key for t in step.coverage.touched] + [x.key for x in step.coverage.left]
        assert sorted(told) == sorted(keys)
        assert step.skipped is None
        assert step.bytes_after <= step.bytes_before


# What holds around a pass -----------------------------------------------------------------------------------------


def test_the_given_model_is_not_changed() -> None:
    proto = two_layers()
    before = proto.SerializeToString(deterministic=True)
    loaded = opened(two_layers())
    image = to_bytes(loaded)
    passes = [Simplify(), MagnitudePruning(), WeightSharing(bits=2)]
    for source in (proto, loaded):
        done = oc.compress(source, passes)
        assert len(done.model.functions) == 1
    assert proto.SerializeToString(deterministic=True) == before
    assert to_bytes(loaded) == image


def test_functions_are_there_when_needed_and_gone_when_not() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unshare(Pass):
        name: ClassVar[str] = "unshare"

        def apply(self, model: ir.Model, run: Run) -> Coverage:
            coverage = Coverage()
            for weight in oc.weights(model):
                new = Dense(weight.array().copy())
                coverage.touched.append(Touched(weight.key, weight.nbytes, new.nbytes))
                weight.replace(new)
            model.doc_string = ""
            return coverage

    proto = two_layers()
    shared = oc.compress(proto, [WeightSharing(bits=4, granularity="tensor")])
    assert [f.name for f in shared.model.functions.values()] == ["Depalettize4"]
    proto.doc_string = "x" * 10_000  # so that dense weights do not make the file larger
    dense = oc.compress(proto, [WeightSharing(bits=4, granularity="tensor"), Unshare()])
    assert dense.steps[1].skipped is None
    assert not dense.model.functions
    assert "onnxcompress" not in dense.model.opset_imports
    np.testing.assert_array_equal(run(to_bytes(dense.model), X)[0], run(to_bytes(shared.model), X)[0])


def test_the_same_bytes_for_any_number_of_threads() -> None:
    passes = [Simplify(), MagnitudePruning(sparsity=0.3), WeightSharing(bits=4)]
    for name in ("digits_cnn", "digits_gru"):
        found = {
            hashlib.sha256(to_bytes(oc.compress(bundled(name), passes, threads=threads).model)).hexdigest()
            for threads in (1, 1, 3)
        }
        assert len(found) == 1


def test_a_pass_sees_the_conditions_of_the_run(tmp_path: pathlib.Path) -> None:
    seen: list[Run] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(Pass):
        name: ClassVar[str] = "look"

        def apply(self, model: ir.Model, run: Run) -> Coverage:
            seen.append(run)
            assert run.work.is_dir()
            assert run.evaluate is None
            return Coverage(left=untouched(model))

    recipe = dataclasses.replace(Recipe.load([Look()]), target="portable", seed=3, prefer="speed")
    oc.compress(two_layers(), recipe, threads=2)
    oc.compress(two_layers(), recipe, target="cuda", seed=0, prefer="size", out=tmp_path / "o.onnx")
    oc.compress(two_layers(), [Look()])
    assert [(r.target, r.seed, r.prefer, r.threads) for r in seen] == [
        ("portable", 3, "speed", 2),
        ("cuda", 0, "size", 1),
        ("cpu", 0, "size", 1),
    ]
    assert not any(r.work.exists() for r in seen)
    assert seen[0].generator("a").integers(1 << 30) == seen[0].generator("a").integers(1 << 30)
    assert seen[0].generator("a").integers(1 << 30) != seen[0].generator("b").integers(1 << 30)
    assert seen[0].generator("a").integers(1 << 30) != seen[1].generator("a").integers(1 << 30)


def test_calibration_is_asked_for_before_anything_runs(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="static-quantization measures activations and needs data"):
        oc.compress(two_layers(), [Bad(how="raises"), "static-quantization"], out=tmp_path / "o.onnx")


def test_a_pass_that_needs_a_newer_opset_gets_it_or_says_why() -> None:
    opsets: list[int] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Newer(Scale):
        name: ClassVar[str] = "newer"
        needs: ClassVar[Needs] = Needs(opset=21)

        def apply(self, model: ir.Model, run: Run) -> Coverage:
            opsets.append(model.opset_imports[""])
            return super().apply(model, run)

    done = oc.compress(two_layers(opset=13), [Newer(factor=1.0)])
    assert opsets == [21]
    np.testing.assert_array_equal(run(to_bytes(done.model), X)[0], run(two_layers().SerializeToString(), X)[0])
    oc.compress(two_layers(opset=22), [Newer()])
    assert opsets == [21, 22]

    call = node("Twice", ["y0"], ["y"], domain="test")
    body = two_layers(opset=13)
    body.graph.node[-1].output[0] = "y0"
    body.graph.node.append(call)
    imports = [onnx.helper.make_opsetid("", 13)]
    twice = onnx.helper.make_function("test", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], imports)
    body.functions.append(twice)
    body.opset_import.append(onnx.helper.make_opsetid("test", 1))
    with pytest.raises(PassError, match="newer: needs opset 21, the model has 13 and cannot be lifted: it defines"):
        oc.compress(body, [Newer()])


def test_a_model_that_does_not_run_is_refused_before_any_pass() -> None:
    broken = two_layers()
    broken.graph.initializer[0].CopyFrom(tensors(first=floats(17, 64))[0])
    with pytest.raises(OnnxCompressError):
        oc.compress(broken, [Scale()])


def test_outputs_that_were_never_finite_may_stay_so() -> None:
    body = graph(
        [node("MatMul", ["x", "w"], ["a"]), node("Log", ["a"], ["y"])],
        [info("x", ["n", 16])],
        [info("y", ["n", 64])],
        tensors(w=floats(16, 64)),
    )
    done = oc.compress(model(body), [Scale(factor=2.0)])
    assert done.steps[0].proof is not None


def test_a_large_model_is_proved_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "DEFAULT", dataclasses.replace(DEFAULT, inline_bytes=1000))
    good = oc.compress(two_layers(), [Scale(), Simplify()])  # the last pass changes nothing
    assert [step.proof is not None for step in good.steps] == [True, False]
    good = oc.compress(two_layers(), [Scale(), Bad(how="grows")])  # the last pass is undone
    assert [step.proof is not None for step in good.steps] == [True, False]
    with pytest.raises(PassError, match=r"bad, scale: output 'y' .* not finite"):
        oc.compress(two_layers(), [Bad(how="not finite"), Scale(factor=1.0)])


def test_the_proof_compares_with_the_original_not_with_the_step_before() -> None:
    done = oc.compress(two_layers(), [MagnitudePruning(sparsity=0.6), Scale(factor=1.0)])
    first, second = (step.proof for step in done.steps)
    assert first is not None
    assert second is not None
    assert first.cosine == pytest.approx(second.cosine)
    assert 0.5 < (second.cosine or 0) < 0.99
    assert second.inputs == "synthetic"


def test_calibration_data_is_what_the_proof_runs_on(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "calib.npz", x=floats(3, 16))
    done = oc.compress(two_layers(), [Scale()], calibration=tmp_path / "calib.npz")
    assert done.steps[0].proof is not None
    assert done.steps[0].proof.inputs == "data"


def test_a_pass_of_onnx_ir_runs_and_is_accounted_for() -> None:
    proto = two_layers()
    proto.graph.node.insert(0, node("Identity", ["x"], ["x2"], name="same"))
    proto.graph.node[1].input[0] = "x2"
    path = "onnx_ir.passes.common:IdentityEliminationPass"
    done = oc.compress(proto, [path])
    step = done.steps[0]
    assert step.name == path
    assert step.coverage.rewrites == {"IdentityEliminationPass": 1}
    assert {x.key for x in step.coverage.left} == {"first", "second", "bias"}
    assert len(onnx.load_from_string(to_bytes(done.model)).graph.node) == 4
    again = oc.compress(done.model, [path])
    assert again.steps[0].coverage.rewrites == {"IdentityEliminationPass": 0}
    assert not again.steps[0].coverage.changed


def test_a_pass_of_onnx_ir_that_removes_a_weight_says_so() -> None:
    proto = two_layers()
    proto.graph.initializer.extend(tensors(unused=floats(100)))
    done = oc.compress(proto, ["onnx_ir.passes.common:RemoveUnusedNodesPass"])
    assert [(t.key, t.bytes_before, t.bytes_after) for t in done.steps[0].coverage.touched] == [("unused", 400, 0)]
    assert {x.reason for x in done.steps[0].coverage.left} == {Reason.UNTOUCHED}


def test_progress_and_steps_are_told_as_they_happen() -> None:
    told: list[Any] = []

    class Told:
        def start(self, what: str, total: int, done: int = 0) -> None:
            told.append((what, total))

        def step(self, count: int = 1, now: str = "") -> None:
            told.append(count)

        def done(self) -> None:
            told.append("done")

    passes = [WeightSharing(bits=2), Scale()]
    oc.compress(two_layers(), passes, progress=Told(), on_step=lambda step: told.append(step.name))
    assert told == [("weight-sharing", 3), 1, 1, 1, "done", "weight-sharing", "scale"]
