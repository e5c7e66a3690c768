"""Tables of what each deployment target accepts and runs fast; read by the quantizer and by the lint."""

from __future__ import annotations

from onnxcompress.errors import RecipeError
from onnxcompress.targets.base import Target
from onnxcompress.targets.cpu import CPU
from onnxcompress.targets.cuda import CUDA
from onnxcompress.targets.portable import PORTABLE
from onnxcompress.targets.tensorrt import TENSORRT

TARGETS: dict[str, Target] = {target.name: target for target in (CPU, CUDA, TENSORRT, PORTABLE)}

__all__ = ["TARGETS", "Target", "find"]


def find(name: str) -> Target:
    """The table of target `name`.

    Raises:
        RecipeError: no such target.
    """
    if name not in TARGETS:
        raise RecipeError(f"unknown target {name!r}: one of {', '.join(TARGETS)}")
    return TARGETS[name]
