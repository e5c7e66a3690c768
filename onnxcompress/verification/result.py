"""What a verification found."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from onnxcompress.linting import Linted


@dataclasses.dataclass(frozen=True)
class WeightProof:
    """One weight against its parent's.

    `error`: relative root-mean-square error; `largest`: greatest absolute one; both exact. `expected`: the relative
    error that the encoding explains (rounding to its steps, the nearest entries, zeros where it was pruned).
    `against`: what it was compared with; "" where the parent has nothing to compare with.
    `unexplained`: elements whose error the encoding does not explain. `judged`: False for a trained weight, whose
    distance from the parent's is told and not judged. `layers`: outputs of the operators that consume it.
    """

    key: str
    role: str
    encoding: str
    shape: tuple[int, ...]
    bytes: int
    against: str
    error: float
    largest: float
    expected: float
    unexplained: int
    judged: bool
    holds: bool
    why: str
    layers: tuple[str, ...] = ()

    @property
    def excess(self) -> float:
        """Error beyond what the encoding explains, as a ratio: 1 is what was to be expected."""
        return self.error / max(self.expected, 1e-7)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that does not hold. `kind`: weight, missing, extra, structure, activation, provenance or lint.

    `layers`: outputs of the operators it concerns, first the one nearest to it.
    """

    kind: str
    where: str
    message: str
    layers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verification:
    """Whether a file is what its provenance and encodings say of its parent. `notes`: what could not be checked."""

    weights: tuple[WeightProof, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    parent: str
    recipe: str
    bytes: int
    lint: Linted

    @property
    def holds(self) -> bool:
        """True without problems: exit code 0, else 1."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite error (of a parent that is all zero) is null."""
        rows = []
        for row in self.weights:
            plain = dataclasses.asdict(row)
            rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()})
        return {
            "schema": 1,
            "holds": self.holds,
            "parent": self.parent,
            "recipe": self.recipe,
            "bytes": self.bytes,
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
            "weights": rows,
            "lint": self.lint.to_json(),
        }
