"""Two models side by side: whether one can stand in for the other, and how the same feeds go into both."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import ModelError
from onnxcompress.runtime.session import Port, Session


def check_fit(
    original: Session, compressed: Session, one: str = "the original", other: str = "the compressed model"
) -> None:
    """Inputs and outputs by name; types may differ in the width of floats only; fixed axes must agree.

    `one`, `other`: what messages call the two.

    Raises:
        ModelError: naming the first input or output that does not fit.
    """
    _check("input", original.inputs, compressed.inputs, one, other)
    _check("output", original.outputs, compressed.outputs, one, other)
    names = {port.name for port in original.inputs}
    for port in compressed.inputs:
        if port.name not in names and not port.type.startswith("optional("):
            raise ModelError(f"{other} wants an input {port.name!r} that {one} does not have")


def _check(what: str, original: Sequence[Port], compressed: Sequence[Port], first: str, second: str) -> None:
    found = {port.name: port for port in compressed}
    for port in original:
        other = found.get(port.name)
        if other is None:
            has = ", ".join(found) or "none"
            raise ModelError(f"{second} has no {what} {port.name!r} as {first} has; it has: {has}")
        if port.type != other.type and not (_floating(port.type) and _floating(other.type)):
            raise ModelError(f"{what} {port.name!r} is {port.type} in {first}, {other.type} in {second}")
        if what == "input" and not _shapes_fit(port, other):
            raise ModelError(f"{what} {port.name!r} is {list(port.shape)} in {first}, {list(other.shape)} in {second}")


def _floating(kind: str) -> bool:
    return re.fullmatch(r"tensor\((float|double|float16|bfloat16)\)", kind) is not None


def _shapes_fit(one: Port, other: Port) -> bool:
    # onnxruntime gives no shape both for scalars and for unknown ranks.
    if not one.shape or not other.shape:
        return True
    return len(one.shape) == len(other.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in zip(one.shape, other.shape, strict=True)
    )


def narrowed(specs: Sequence[InputSpec], compressed: Session) -> list[InputSpec]:
    """The original's inputs, with axes fixed that only the compressed model fixes, so that the feeds fit both."""
    shapes = {port.name: port.shape for port in compressed.inputs}
    found = []
    for spec in specs:
        other = shapes.get(spec.name)
        if spec.shape and other and len(other) == len(spec.shape):
            dims = [b if isinstance(b, int) and b > 0 else a for a, b in zip(spec.shape, other, strict=True)]
            spec = dataclasses.replace(spec, shape=tuple(dims))
        found.append(spec)
    return found


def feeds_for(session: Session, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """`feeds` in the float width of the session's inputs; inputs it does not have are left out."""
    found = {}
    for port in session.inputs:
        if port.name not in feeds:
            continue
        value, dtype = feeds[port.name], port.dtype
        if (
            isinstance(value, np.ndarray)
            and dtype is not None
            and value.dtype != dtype
            and value.dtype.kind == dtype.kind == "f"
        ):
            value = value.astype(dtype)
        found[port.name] = value
    return found
