"""PASS, FAIL or INCONCLUSIVE, with the reasons and a bound on the drop: never a point estimate alone."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import MetricError
from onnxcompress.validation.agreement import OutputAgreement
from onnxcompress.validation.intervals import (
    bootstrap_bounds,
    rule_of_three,
    samples_needed,
    tango_lower,
    tango_needed,
    tango_upper,
)
from onnxcompress.validation.samples import Samples

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
_LEAST = 20  # fewer samples than this carry no bootstrap
_FEW = 10  # so many samples must differ between the models before a bootstrap alone is believed


class Verdict(enum.Enum):
    """What a validation shows."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclasses.dataclass(frozen=True)
class Look:
    """One look at a comparison: after `n` samples, both bounds at one-sided level 1 - `level`."""

    n: int
    level: float
    bound: float | None
    lower: float | None


@dataclasses.dataclass(frozen=True)
class Score:
    """The metric of both models on the same samples.

    `drop`: original - compressed; where lower is better the relative rise, (compressed - original) / original.
    `bound` and `lower`: the drop is below / above this, with one-sided 95 % confidence each; None: there is no bound.
    `method`: tango, bootstrap (with fewer than ten differing samples, or where all resamples are the same, at least
    `rule_of_three`), or none.
    `only_original`, `only_compressed`: how many samples only that model got right (proportions). `samples_needed`:
    about how many samples would decide, if more of them look like these. `looks`: all looks that were taken, this score
    being the last of them (`validation.sequential`); none where the samples were looked at once.
    """

    metric: str
    higher_is_better: bool
    original: float
    compressed: float
    n: int
    drop: float
    relative: bool
    bound: float | None
    lower: float | None
    method: str
    confidence: float = CONFIDENCE
    max_drop: float | None = None
    only_original: int | None = None
    only_compressed: int | None = None
    samples_needed: int | None = None
    looks: tuple[Look, ...] = ()

    @property
    def decided(self) -> bool:
        """True when a bound shows the drop to lie within the budget, or above it."""
        if self.max_drop is None or self.bound is None or self.lower is None:
            return False
        return self.bound <= self.max_drop or self.lower > self.max_drop


@dataclasses.dataclass(frozen=True)
class Finding:
    """A verdict on one question, in words."""

    verdict: Verdict
    reasons: tuple[str, ...]


def score(
    metric: str,
    original: Samples,
    compressed: Samples,
    *,
    max_drop: float | None = None,
    seed: int = 0,
    alpha: float = 1 - CONFIDENCE,
) -> Score:
    """Compare the records of two models on the same samples.

    Raises:
        MetricError: they are not the same samples.
    """
    if original.n != compressed.n or original.single != compressed.single:
        raise MetricError(
            f"metric {metric}: {original.n} samples of the original, {compressed.n} of the compressed model"
        )
    higher, n = original.higher_is_better, original.n
    first, second = original.score(), compressed.score()
    drop = float(_drop(np.array([first]), np.array([second]), higher)[0])
    common: dict[str, Any] = {
        "metric": metric,
        "higher_is_better": higher,
        "original": first,
        "compressed": second,
        "n": n,
        "drop": drop,
        "relative": not higher,
        "max_drop": max_drop,
    }
    if original.single or not n or not math.isfinite(drop):
        return Score(**common, bound=None, lower=None, method="none")
    if original.proportion is not None and original.proportion == compressed.proportion and higher:
        return _proportion(original, compressed, common, alpha)
    return _bootstrap(original, compressed, common, seed, alpha)


def judge(score: Score, *, same_bytes: bool = False) -> Finding:
    """The verdict on a score with a budget; without one, PASS with the figures."""
    said = _figures(score)
    if score.max_drop is None:
        return Finding(Verdict.PASS, (said + "; no budget was given (--max-drop)",))
    budget = f"the budget of {_amount(score.max_drop, score)}"
    if not math.isfinite(score.compressed) and math.isfinite(score.original):
        return Finding(Verdict.FAIL, (f"{score.metric} of the compressed model is {score.compressed}",))
    if math.isnan(score.drop):
        return Finding(Verdict.INCONCLUSIVE, (f"{score.metric} is not defined on these {score.n} samples",))
    if same_bytes and score.drop == 0:
        return Finding(Verdict.PASS, (said,))
    if score.bound is None or score.lower is None:
        if score.drop > score.max_drop:
            return Finding(Verdict.FAIL, (f"{said}: above {budget}",))
        return Finding(Verdict.INCONCLUSIVE, (f"{said}: within {budget}, but {_no_bound(score)}",))
    if score.bound <= score.max_drop:
        return Finding(Verdict.PASS, (f"{said}: within {budget}",))
    if score.lower > score.max_drop:
        return Finding(Verdict.FAIL, (f"{said}: above {budget}",))
    more = (
        f"about {score.samples_needed:,} samples would decide, {score.samples_needed - score.n:,} more"
        if score.samples_needed is not None
        else "the drop is so near the budget that more samples hardly decide"
    )
    return Finding(Verdict.INCONCLUSIVE, (f"{said}: not shown to be within {budget}; {more}",))


