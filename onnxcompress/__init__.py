"""onnxcompress: make an ONNX model smaller and faster, and prove that it is still right.

Everything here is loaded on first use, so that `onnxcompress --help` starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from onnxcompress.api import compress as compress
    from onnxcompress.benchmarking import bench as bench
    from onnxcompress.diagnosis import diagnose as diagnose
    from onnxcompress.inspection import inspect as inspect
    from onnxcompress.learning import distill as distill
    from onnxcompress.learning import train as train
    from onnxcompress.linting import lint as lint
    from onnxcompress.model.load import load as load
    from onnxcompress.model.save import save as save
    from onnxcompress.model.weights import weights as weights
    from onnxcompress.recipe import Recipe as Recipe
    from onnxcompress.validation.validate import validate as validate
    from onnxcompress.verification import verify as verify

_WHERE = {
    "Recipe": "onnxcompress.recipe",
    "bench": "onnxcompress.benchmarking",
    "compress": "onnxcompress.api",
    "diagnose": "onnxcompress.diagnosis",
    "distill": "onnxcompress.learning",
    "inspect": "onnxcompress.inspection",
    "lint": "onnxcompress.linting",
    "load": "onnxcompress.model.load",
    "save": "onnxcompress.model.save",
    "train": "onnxcompress.learning",
    "validate": "onnxcompress.validation.validate",
    "verify": "onnxcompress.verification",
    "weights": "onnxcompress.model.weights",
}

__all__ = [
    "Recipe",
    "bench",
    "compress",
    "diagnose",
    "distill",
    "inspect",
    "lint",
    "load",
    "save",
    "train",
    "validate",
    "verify",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'onnxcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
