"""PASS, FAIL and INCONCLUSIVE on records made to order."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.errors import MetricError
from onnxcompress.validation import samples
from onnxcompress.validation.agreement import Agreement
from onnxcompress.validation.samples import Samples
from onnxcompress.validation.table import agreement_text
from onnxcompress.validation.verdict import Finding, Verdict, judge, judge_agreement, overall, score


def shares(both: int, b: int, c: int, neither: int = 0) -> tuple[Samples, Samples]:
    first = [True] * both + [True] * b + [False] * c + [False] * neither
    second = [True] * both + [False] * b + [True] * c + [False] * neither
    return Samples.of(np.array(first)), Samples.of(np.array(second))


@pytest.mark.parametrize(
    ("counts", "budget", "verdict"),
    [
        ((2000, 0, 0), 0.01, Verdict.PASS),
        ((200, 0, 0), 0.01, Verdict.INCONCLUSIVE),
        ((1400, 600, 0), 0.01, Verdict.FAIL),
        ((1960, 20, 20), 0.01, Verdict.PASS),
        ((1940, 40, 20), 0.01, Verdict.INCONCLUSIVE),
        ((1900, 0, 100), 0.0, Verdict.PASS),
        ((1900, 0, 0), 0.0, Verdict.INCONCLUSIVE),
    ],
)
def test_shares(counts: tuple[int, int, int], budget: float, verdict: Verdict) -> None:
    found = score("accuracy", *shares(*counts), max_drop=budget)
    assert (found.method, found.only_original, found.only_compressed) == ("tango", counts[1], counts[2])
    assert judge(found).verdict is verdict


def test_the_samples_asked_for_decide() -> None:
    found = score("accuracy", *shares(4850, 100, 50), max_drop=0.0125)
    assert found.samples_needed is not None
    assert judge(found).verdict is Verdict.INCONCLUSIVE
    assert f"about {found.samples_needed:,} samples would decide" in judge(found).reasons[0]
    times = found.samples_needed / 5000 + 0.01
    more = score("accuracy", *shares(*(round(count * times) for count in (4850, 100, 50))), max_drop=0.0125)
    assert judge(more).verdict is Verdict.PASS
    on_the_budget = score("accuracy", *shares(490, 10, 0), max_drop=0.02)
    assert on_the_budget.samples_needed is None
    assert "more samples hardly decide" in judge(on_the_budget).reasons[0]


def test_lower_is_better_takes_the_relative_rise() -> None:
    generator = np.random.default_rng(0)
    loss = generator.gamma(4, 1, 400)
    first = Samples.of(loss, higher_is_better=False)
    second = Samples.of(loss * 1.02 + generator.normal(0, 0.01, 400), higher_is_better=False)
    found = score("mse", first, second, max_drop=0.03)
    assert found.relative
    assert found.drop == pytest.approx(0.02, abs=1e-3)
    assert found.bound is not None
    assert 0.02 < found.bound < 0.022
    assert judge(found).verdict is Verdict.PASS
    assert judge(score("mse", first, second, max_drop=0.01)).verdict is Verdict.FAIL
    assert score("mse", first, second, seed=3) == score("mse", first, second, seed=3)
    zero = Samples.of(np.zeros(30), higher_is_better=False)
    assert score("mse", zero, zero).drop == 0.0
    ones = Samples.of(np.ones(30), higher_is_better=False)
    assert judge(score("mse", zero, ones, max_drop=1)).verdict is not Verdict.PASS


def test_spearman_takes_the_bootstrap() -> None:
    generator = np.random.default_rng(1)
    label, value = generator.standard_normal(500), generator.standard_normal(500)
    original = Samples({"score": label + value, "label": label}, samples.spearman)
    compressed = Samples(
        {"score": label + value + 0.02 * generator.standard_normal(500), "label": label}, samples.spearman
    )
    found = score("spearman", original, compressed, max_drop=0.01)
    assert found.method == "bootstrap"
    assert found.bound is not None
    assert found.lower is not None
    assert found.lower < found.drop < found.bound < 0.01
    assert judge(found).verdict is Verdict.PASS
    # Where no sample differs, a bootstrap would say "at most 0"; the rule of three does not.
    same = score("spearman", original, original, max_drop=0.001)
    assert same.bound == pytest.approx(3 / 500, rel=0.01)
    assert judge(same).verdict is Verdict.INCONCLUSIVE
    assert same.samples_needed == pytest.approx(2995, abs=5)
    assert judge(same, same_bytes=True).verdict is Verdict.PASS


def test_one_number_is_no_proof() -> None:
    within = judge(score("mine", Samples.number(0.9), Samples.number(0.9), max_drop=0.01))
    assert within.verdict is Verdict.INCONCLUSIVE
    assert "one number" in within.reasons[0]
    assert judge(score("mine", Samples.number(0.9), Samples.number(0.8), max_drop=0.01)).verdict is Verdict.FAIL
    few = judge(score("mine", Samples.of([0.5] * 5), Samples.of([0.5] * 5), max_drop=0.01))
    assert few.verdict is Verdict.INCONCLUSIVE
    assert "too few" in few.reasons[0]


def test_a_perfect_auc_is_no_proof_of_no_drop() -> None:
    label = np.arange(100) % 2
    one, other = ({"score": label + spread * np.arange(100) / 1000, "label": label} for spread in (1, 2))
    found = score("auc", Samples(one, samples.auc), Samples(other, samples.auc), max_drop=0.001)
    assert (found.drop, found.lower) == (0, 0)
    assert found.bound == pytest.approx(3 / 100, rel=0.02)
    assert found.samples_needed == pytest.approx(3 / 0.001, rel=0.01)
    assert judge(found).verdict is Verdict.INCONCLUSIVE


def test_no_budget_passes_with_the_figures() -> None:
    finding = judge(score("accuracy", *shares(50, 40, 0)))
    assert finding.verdict is Verdict.PASS
    assert "drop 0.4444, at most" in finding.reasons[0]
    assert "no budget" in finding.reasons[0]


def test_other_samples_cannot_be_compared() -> None:
    with pytest.raises(MetricError, match="3 samples of the original, 2 of the compressed"):
        score("accuracy", Samples.of([1.0, 1, 1]), Samples.of([1.0, 1]))


def test_agreement_fails_on_nan_and_shapes() -> None:
    agreement = Agreement()
    agreement.update({"a": np.ones(3), "b": np.ones(2)}, {"a": np.array([1, np.nan, 1]), "b": np.ones(3)})
    finding = judge_agreement(agreement.results())
    assert finding.verdict is Verdict.FAIL
    assert finding.reasons == (
        "output 'a': 1 values of 3 are NaN or Inf where the original's are finite",
        "output 'b' does not fit in 1 of 1 calls: shape [2] in the original, [3] in the compressed model",
    )
    both = Agreement()
    both.update({"a": np.array([1, np.nan])}, {"a": np.array([1, np.nan])})
    assert judge_agreement(both.results()).verdict is Verdict.PASS
    nothing = Agreement()
    nothing.update({"a": np.array([np.inf, np.nan])}, {"a": np.array([1, np.nan])})
    finding = judge_agreement(nothing.results())
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert "all NaN or Inf" in finding.reasons[0]
    assert nothing.results()[0].cosine is None
    assert "nothing to compare" in agreement_text(nothing.results()[0])
    empty = Agreement()
    empty.update({"a": np.zeros((0, 4))}, {"a": np.zeros((0, 4))})
    assert judge_agreement(empty.results()).verdict is Verdict.INCONCLUSIVE


def test_the_worst_verdict_comes_first() -> None:
    found = overall([Finding(Verdict.PASS, ("good",)), Finding(Verdict.FAIL, ("bad",))])
    assert found == Finding(Verdict.FAIL, ("bad", "good"))
