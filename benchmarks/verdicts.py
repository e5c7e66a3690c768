"""Does `validate --stop-early` accept falsely? Simulated models whose true drop lies exactly on the budget.

    python benchmarks/verdicts.py [--repetitions 2000] [--seed 0] [--json FILE]

Prints, for pairs of models at several accuracies, correlations and sample sizes: how often the early looks say PASS
though the drop is the budget (to be at most 5 %), the same for one look at all samples, how often they say FAIL though
the drop is within the budget, and the samples used; then what clear cases use, bootstrapped metrics, and the sample
sizes that an INCONCLUSIVE verdict asks for against theory. Everything runs through the code that `validate` runs.
Exit status 1 when a rate of early looks is above 5 %. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from onnxcompress.validation import samples
from onnxcompress.validation.intervals import tango_upper
from onnxcompress.validation.samples import Samples
from onnxcompress.validation.sequential import Sequential, sizes
from onnxcompress.validation.verdict import Score, score

ALPHA, BUDGET = 0.05, 0.01
Z = 1.6448536269514722
ACCURACIES, CORRELATIONS, SIZES = (0.6, 0.8, 0.95), (0.95, 0.8, 0.5), (500, 2000, 8000)
Pair = tuple[Samples, Samples]
Draw = Callable[[np.random.Generator], Pair]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What came of one case: shares of repetitions, and mean samples used."""

    case: str
    n: int
    passed: float
    failed: float
    used: float
    passed_at_once: float | None

    def line(self) -> str:
        """One row of the table."""
        once = "" if self.passed_at_once is None else f"{self.passed_at_once:8.2%}"
        used = f"{self.used:9,.0f} {self.used / self.n:5.0%}"
        return f"  {self.case:46s} {self.n:6,} {self.passed:8.2%} {self.failed:8.2%} {used} {once}"


HEAD = f"  {'':46s} {'n':>6s} {'PASS':>8s} {'FAIL':>8s} {'mean used':>15s} {'at once':>8s}"


def proportions(n: int, accuracy: float, correlation: float, drop: float) -> Draw:
    """Pairs of right / wrong with the given correlation (phi) of the two models."""
    p, q = accuracy, accuracy - drop
    both = p * q + correlation * math.sqrt(p * (1 - p) * q * (1 - q))
    both = min(both, q)  # a drop allows no higher correlation
    only = q - both

    def draw(generator: np.random.Generator) -> Pair:
        u = generator.random(n)
        return Samples.of(u < p), Samples.of((u < both) | ((u >= p) & (u < p + only)))

    return draw


def losses(n: int, rise: float, spread: float) -> Draw:
    """Squared errors, skewed as they are, of two models whose means differ by `rise`."""

    def draw(generator: np.random.Generator) -> Pair:
        first = generator.gamma(1.0, 1.0, n)
        second = first * (1 + rise) * np.exp(generator.normal(-spread * spread / 2, spread, n))
        return Samples.of(first, higher_is_better=False), Samples.of(second, higher_is_better=False)

    return draw


def correlations(n: int, drop: float) -> Draw:
    """Scores of two models whose correlation with the label differs by `drop`."""
    first, second = 0.9, 0.9 - drop
    # score = label + a * noise has correlation 1 / sqrt(1 + a^2)
    scales = [math.sqrt(1 / r**2 - 1) for r in (first, second)]

    def draw(generator: np.random.Generator) -> Pair:
        label, noise, own = generator.standard_normal((3, n))
        mixed = 0.95 * noise + math.sqrt(1 - 0.95**2) * own
        sides = [{"score": label + a * e, "label": label} for a, e in zip(scales, (noise, mixed), strict=True)]
        return Samples(sides[0], samples.pearson), Samples(sides[1], samples.pearson)

    return draw


def run(metric: str, pair: Pair, budget: float) -> Score:
    """The looks over one comparison, sample by sample, as `validate` takes them."""
    total = pair[0].n
    looks = Sequential(metric, total, budget)
    for n in sizes(total)[:-1]:
        if looks.due(n):
            found = looks.look(lambda n=n: (_first(pair[0], n), _first(pair[1], n)))  # type: ignore[misc]
            if found is not None:
                return found
    return looks.last(pair)


def _first(side: Samples, n: int) -> Samples:
    return dataclasses.replace(side, columns={name: column[:n] for name, column in side.columns.items()})


