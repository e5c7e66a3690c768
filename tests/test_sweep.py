"""Every model of the onnx package's backend tests through `compress`: no crash, no silent change, refusals typed and
quick. `pytest -m slow -s tests/test_sweep.py` prints the counts."""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import Any

import pytest

import onnxcompress as oc
from onnxcompress.api import Compressed
from onnxcompress.errors import DataError, OnnxCompressError
from onnxcompress.model.load import load
from onnxcompress.model.save import to_bytes
from tests.passes.test_node_models import Case, _close, _equal, _outputs, cases, frozen

pytestmark = pytest.mark.slow

REFUSAL_SECONDS = 5.0
RECIPES: dict[str, list[Any]] = {"simplify": ["simplify"], "share": ["weight-sharing"]}


@dataclasses.dataclass
class Tally:
    """What came of one recipe. `wrong`: everything that must not be, a line a model."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refusals: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    slowest: float = 0.0


def through(case: Case, recipe: list[Any], tally: Tally) -> None:
    """One model through one recipe: with made-up inputs, and with the stored ones where those do not fit."""
    tally.counts["models"] += 1
    done = _compress(case, recipe, tally, None)
    if isinstance(done, DataError) and case.feeds:
        tally.counts["refused made-up inputs"] += 1
        done = _compress(case, recipe, tally, [case.feeds])
    if isinstance(done, OnnxCompressError):
        tally.counts["refused"] += 1
        tally.refusals[f"{type(done).__name__}: {_kind_of(str(done))}"] += 1
        return
    if done is None:
        return
    (step,) = done.steps
    tally.counts["undone"] += step.skipped is not None
    tally.counts["changed"] += step.skipped is None and step.coverage.changed
    lossy = any(touched.error > 0 for touched in step.coverage.touched)
    tally.counts["lossy"] += lossy
    if not lossy:
        _compare(case, to_bytes(done.model), tally)


def _compress(case: Case, recipe: list[Any], tally: Tally, data: Any) -> Compressed | OnnxCompressError | None:
    """The result, or the refusal, or None for what must not be."""
    start = time.perf_counter()
    try:
        return oc.compress(case.model, {"passes": recipe}, calibration=data)
    except OnnxCompressError as error:
        seconds = time.perf_counter() - start
        tally.slowest = max(tally.slowest, seconds)
        if seconds > REFUSAL_SECONDS:
            tally.wrong.append(f"{case.name}: took {seconds:.1f} s to refuse: {error}")
        if "\n" in str(error):
            tally.wrong.append(f"{case.name}: a message of several lines: {error}")
        return error
    except Exception as error:
        tally.wrong.append(f"{case.name}: {type(error).__name__}: {error}")
        return None


def _compare(case: Case, result: bytes, tally: Tally) -> None:
    source = to_bytes(load(case.model))
    before, again, after = (_outputs(each, case.feeds) for each in (source, source, result))
    if before is None or again is None:
        tally.counts["unrunnable"] += 1
        return
    if any(not _equal(value, again[name]) for name, value in before.items()):
        tally.counts["random"] += 1
        return
    if after is None or list(after) != list(before):
        tally.wrong.append(f"{case.name}: does not run any more, or has other outputs")
        return
    differing = [name for name, value in before.items() if not _equal(value, after[name])]
    tally.counts["equal"] += not differing
    tally.counts["close"] += bool(differing)
    tally.wrong += [
        f"{case.name}: output {name} differs" for name in differing if not _close(before[name], after[name])
    ]


def _kind_of(message: str) -> str:
    """A message without the names in it, to count by."""
    words = message.partition(": ")[2].split() if ": ONNX Runtime refuses it: " in message else message.split()
    return " ".join("..." if any(mark in word for mark in "/'\"_0123456789") else word for word in words[:12])


@pytest.mark.parametrize("freeze", [False, True], ids=["as-they-are", "inputs-frozen"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_no_model_crashes_or_changes_silently(name: str, freeze: bool, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes: pytest -m slow")
    tally = Tally()
    for case in cases():
        used = frozen(case) if freeze else case
        if used is not None:
            through(used, RECIPES[name], tally)
    counts = dict(sorted(tally.counts.items()))
    print(f"\n{name}{', inputs frozen' if freeze else ''}: {counts}, slowest refusal {tally.slowest:.2f} s")
    for words, count in tally.refusals.most_common():
        print(f"  {count} x {words}")
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.counts["models"] >= (1500 if freeze else 2033)
    # The frozen models hold what sharing can treat, so that it is not only refusals that are tested.
    assert tally.counts["changed"] >= {("simplify", False): 290, ("share", True): 45}.get((name, freeze), 0)