def judge_agreement(agreement: Sequence[OutputAgreement], where: str = "") -> Finding:
    """FAIL where outputs do not fit or stop being finite, INCONCLUSIVE where nothing was compared."""
    reasons = []
    suffix = f" on {where}" if where else ""
    for output in agreement:
        if output.mismatched:
            calls = f"{output.mismatched} of {output.calls} calls"
            reasons.append(f"output {output.name!r}{suffix} does not fit in {calls}: {output.mismatch}")
        if output.nonfinite_new:
            reasons.append(
                f"output {output.name!r}{suffix}: {output.nonfinite_new:,} values of {output.elements:,} are NaN or "
                "Inf where the original's are finite"
            )
    if reasons:
        return Finding(Verdict.FAIL, tuple(reasons))
    if not any(output.calls for output in agreement):
        return Finding(Verdict.INCONCLUSIVE, (f"no output was compared{suffix}",))
    if not any(output.elements for output in agreement):
        return Finding(Verdict.INCONCLUSIVE, (f"all outputs{suffix} are empty, so nothing was compared",))
    if all(output.elements == output.nonfinite_original for output in agreement):
        reason = f"outputs{suffix}: the original's are all NaN or Inf, so nothing was compared; look at the data"
        return Finding(Verdict.INCONCLUSIVE, (reason,))
    shared = [output for output in agreement if output.nonfinite_original]
    return Finding(
        Verdict.PASS,
        tuple(
            f"output {output.name!r}: NaN or Inf in the original too ({output.nonfinite_original:,})"
            for output in shared
        ),
    )


def overall(findings: Sequence[Finding]) -> Finding:
    """The worst verdict, with the reasons of that verdict first."""
    order = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS)
    ranked = sorted(findings, key=lambda finding: order.index(finding.verdict))
    verdict = ranked[0].verdict if ranked else Verdict.INCONCLUSIVE
    return Finding(verdict, tuple(reason for finding in ranked for reason in finding.reasons))


def _drop(original: Floats, compressed: Floats, higher: bool) -> Floats:
    if higher:
        return np.asarray(original - compressed, np.float64)
    with np.errstate(all="ignore"):
        rise = (compressed - original) / np.abs(original)
    return np.asarray(np.where(compressed == original, 0.0, rise), np.float64)


def _proportion(original: Samples, compressed: Samples, common: dict[str, Any], alpha: float) -> Score:
    first = original.columns[str(original.proportion)].astype(bool)
    second = compressed.columns[str(compressed.proportion)].astype(bool)
    n, b, c = len(first), int((first & ~second).sum()), int((~first & second).sum())
    budget, needed = common["max_drop"], None
    upper, lower = tango_upper(b, c, n, alpha), tango_lower(b, c, n, alpha)
    if budget is not None and lower <= budget < upper:
        needed = tango_needed(b / n, c / n, budget, alpha)
    return Score(
        **common,
        bound=upper,
        lower=lower,
        method="tango",
        confidence=1 - alpha,
        only_original=b,
        only_compressed=c,
        samples_needed=needed,
    )


def _bootstrap(original: Samples, compressed: Samples, common: dict[str, Any], seed: int, alpha: float) -> Score:
    n, budget, drop = original.n, common["max_drop"], common["drop"]
    if n < _LEAST:
        return Score(**common, bound=None, lower=None, method="none", confidence=1 - alpha)

    def statistic(weights: Floats) -> Floats:
        first = original.reduce(original.columns, weights)
        return _drop(first, compressed.reduce(compressed.columns, weights), original.higher_is_better)

    lower, upper = bootstrap_bounds(statistic, n, seed=seed, alpha=alpha)
    if math.isnan(upper):
        return Score(**common, bound=None, lower=None, method="none", confidence=1 - alpha)
    needed, rare = None, rule_of_three(n, alpha)
    if upper < rare and (lower == upper or _differing(original, compressed) < _FEW):
        # Resampling cannot show what too few samples have (an AUC of 1 stays 1 in every resample): the share of samples
        # that may yet differ bounds the drop.
        upper = rare
        if budget is not None and lower <= budget < upper:
            needed = samples_needed(lambda m: rule_of_three(m, alpha) <= budget, n)
    elif budget is not None and lower <= budget < upper:
        # The distance from the drop to its bound shrinks with the root of the number of samples.
        reach = (upper - drop) if drop <= budget else (drop - lower)
        distance = abs(budget - drop)
        # Above any data set one could gather it is no advice.
        found = math.ceil(n * (reach / distance) ** 2) if distance > 0 else None
        needed = found if found is not None and found <= 1_000_000_000 else None
    return Score(**common, bound=upper, lower=lower, method="bootstrap", confidence=1 - alpha, samples_needed=needed)


def _differing(original: Samples, compressed: Samples) -> int:
    """How many samples have other records in the two models."""
    differ = np.zeros(original.n, bool)
    for name, first in original.columns.items():
        second = compressed.columns[name]
        if first.shape != second.shape:
            return original.n
        unequal = first != second
        if first.dtype.kind == "f" and second.dtype.kind == "f":
            unequal &= ~(np.isnan(first) & np.isnan(second))
        differ |= unequal.reshape(len(first), -1).any(axis=1)
    return int(differ.sum())


def _figures(score: Score) -> str:
    text = f"{score.metric} {score.original:.6g} -> {score.compressed:.6g} on {score.n:,} samples"
    if score.method == "none" and score.n <= 1:
        text = f"{score.metric} {score.original:.6g} -> {score.compressed:.6g}"
    text += f", {'rise' if score.relative else 'drop'} {_amount(score.drop, score)}"
    if score.bound is not None:
        text += f", at most {_amount(score.bound, score)} ({percent(score.confidence)}, one-sided, {score.method})"
    return text


def percent(share: float) -> str:
    """A confidence for people: 95%, 99.5%, never 100%."""
    return f"{math.floor(share * 1000) / 10:g}%" if abs(share * 100 - round(share * 100)) > 1e-6 else f"{share:.0%}"


def _amount(value: float, score: Score) -> str:
    return f"{value:.2%}" if score.relative else f"{value:.4g}"


def _no_bound(score: Score) -> str:
    if score.n < _LEAST and score.n > 1:
        return f"{score.n} samples are too few for a bound (at least {_LEAST})"
    return "there is no bound: the metric gave one number, not one score a sample"
