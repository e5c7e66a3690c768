"""The report of one step of a recipe, as the command line prints it and the JSON report holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from onnxcompress.contract import Coverage, Left, Reason, Touched
from onnxcompress.proof import Proof


@dataclasses.dataclass
class StepReport:
    """What one pass did. `score_before`, `score`: of the model before and after it, where data and a metric were given.

    `skipped`: why its work was undone and the model left as it was before it.
    """

    name: str
    parameters: dict[str, Any]
    seconds: float
    bytes_before: int
    bytes_after: int
    coverage: Coverage
    proof: Proof | None = None
    score_before: float | None = None
    score: float | None = None
    skipped: str | None = None
    resumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """The step as the JSON report has it."""
        touched = [
            {"weight": t.key, "bytes_before": t.bytes_before, "bytes_after": t.bytes_after, "error": t.error}
            | ({"detail": t.detail} if t.detail else {})
            for t in self.coverage.touched
        ]
        left = [
            {"weight": entry.key, "bytes": entry.bytes, "reason": entry.reason.value, "detail": entry.detail}
            for entry in self.coverage.left
        ]
        return {
            "name": self.name,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 3),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "touched": touched,
            "left": left,
            "rewrites": self.coverage.rewrites,
            "warnings": self.coverage.warnings,
            "cosine": self.proof.cosine if self.proof else None,
            "top1": self.proof.top1 if self.proof else None,
            "latency_ratio": self.proof.latency_ratio if self.proof else None,
            "inputs": self.proof.inputs if self.proof else None,
            "score_before": self.score_before,
            "score": self.score,
            "skipped": self.skipped,
            "resumed": self.resumed,
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> StepReport:
        """A step as `--resume` finds it: everything but the comparison of outputs."""
        touched = [
            Touched(t["weight"], t["bytes_before"], t["bytes_after"], t["error"], t.get("detail", ""))
            for t in stored["touched"]
        ]
        left = [Left(x["weight"], x["bytes"], Reason(x["reason"]), x["detail"]) for x in stored["left"]]
        return StepReport(
            name=stored["name"],
            parameters=stored["parameters"],
            seconds=stored["seconds"],
            bytes_before=stored["bytes_before"],
            bytes_after=stored["bytes_after"],
            coverage=Coverage(touched, left, stored["rewrites"], stored["warnings"]),
            score_before=stored["score_before"],
            score=stored["score"],
            skipped=stored["skipped"],
            resumed=True,
        )
