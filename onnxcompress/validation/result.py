"""What a validation found, as one object: for Python, for JSON, for a table."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any

from onnxcompress.runtime.footprint import Footprint
from onnxcompress.validation.agreement import OutputAgreement
from onnxcompress.validation.placement import ProviderRow
from onnxcompress.validation.portable import Integers
from onnxcompress.validation.verdict import Score, Verdict

if TYPE_CHECKING:
    import rich.console

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """Latency on the CPU provider, both models in turn on the same feeds.

    `original_p50`, `compressed_p50`: median seconds a run. `ratio`: median of original / compressed over `rounds`,
    above 1 the compressed model is faster; `ratio_low`, `ratio_high` hold the median with 95 % confidence (order
    statistics and block bootstrap; None for fewer than six rounds). `batch`: samples a call. p90, p99: order statistics
    of the timed runs. `warmup`: rounds before; `stable`: neither model became faster any more when timing began.
    `cpu_class`: of the machine (`runtime.cpu`).
    """

    original_p50: float
    compressed_p50: float
    ratio: float
    ratio_low: float | None
    ratio_high: float | None
    rounds: int
    threads: int
    batch: int
    original_p90: float
    compressed_p90: float
    original_p99: float
    compressed_p99: float
    warmup: int
    stable: bool
    cpu_class: str


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of both models with their external data; `ratio`: compressed / original."""

    original: int
    compressed: int
    ratio: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One validation. `inputs`: data or synthetic. `partial`: interrupted, so it tells less than was asked.

    `integers`: how far the compressed model's answers depend on the machine; None where it computes with floats alone.
    `footprints`: load time and memory of both in new processes, where that was asked for and both are files.
    `stopped_early`: an early look decided, so the outputs were compared on the samples seen up to it.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    score: Score | None
    agreement: tuple[OutputAgreement, ...]
    providers: tuple[ProviderRow, ...]
    latency: Timing | None
    size: Size
    samples: int
    calls: int
    inputs: str
    same_bytes: bool = False
    partial: bool = False
    stopped_early: bool = False
    integers: Integers | None = None
    footprints: tuple[Footprint, Footprint] | None = None
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        """True when the verdict is PASS: exit code 0, else 1."""
        return self.verdict is Verdict.PASS

    def to_json(self) -> dict[str, Any]:
        """Plain values only. Numbers that JSON lacks are null: an infinite `sqnr_db` belongs to equal outputs."""
        found: dict[str, Any] = _plain(dataclasses.asdict(self))
        return {"schema": found.pop("schema"), **found}

    def to_table(self, console: rich.console.Console) -> None:
        """Print one readable table and the verdict with its reasons."""
        from onnxcompress.validation.table import show

        show(self, console)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return value