def simulate(case: str, draw: Draw, budget: float, repetitions: int, seed: list[int], *, once: bool = False) -> Rates:
    """`repetitions` comparisons; `once`: also decide each with one look at all samples."""
    generator = np.random.default_rng(seed)
    passed = failed = used = alone = n = 0
    for _ in range(repetitions):
        pair = draw(generator)
        n = pair[0].n
        found = run("m", pair, budget)
        assert found.bound is not None
        assert found.lower is not None
        passed += found.bound <= budget
        failed += found.lower > budget
        used += found.n
        if once:
            whole = score("m", *pair, max_drop=budget)
            alone += whole.bound is not None and whole.bound <= budget
    share = alone / repetitions if once else None
    return Rates(case, n, passed / repetitions, failed / repetitions, used / repetitions, share)


def needed(repetitions: int, seed: int) -> list[dict[str, float]]:
    """The samples an INCONCLUSIVE verdict asks for when both models are equally good, against theory.

    Wald: z^2 s / budget^2 for a disagreement s. Score (Tango 1998): the variance is that of a drop of the budget, which
    is larger where the disagreement is hardly more than the budget.
    """
    print(
        "\nSamples asked for at a true drop of 0, against theory, and how often so many decide (theory: half the time)"
    )
    found = []
    for share, budget in itertools.product((0.02, 0.05), (0.01, 0.005)):
        half = round(share * 200 / 2)
        first, second = np.ones(200, bool), np.ones(200, bool)
        first[:half] = second[half : 2 * half] = False
        asked = score("m", Samples.of(first), Samples.of(second), max_drop=budget).samples_needed
        assert asked is not None
        wald = Z * Z * share / budget**2
        linear = -share + 2 * budget  # Tango's restricted estimate of the share that only the second gets right
        rest = (math.sqrt(linear**2 + 4 * share * budget * (1 - budget)) - linear) / 4
        theory = Z * Z * (2 * rest + budget * (1 - budget)) / budget**2
        generator = np.random.default_rng([seed, asked])
        counts = generator.multinomial(asked, [share / 2, share / 2, 1 - share], repetitions)
        decide = float(np.mean([tango_upper(int(b), int(c), asked) <= budget for b, c, _ in counts]))
        print(
            f"  disagreement {share:.0%}, budget {budget}: asked {asked:,}, score {theory:,.0f}, Wald {wald:,.0f}; "
            f"PASS in {decide:.0%} of {repetitions:,}"
        )
        found.append({"disagreement": share, "budget": budget, "asked": asked, "score": theory, "wald": wald})
        found[-1]["pass"] = decide
    return found


def main() -> int:
    """Run all cases."""
    options = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", type=pathlib.Path)
    given = options.parse_args()
    start, rates, report = time.perf_counter(), [], dict[str, Any]()

    def table(key: str, words: str, cases: list[tuple[str, Draw, float]], count: int, *, once: bool = False) -> None:
        print(f"\n{words} ({count:,} repetitions)\n{HEAD}", flush=True)
        report[key] = []
        for at, (case, draw, budget) in enumerate(cases):
            found = simulate(case, draw, budget, count, [given.seed, at, *key.encode()], once=once)
            report[key].append(dataclasses.asdict(found))
            print(found.line(), flush=True)
            if key.startswith("boundary"):
                rates.append(found)

    grid = list(itertools.product(SIZES, ACCURACIES, CORRELATIONS))
    table(
        "boundary",
        f"Accuracy, true drop = budget = {BUDGET}: every PASS is false",
        [(f"accuracy {p}, correlation {r}", proportions(n, p, r, BUDGET), BUDGET) for n, p, r in grid],
        given.repetitions,
        once=True,
    )
    table(
        "boundary_bootstrap",
        "Bootstrapped metrics, true drop = budget: every PASS is false",
        [
            ("mse, relative rise 0.02", losses(1600, 0.02, 0.2), 0.02),
            ("pearson, drop 0.01", correlations(1600, 0.01), 0.01),
        ],
        given.repetitions,
    )
    table(
        "clear",
        f"Clear cases, budget {BUDGET}: what stopping early saves",
        [
            (f"{words}, accuracy 0.8, correlation {r}", proportions(n, 0.8, r, drop), BUDGET)
            for n in SIZES[1:]
            for words, drop, r in (("drop 0", 0.0, 0.99), ("drop 0", 0.0, 0.95), ("drop 0.1", 0.1, 0.5))
        ],
        max(1, given.repetitions // 4),
        once=True,
    )
    report["needed"] = needed(given.repetitions, given.seed)
    worst = max(rates, key=lambda found: found.passed)
    rejected = max(rates, key=lambda found: found.failed)
    print(f"\nworst false accept {worst.passed:.2%} ({worst.case}, n {worst.n:,}); ", end="")
    print(f"worst false reject {rejected.failed:.2%} ({rejected.case}, n {rejected.n:,}); ", end="")
    print(f"mean used {np.mean([found.used / found.n for found in rates]):.0%}; {time.perf_counter() - start:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(max(worst.passed, rejected.failed) > ALPHA)


if __name__ == "__main__":
    sys.exit(main())
