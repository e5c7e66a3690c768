"""What a diagnosis found."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

STANDS_OUT = 4.0  # times the error that a layer's integers and codebooks explain


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One value that both models have. Errors are relative, root-mean-square over all data.

    `error`: in the compressed model as it runs; `own`: with the original's values put in, so that nothing wrong enters;
    `expected`: what rounding to the layer's own steps and codebooks explains of `own`. `suspect`: what its weights or
    its place in the graph show without data, "" for nothing.
    """

    layer: str
    operator: str
    weights: tuple[str, ...]
    error: float
    own: float
    expected: float
    suspect: str = ""

    @property
    def excess(self) -> float:
        """`own` in units of what is expected."""
        return self.own / self.expected if math.isfinite(self.own) else math.inf


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Layers in the order of the graph. `blamed`: the layers to look at, the first one first, with reasons.

    `inputs`: data or synthetic. `notes`: what else than a fault may explain an error.
    """

    layers: tuple[LayerRow, ...]
    blamed: tuple[tuple[str, str], ...]
    samples: int
    inputs: str = "data"
    notes: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """True when no layer stands out: exit code 0, else 1."""
        return not self.blamed

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [{**dataclasses.asdict(row), "excess": row.excess} for row in self.layers]
        blamed = [{"layer": layer, "reason": reason} for layer, reason in self.blamed]
        return {
            "schema": 1,
            "samples": self.samples,
            "inputs": self.inputs,
            "blamed": blamed,
            "layers": rows,
            "notes": self.notes,
        }
