"""`validate` end to end on small models made here: verdicts, errors, providers, state, interrupts."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import rich.console
from onnx import numpy_helper

from onnxcompress.contract import Silent
from onnxcompress.errors import DataError, MetricError, ModelError, OnnxCompressError
from onnxcompress.model.load import load
from onnxcompress.runtime.session import Session, open_session
from onnxcompress.validation.placement import Node
from onnxcompress.validation.samples import Samples
from onnxcompress.validation.validate import validate
from onnxcompress.validation.verdict import Verdict

LINEAR = """
<ir_version: 8, opset_import: ["" : 17]>
classifier (float[{batch}, 6] x) => (float[{batch}, 3] logits) {{ logits = MatMul(x, w) }}
"""
STATEFUL = """
<ir_version: 8, opset_import: ["" : 17]>
stream (float[1, 4] x, float[2, 1, 4] state) => (float[1, 4] y, float[2, 1, 4] stateN) {
  one = Constant<value = int64[1] {0}>()
  half = Constant<value = float {0.5}>()
  sum = ReduceSum<keepdims = 0>(state, one)
  y = Add(x, sum)
  stateN = Mul(state, half)
}
"""


def linear(folder: pathlib.Path, name: str, weight: np.ndarray, batch: str = "N") -> pathlib.Path:
    model = onnx.parser.parse_model(LINEAR.format(batch=batch))
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    onnx.save(model, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A classifier that is right in about 90 %, one a little off, one ruined, and 1200 samples."""
    folder = tmp_path_factory.mktemp("task")
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((6, 3))
    x = generator.standard_normal((1200, 6)).astype(np.float32)
    y = (x @ weight + 0.4 * generator.standard_normal((1200, 3))).argmax(axis=1)
    np.savez(folder / "eval.npz", x=x, y=y)
    np.savez(folder / "bare.npz", x=x)
    off = weight + 0.001 * generator.standard_normal((6, 3))
    return {
        "folder": folder,
        "x": x,
        "y": y,
        "weight": weight,
        "good": linear(folder, "good.onnx", weight),
        "near": linear(folder, "near.onnx", off),
        "bad": linear(folder, "bad.onnx", weight[:, ::-1].copy()),
        "data": folder / "eval.npz",
        "bare": folder / "bare.npz",
    }


def test_itself_passes_with_no_difference(task: dict[str, Any]) -> None:
    found = validate(task["good"], task["good"], data=task["data"], metric="accuracy", max_drop=0.01)
    assert found.verdict is Verdict.PASS
    assert found.passed
    assert found.same_bytes
    (output,) = found.agreement
    assert (output.bit_equal, output.max_abs, output.cosine, output.elements) == (True, 0.0, 1.0, 3600)
    assert found.score is not None
    assert found.score.original == found.score.compressed
    expected = (task["x"].astype(np.float64) @ task["weight"]).argmax(axis=1) == task["y"]
    assert found.score.original == pytest.approx(expected.mean(), abs=1 / 1200)
    assert (found.samples, found.calls, found.score.n) == (1200, 38, 1200)
    assert found.size.ratio == 1.0
    assert found.size.original == task["good"].stat().st_size
    assert found.latency is not None
    assert 0.3 < found.latency.ratio < 3
    assert found.latency.batch == 32


def test_a_small_change_passes_and_a_ruined_model_fails(task: dict[str, Any]) -> None:
    near = validate(task["good"], task["near"], data=task["data"], metric="accuracy", max_drop=0.01, latency=False)
    assert near.verdict is Verdict.PASS
    assert not near.agreement[0].bit_equal
    assert near.agreement[0].cosine == pytest.approx(1, abs=1e-5)
    bad = validate(task["good"], task["bad"], data=task["data"], metric="accuracy", max_drop=0.01, latency=False)
    assert bad.verdict is Verdict.FAIL
    assert "above the budget of 0.01" in bad.reasons[0]
    assert bad.score is not None
    assert bad.score.lower is not None
    assert bad.score.lower > 0.3


