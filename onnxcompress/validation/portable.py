"""Whether a model with integer products gives the same answers on every CPU.

Two witnesses. Beside the default, the same model runs with `session.x64quantprecision`, whose sums cannot saturate
(seen in onnxruntime 1.32: bit for bit the default on a CPU with VNNI): the difference is what this CPU cuts off. And
what a CPU without VNNI would cut off is computed from weights and activations (`validation.saturation`), because a CPU
with VNNI cannot show it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxcompress.data.batch import Batch, Data
from onnxcompress.errors import DataError, ModelError
from onnxcompress.runtime.cpu import cpu_class
from onnxcompress.runtime.session import Session
from onnxcompress.validation.agreement import Agreement, OutputAgreement
from onnxcompress.validation.integers import PairBound, has_integers, pair_bounds
from onnxcompress.validation.metric import BatchMetric, Collector
from onnxcompress.validation.pairing import feeds_for
from onnxcompress.validation.samples import Evaluator
from onnxcompress.validation.saturation import Saturation, saturations
from onnxcompress.validation.values import RealRows
from onnxcompress.validation.verdict import Finding, Verdict

PORTABLE = {"session.x64quantprecision": "1"}
SATURATION = 0.01  # share of an output that may be cut off before a validation fails
_CALLS = 8  # calls with both arithmetics where nothing speaks for a difference
_NAMED = 3  # nodes named in a reason


@dataclasses.dataclass(frozen=True)
class Integers:
    """How far a model's answers depend on the integer arithmetic of the machine.

    `products`: the bound of every product of unsigned and signed bytes. `saturations`: what 16-bit sums would cut off
    in those that can overflow, on this data; `unmeasured`: why that could not be computed. `agreement`: the default
    against exact sums on this machine, over `samples` samples; `not_run`: why ONNX Runtime cannot run the model with
    exact sums. `metric_default`, `metric_exact`: the metric of both on these samples. `cpu_class`: of this machine.
    `limit`: the share that was allowed.
    """

    products: tuple[PairBound, ...]
    saturations: tuple[Saturation, ...]
    unmeasured: str | None
    agreement: tuple[OutputAgreement, ...]
    samples: int
    not_run: str | None
    metric: str | None
    metric_default: float | None
    metric_exact: float | None
    cpu_class: str
    limit: float

    @property
    def at_risk(self) -> tuple[PairBound, ...]:
        """The products that can overflow 16 bits."""
        return tuple(entry for entry in self.products if entry.at_risk)

    @property
    def observed(self) -> float:
        """Root mean square of what this machine cuts off over that of the output, of the worst output; 0: nothing."""
        return max((_relative(output) for output in self.agreement), default=0.0)

    @property
    def computed(self) -> float:
        """The same of the worst node, as a CPU without VNNI would."""
        return max((entry.relative_error for entry in self.saturations), default=0.0)


class Portable:
    """The compressed model with sums that cannot saturate, beside the default. Where it has no integers, nothing."""

    def __init__(
        self,
        model: ir.Model,
        data: Data,
        open_it: Callable[[Mapping[str, str]], Session],
        *,
        limit: float = SATURATION,
        threads: int = 1,
    ) -> None:
        self._limit = limit
        self._agreement = Agreement()
        self._records = (Collector(), Collector())
        self._scores: tuple[float, float] | None = None
        self._calls = self._samples = 0
        self._products = tuple(pair_bounds(model))
        self._saturations: tuple[Saturation, ...] = ()
        self._unmeasured: str | None = None
        self._integers, self._not_run = has_integers(model), ""
        self._session: Session | None = None
        if self._integers:
            try:
                self._session = open_it(PORTABLE)
            except ModelError as error:
                self._not_run = str(error)
        risky = any(entry.at_risk for entry in self._products)
        if risky:
            try:
                self._saturations = tuple(saturations(model, data, threads=threads))
            except (DataError, ModelError) as error:
                self._unmeasured = str(error)
        # Where sums cannot overflow, or are added in 32 bits, a few calls suffice to see that nothing differs.
        self._whole = risky and "VNNI" not in cpu_class()

    def see(
        self,
        batch: Batch,
        default: Mapping[str, Any],
        rows: RealRows,
        names: Sequence[str],
        where: Mapping[str, Any],
        evaluator: Evaluator | None,
    ) -> None:
        """Run one batch with exact sums and hold the `default` outputs, of which padding is cut, against it."""
        if self._session is None or not (self._whole or self._calls < _CALLS):
            return
        try:
            exact = rows.cut(self._session.run(feeds_for(self._session, batch.feeds), names), batch)
        except ModelError as error:
            # onnxruntime 1.32 turns the signed weights of a Gemm to unsigned with a zero point that does not fit them.
            self._not_run, self._session = str(error), None
            return
        self._agreement.update(exact, default, **where)
        self._calls += 1
        self._samples += batch.count
        self._whole |= not all(output.bit_equal for output in self._agreement.results())
        if isinstance(evaluator, BatchMetric) and not self._agreement.misfit:
            for records, outputs in zip(self._records, (default, exact), strict=True):
                records.add(evaluator.columns(outputs, batch))

    def score(self, evaluator: Evaluator | None) -> None:
        """Score what was seen."""
        if isinstance(evaluator, BatchMetric) and self._calls and not self._agreement.misfit:
            own = copy.copy(evaluator)
            first, second = (own.finish(records.columns()).score() for records in self._records)
            self._scores = first, second

    def result(self, metric: str) -> Integers | None:
        """What was found; None where the model has no integers."""
        if not self._integers:
            return None
        return Integers(
            products=self._products,
            saturations=self._saturations,
            unmeasured=self._unmeasured,
            agreement=tuple(self._agreement.results()),
            samples=self._samples,
            not_run=self._not_run or None,
            metric=metric if self._scores is not None else None,
            metric_default=self._scores[0] if self._scores is not None else None,
            metric_exact=self._scores[1] if self._scores is not None else None,
            cpu_class=cpu_class(),
            limit=self._limit,
        )

    def close(self) -> None:
        """Close its session."""
        if self._session is not None:
            self._session.close()


def judge_integers(found: Integers) -> Finding | None:
    """FAIL where more is cut off than `limit`; a note where sums can overflow; None where there is nothing to say."""
    reasons = []
    unproved = f"; {_NOT_RUN}" if found.not_run and "VNNI" not in found.cpu_class else ""
    risky, observed = found.at_risk, found.observed
    if observed > found.limit:
        scores = (
            f", {found.metric} {found.metric_default:.6g} against {found.metric_exact:.6g}"
            if found.metric_default is not None and found.metric_exact is not None
            else ""
        )
        reasons.append(
            f"this CPU ({found.cpu_class}) cuts off integer sums: its outputs are off by {_share(observed)} from exact "
            f"sums{scores}; {_MEND}"
        )
    poor = sorted(
        (entry for entry in found.saturations if entry.relative_error > found.limit),
        key=lambda entry: -entry.relative_error,
    )
    if poor:
        named = ", ".join(f"{entry.node!r} by {_share(entry.relative_error)}" for entry in poor[:_NAMED])
        more = f" and {len(poor) - _NAMED} more" if len(poor) > _NAMED else ""
        reasons.append(
            f"CPUs without VNNI add products in 16 bits and cut off what overflows: on this data that changes {named}"
            f"{more} of the output (allowed: {_share(found.limit)}); {_MEND}"
        )
    if reasons:
        return Finding(Verdict.FAIL, tuple(reasons))
    if not found.products:
        return None
    if not risky:
        said = f"none of {len(found.products)} integer products can overflow 16 bits: the same answers without VNNI"
        return Finding(Verdict.PASS, (said + unproved,))
    seen = [entry for entry in found.saturations if entry.rows]
    said = f"{len(risky)} of {len(found.products)} integer products can overflow 16 bits on CPUs without VNNI ("
    said += ", ".join(repr(entry.node) for entry in risky[:_NAMED]) + (", ..." if len(risky) > _NAMED else "") + ")"
    if seen:
        said += f"; on this data at most {_share(found.computed)} of a node's output is cut off"
    if len(seen) < len(risky):
        said += f"; how much is not known of {len(risky) - len(seen)}"
        said += f" ({found.unmeasured})" if found.unmeasured else ""
    return Finding(Verdict.PASS, (said + unproved,))


_NOT_RUN = "what this CPU does was not seen: ONNX Runtime cannot run the model with exact sums"
_MEND = (
    "quantize again with a reduced weight range (--target portable; reduce_range in other tools), or allow it where "
    "every CPU has VNNI (--saturation inf)"
)


def _relative(output: OutputAgreement) -> float:
    if output.bit_equal or output.sqnr_db is None:
        return 0.0
    return 10 ** (-output.sqnr_db / 20) if math.isfinite(output.sqnr_db) else (0.0 if output.sqnr_db > 0 else math.inf)


def _share(value: float) -> str:
    return f"{value:.2g}" if value > 10 else f"{value:.2%}"
