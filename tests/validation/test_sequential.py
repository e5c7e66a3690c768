"""Early looks: the error they spend, when they decide, and that they stay off data in order."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from onnxcompress.errors import MetricError
from onnxcompress.validation.samples import Samples
from onnxcompress.validation.sequential import Order, Sequential, sizes, spent
from onnxcompress.validation.validate import validate
from onnxcompress.validation.verdict import Verdict

Bools = npt.NDArray[np.bool_]


def test_pocock_spending() -> None:
    # Lan and DeMets 1983: alpha ln(1 + (e - 1) t).
    assert spent(0) == 0
    assert spent(1) == pytest.approx(0.05)
    assert spent(0.5) == pytest.approx(0.05 * math.log(1 + (math.e - 1) / 2))
    assert spent(0.25) == pytest.approx(0.0178687, abs=1e-6)


def test_sizes_double_up_to_all_samples() -> None:
    assert sizes(2000) == [125, 250, 500, 1000, 2000]
    assert sizes(199) == [199]
    assert sizes(10_001)[-3:] == [2501, 5001, 10_001]


def looked(first: Bools, second: Bools, budget: float) -> tuple[Sequential, Any]:
    looks = Sequential("accuracy", len(first), budget)
    for seen in range(1, len(first)):
        if looks.due(seen):
            n = seen
            found = looks.look(lambda: (Samples.of(first[:n]), Samples.of(second[:n])))  # noqa: B023
            if found is not None:
                return looks, found
    return looks, looks.last((Samples.of(first), Samples.of(second)))


def test_clear_cases_stop_early_and_the_levels_add_up() -> None:
    generator = np.random.default_rng(0)
    right = generator.random(10_000) < 0.8
    looks, same = looked(right, right, 0.01)
    # z = 2.57 at the first level, 0.0051: z^2 / (n + z^2) <= 0.01 from 654 on.
    assert [look.n for look in same.looks] == [157, 313, 625, 1250]
    assert (same.n, same.decided) == (1250, True)
    assert "look 4 at 1,250 of 10,000 samples" in looks.story(True)
    _, ruined = looked(right, right & (generator.random(10_000) < 0.7), 0.01)
    assert ruined.n == 157
    assert ruined.lower > 0.01
    _, near = looked(right, right ^ (generator.random(10_000) < 0.03), 0.018)
    assert near.n == 10_000
    assert sum(look.level for look in near.looks) == pytest.approx(0.05)


def test_no_more_is_accepted_falsely() -> None:
    generator, budget, accepted, used, repetitions = np.random.default_rng(3), 0.02, 0, 0, 400
    for _ in range(repetitions):
        kind = generator.random(1600)
        first = kind < 0.85
        second = first ^ ((kind < 0.04) | (kind > 0.98))  # loses 4 %, wins 2 %: a drop of exactly the budget
        _, found = looked(first, second, budget)
        accepted += found.bound <= budget
        used += found.n
    # At most 5 %, by the union bound about 4; three standard errors of 400 draws.
    assert accepted / repetitions <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
    assert used / repetitions < 1600


def test_a_bootstrap_is_not_looked_at_early() -> None:
    generator = np.random.default_rng(2)
    loss = generator.gamma(2, 1, 2000)
    looks, sides = Sequential("mse", 2000, 0.05), (loss, loss * generator.normal(1.0, 0.01, 2000))
    for seen in (125, 250, 500):
        assert looks.due(seen)
        n = seen
        found = looks.look(lambda: (Samples.of(sides[0][:n]), Samples.of(sides[1][:n])))  # noqa: B023
        assert (found is not None) == (seen == 500)
    assert found is not None
    assert (found.method, [look.n for look in found.looks]) == ("bootstrap", [500])
    assert found.looks[0].level == pytest.approx(0.8 * spent(0.25))  # with what the looks not taken would have spent


def test_order() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 10, 1000)
    for array, ordered in (
        (labels, False),
        (np.sort(labels), True),
        (np.zeros(200, np.int64), True),
        (np.sort(labels).astype(str), True),
        (generator.standard_normal(500), False),
        (np.sort(generator.standard_normal(500)), True),
        ((generator.random(1000) < 0.02).astype(np.int64), False),
        (generator.standard_normal((500, 7)), False),
    ):
        order = Order()
        for at in range(0, len(array), 100):
            order.update(array[at : at + 100])
        assert order.found is ordered, array[:5]
    assert not Order().found


LINEAR = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 6] x) => (float[N, 3] logits) { logits = MatMul(x, w) }"""


@pytest.fixture
def task(tmp_path: pathlib.Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((6, 3))
    x = generator.standard_normal((4000, 6)).astype(np.float32)
    found: dict[str, Any] = {"x": x, "y": (x @ weight + 0.4 * generator.standard_normal((4000, 3))).argmax(axis=1)}
    for name, values in (("good", weight), ("near", weight + 1e-4), ("bad", weight[:, ::-1])):
        model = onnx.parser.parse_model(LINEAR)
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), "w"))
        found[name] = model
    return found


def run(task: dict[str, Any], other: str, **given: Any) -> Any:
    data = {"x": task["x"], "y": given.pop("y", task["y"])}
    given = {"metric": "accuracy", "max_drop": 0.01, "latency": False, "stop_early": True, **given}
    return validate(task["good"], task[other], data=given.pop("data", data), **given)


def test_validation_stops_early(task: dict[str, Any]) -> None:
    near = run(task, "near")
    assert (near.verdict, near.stopped_early, near.samples, near.score.n) == (Verdict.PASS, True, 1024, 1024)
    assert any("stopped early, by look 4 at 1,024 of 4,000 samples" in reason for reason in near.reasons)
    assert near.agreement[0].elements == 3 * 1024
    assert near.to_json()["score"]["looks"][0]["n"] == 128
    bad = run(task, "bad")
    assert (bad.verdict, bad.samples) == (Verdict.FAIL, 128)
    whole = run(task, "near", stop_early=False)
    assert (whole.stopped_early, whole.samples, whole.score.looks) == (False, 4000, ())
    assert whole.score.confidence == pytest.approx(0.95)


def test_sorted_data_is_looked_at_whole(task: dict[str, Any]) -> None:
    order = np.argsort(task["y"], kind="stable")
    found = run(task, "near", data={"x": task["x"][order], "y": task["y"][order]})
    assert (found.verdict, found.samples, len(found.score.looks)) == (Verdict.PASS, 4000, 1)
    assert found.score.confidence == pytest.approx(0.95)
    assert any("no random order" in reason for reason in found.reasons)


def test_questions_that_cannot_stop_early(task: dict[str, Any]) -> None:
    with pytest.raises(MetricError, match="give one"):
        run(task, "near", max_drop=None)

    def own(run: Any, data: Any) -> float:
        return 0.5

    with pytest.raises(MetricError, match="owns its calls"):
        run(task, "near", metric=own)
