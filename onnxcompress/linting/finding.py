"""One finding of the lint, and all of them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Level = Literal["error", "warning"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """`level`: error where the target refuses the model or gives other results, warning where it is slow or risky.

    `node`: the node's name with the path of its scope, or "" for the model; `mend`: what to do about it.
    """

    rule: str
    level: Level
    node: str
    operator: str
    message: str
    mend: str


@dataclasses.dataclass(frozen=True)
class Linted:
    """What the lint found. `nodes`: how many nodes it looked at."""

    target: str
    nodes: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that keep the model off the target."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def passed(self) -> bool:
        """True without errors: exit code 0, else 1."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": 1, **dataclasses.asdict(self), "passed": self.passed}