def test_result_as_json_and_table(task: dict[str, Any]) -> None:
    found = validate(task["good"], task["near"], data=task["data"], metric="accuracy", providers=("cpu", "cuda"))
    text = json.dumps(found.to_json(), allow_nan=False)
    assert next(iter(json.loads(text))) == "schema"
    assert json.loads(text)["schema"] == 1
    assert json.loads(text)["verdict"] == found.verdict.value
    assert json.loads(text)["agreement"][0]["name"] == "logits"
    same = validate(task["good"], task["good"], data=task["data"], latency=False)
    assert same.to_json()["agreement"][0]["sqnr_db"] is None
    console = rich.console.Console(file=io.StringIO(), width=150)
    found.to_table(console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for word in ("size", "accuracy", "latency", "output logits", "cosine", "provider cpu", "no budget was given"):
        assert word in shown
    assert shown.strip().splitlines()[-1] == found.verdict.value


def test_a_provider_that_did_not_run_fails(task: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = validate(task["good"], task["good"], data=task["data"], providers=("qnn",), latency=False)
    assert found.verdict is Verdict.FAIL
    assert (found.providers[0].provider, found.providers[0].ran) == ("qnn", False)
    assert found.reasons[0].startswith("provider qnn did not run: provider qnn is not in the installed onnxruntime")
    with pytest.raises(OnnxCompressError, match="unknown execution provider 'foo'"):
        validate(task["good"], task["good"], providers=("foo",))
    # A session that lists the provider but gives it no node is a silent CPU run.
    monkeypatch.setattr(
        "onnxcompress.validation.validate.open_session",
        lambda model, provider, **rest: open_session(model, provider="cpu", **rest),
    )
    found = validate(task["good"], task["good"], data=task["data"], providers=("cuda",), latency=False)
    assert found.verdict is Verdict.FAIL
    assert found.providers[0].reason == "took no node of this model (CPUExecutionProvider: 1)"


def test_questions_that_cannot_be_asked(task: dict[str, Any]) -> None:
    good = task["good"]
    for arguments, error, words in (
        ({"metric": "accuracy", "max_drop": 0.01}, MetricError, "needs data with labels"),
        ({"data": task["bare"], "metric": "accuracy"}, MetricError, "needs labels"),
        ({"data": task["data"], "max_drop": 0.01}, MetricError, "say which"),
        ({"data": task["data"], "metric": "accuracy", "max_drop": -1.0}, MetricError, "at least 0"),
        ({"data": task["data"], "output": "logits"}, MetricError, "say which metric"),
        ({"data": task["data"], "metric": "accuracy", "output": "probs"}, MetricError, "only logits"),
        ({"data": task["folder"] / "none.npz"}, DataError, "no such file"),
    ):
        with pytest.raises(error, match=words) as caught:
            validate(good, good, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no such file"):
        validate(good, task["folder"] / "none.onnx")


def test_models_that_cannot_stand_in(task: dict[str, Any]) -> None:
    model = onnx.load(task["good"])
    renamed = onnx.parser.parse_model(LINEAR.format(batch="N").replace("logits", "scores"))
    renamed.graph.initializer.extend(model.graph.initializer)
    with pytest.raises(ModelError, match="has no output 'logits' as the original has; it has: scores"):
        validate(task["good"], renamed)
    wider = onnx.parser.parse_model(LINEAR.format(batch="N").replace("6", "5"))
    wider.graph.initializer.append(numpy_helper.from_array(np.ones((5, 3), np.float32), "w"))
    with pytest.raises(ModelError, match="'x' is"):
        validate(task["good"], wider)


def test_other_output_shapes_fail_and_do_not_crash(task: dict[str, Any]) -> None:
    model = onnx.parser.parse_model(LINEAR.format(batch="N").replace("3]", "K]"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((6, 4), np.float32), "w"))
    found = validate(task["good"], model, data=task["data"], metric="accuracy", max_drop=0.1, latency=False)
    assert found.verdict is Verdict.FAIL
    assert "shape [32, 3] in the original, [32, 4] in the compressed model" in found.reasons[0]
    assert found.score is None


def test_nan_fails(task: dict[str, Any]) -> None:
    weight = task["weight"].copy()
    weight[0, 0] = np.nan
    spoilt = linear(task["folder"], "nan.onnx", weight)
    found = validate(task["good"], spoilt, data=task["data"], latency=False)
    assert found.verdict is Verdict.FAIL
    assert "1,200 values of 3,600 are NaN or Inf" in found.reasons[0]


def test_made_up_inputs_say_so(task: dict[str, Any]) -> None:
    found = validate(task["good"], task["near"], latency=False)
    assert (found.verdict, found.inputs, found.score) == (Verdict.PASS, "synthetic", None)
    assert any("made-up inputs" in reason for reason in found.reasons)


def test_in_memory_models_and_limit(task: dict[str, Any]) -> None:
    model = load(task["good"])
    found = validate(model, task["near"].read_bytes(), data={"x": task["x"]}, limit=100, latency=False)
    assert (found.samples, found.same_bytes) == (100, False)
    assert found.size.original == pytest.approx(task["good"].stat().st_size, abs=40)
    assert validate(model, model, data={"x": task["x"]}, latency=False).same_bytes


def test_a_fixed_batch_is_filled_and_cut(task: dict[str, Any]) -> None:
    fixed = linear(task["folder"], "fixed.onnx", task["weight"], batch="16")
    found = validate(fixed, task["near"], data=task["data"], metric="accuracy", limit=100, latency=False)
    assert found.score is not None
    assert (found.samples, found.calls, found.score.n, found.agreement[0].elements) == (100, 7, 100, 300)
    few = validate(fixed, task["near"], data=task["data"], metric="accuracy", limit=5, latency=False)
    assert few.agreement[0].elements == 15
    # The other way round: the original is free, the compressed model is not.
    back = validate(task["near"], fixed, data=task["data"], metric="accuracy", limit=100, latency=False)
    assert back.score is not None
    assert (back.score.compressed, back.agreement[0].elements) == (found.score.original, 300)


def test_whole_calls_of_a_model_with_state(tmp_path: pathlib.Path) -> None:
    model = onnx.parser.parse_model(STATEFUL)
    generator = np.random.default_rng(0)
    data = {
        "x": generator.standard_normal((9, 1, 4)).astype(np.float32),
        "state": generator.standard_normal((9, 2, 1, 4)).astype(np.float32),
    }
    found = validate(model, model, data=data, latency=False)
    assert (found.samples, found.calls) == (9, 9)
    assert [(o.name, o.elements, o.bit_equal) for o in found.agreement] == [("y", 36, True), ("stateN", 72, True)]


def test_own_evaluator_owns_the_calls(task: dict[str, Any]) -> None:
    def right(run: Any, data: Any) -> Samples:
        found = [run(batch.feeds)["logits"].argmax(axis=1) == batch.labels for batch in data]
        return Samples.of(np.concatenate(found))

    own = validate(task["good"], task["bad"], data=task["data"], metric=right, max_drop=0.01, latency=False)
    built_in = validate(task["good"], task["bad"], data=task["data"], metric="accuracy", max_drop=0.01, latency=False)
    assert own.score is not None
    assert built_in.score is not None
    assert (own.score.metric, own.score.bound) == ("right", built_in.score.bound)
    assert own.verdict is Verdict.FAIL

    def number(run: Any, data: Any) -> float:
        return 0.5

    one = validate(task["good"], task["near"], metric=number, max_drop=0.01, latency=False)
    assert one.verdict is Verdict.INCONCLUSIVE


def test_other_float_width_is_fed_and_compared(task: dict[str, Any]) -> None:
    half = onnx.parser.parse_model(LINEAR.format(batch="N").replace("float", "float16"))
    half.graph.initializer.append(numpy_helper.from_array(task["weight"].astype(np.float16), "w"))
    found = validate(task["good"], half, data=task["data"], metric="accuracy", max_drop=0.01, latency=False)
    assert found.verdict is Verdict.PASS
    assert found.agreement[0].cosine == pytest.approx(1, abs=1e-4)


def test_interrupt_leaves_a_marked_result(task: dict[str, Any]) -> None:
    class Impatient(Silent):
        seen = 0

        def step(self, count: int = 1, now: str = "") -> None:
            self.seen += count
            if self.seen >= 320:
                raise KeyboardInterrupt

    found = validate(
        task["good"], task["near"], data=task["data"], metric="accuracy", max_drop=0.5, progress=Impatient()
    )
    assert found.partial
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.samples == 320
    assert found.score is not None
    assert found.score.n == 320
    assert found.latency is None
    assert "interrupted after 320 samples" in found.reasons[0]
    assert found.to_json()["partial"] is True


@pytest.mark.parametrize("place", ["timing.measure", "score"])
def test_a_late_interrupt_keeps_the_comparison(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupted(*given: Any, **rest: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"onnxcompress.validation.validate.{place}", interrupted)
    found = validate(task["good"], task["near"], data=task["data"], metric="accuracy", max_drop=0.01)
    assert (found.partial, found.samples, found.latency) == (True, 1200, None)
    assert any("interrupted after all samples" in reason for reason in found.reasons)
    scored = place != "score"
    assert (found.score is not None, found.verdict is Verdict.PASS) == (scored, scored)


def test_one_pass_over_the_data(task: dict[str, Any]) -> None:
    passes = 0

    def batches() -> Any:
        nonlocal passes
        passes += 1
        for at in range(0, 64, 8):
            yield {"x": task["x"][at : at + 8], "y": task["y"][at : at + 8]}

    found = validate(task["good"], task["near"], data=batches, metric="accuracy", latency=False)
    assert found.samples == 64
    # One to see that the first batch fits, one to run.
    assert passes <= 2


def test_labels_by_another_name(task: dict[str, Any]) -> None:
    data: Mapping[str, Any] = {"x": task["x"], "target": task["y"]}
    found = validate(task["good"], task["near"], data=data, labels="target", metric="accuracy", latency=False)
    assert found.score is not None
    assert found.score.n == 1200


def test_a_provider_that_took_nodes_is_compared_and_may_still_fail(
    task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxcompress.validation.placement.placed", lambda session: [Node("n", "MatMul", "cuda")])
    monkeypatch.setattr("onnxcompress.validation.placement.executed", lambda profile: {"cuda": 1})
    sessions: list[Session] = []

    def opened(model: Any, provider: str, **rest: Any) -> Session:
        sessions.append(open_session(model, provider="cpu", **rest))
        return sessions[-1]

    monkeypatch.setattr("onnxcompress.validation.validate.open_session", opened)
    arguments: dict[str, Any] = {"data": task["data"], "providers": ("cuda",), "latency": False}
    found = validate(task["good"], task["good"], **arguments)
    (row,) = found.providers
    assert (row.ran, row.nodes, row.reason, row.agreement[0].elements) == (True, {"cuda": 1}, None, 3600)
    assert (row.macs, row.kernels, row.fell_back) == ({"cuda": 1.0}, {"cuda": 1}, ())
    assert found.verdict is Verdict.PASS
    # Given nodes, and executed by the CPU all the same (an engine that failed, say).
    with monkeypatch.context() as patch:
        patch.setattr("onnxcompress.validation.placement.executed", lambda profile: {"cpu": 1})
        silent = validate(task["good"], task["good"], **arguments)
    assert silent.verdict is Verdict.FAIL
    assert silent.reasons[0] == (
        "provider cuda did not run: was given nodes and executed none of them (kernels that ran: cpu: 1)"
    )

    def fails(feeds: Any, outputs: Any = None) -> Any:
        raise ModelError("out of device memory")

    def opened_to_fail(model: Any, provider: str, **rest: Any) -> Session:
        session = opened(model, provider, **rest)
        if provider == "cuda":
            monkeypatch.setattr(session, "run", fails)
        return session

    monkeypatch.setattr("onnxcompress.validation.validate.open_session", opened_to_fail)
    found = validate(task["good"], task["good"], **arguments)
    assert found.verdict is Verdict.FAIL
    assert found.reasons[0] == "provider cuda did not run: out of device memory"
