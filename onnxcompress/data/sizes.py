"""Sizes for the dynamic axes of a model's inputs, consistent by symbol, and other assignments to try when one is
refused.

A dynamic axis is called by its symbol, an anonymous one `input[axis]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxcompress.data.cast import is_float, is_integer
from onnxcompress.data.specs import InputSpec, input_specs

IDS = "*ids"
"""The key under which `sizes` bounds integers that no table bounds: values 0 to `sizes[IDS]` - 1."""

_SEQUENCE, _PICTURE, _CHANNELS = 8, 32, 3
_TRIED = (8, 16, 32, 64, 128, 224, 256, 512, 576, 640, 1024, 16000, 4, 2, 1)
STATE = re.compile(r"state|hidden|(^|[^a-z])[hc]_?[0n]?([^a-z]|$)|cell")
"""What inputs that hold a recurrent state are called, in lower case."""


def axis_key(spec: InputSpec, axis: int) -> str | None:
    """The name of a dynamic axis, None for a fixed one."""
    dim = spec.shape[axis] if spec.shape is not None else None
    if isinstance(dim, int):
        return None
    return dim if isinstance(dim, str) else f"{spec.name}[{axis}]"


class Sizes:
    """Chooses the size of every dynamic axis of the inputs `specs` of one call.

    `given`: sizes by key, which win over everything. A past axis is one that only inputs with "past" in their name
    have, or whose symbol says so; a sum of symbols and numbers ("past_sequence_length + 1") is the sum of their
    sizes.
    """

    def __init__(self, specs: Sequence[InputSpec], given: Mapping[str, int] | None = None) -> None:
        self.specs, self._given = list(specs), dict(given or {})
        axes = [(spec, axis, key) for spec in specs for axis in range(spec.rank or 0) if (key := axis_key(spec, axis))]
        self._axes = axes
        plain = {key for spec, _, key in axes if "past" not in spec.name.lower()}
        self.batch = {key for spec, axis, key in axes if _is_batch(spec, axis, key)}
        self.past = {key for spec, _, key in axes if key not in self.batch and _is_past(spec, key, shared=key in plain)}
        self.sums = {key for key in plain if "+" in key or ("total" in key.lower() and self.past)}
        if self.past:
            ids = {key for spec, axis, key in axes if axis == 1 and not _is_mask(spec)}
            self.sums |= {
                key
                for spec, axis, key in axes
                if axis == 1 and _is_mask(spec) and key not in ids | self.past | self.batch
            }
        self.free = {key for _, _, key in axes} - self.batch - self.past - self.sums

    def shape(self, spec: InputSpec, batch: int, past: int) -> tuple[int, ...]:
        """The shape of input `spec` in a call with `batch` samples and `past` positions of past. Unknown rank: (1,)."""
        if spec.shape is None:
            return (1,)
        return tuple(
            dim if isinstance(dim, int) else self._size(spec, axis, batch, past) for axis, dim in enumerate(spec.shape)
        )

    def _size(self, spec: InputSpec, axis: int, batch: int, past: int) -> int:
        key = axis_key(spec, axis)
        assert key is not None
        if key in self._given:
            return self._given[key]
        if key in self.batch:
            return batch
        if key in self.past:
            return past
        if key in self.sums:
            return self._sum(key, batch, past)
        return self._default(key)

    def _sum(self, key: str, batch: int, past: int) -> int:
        if "+" not in key:
            return past + self.sequence()
        total = 0
        for part in (part.strip() for part in key.split("+")):
            if part.isdigit():
                total += int(part)
            elif part in self._given:
                total += self._given[part]
            elif part in self.past or "past" in part.lower():
                total += past
            else:
                total += batch if part in self.batch else self._default(part)
        return total

    def sequence(self) -> int:
        """The number of new positions of a call: the second axis of the first input that has a free or fixed one."""
        for spec in self.specs:
            if (spec.rank or 0) < 2 or _is_mask(spec) or "past" in spec.name.lower():
                continue
            assert spec.shape is not None
            dim, key = spec.shape[1], axis_key(spec, 1)
            if key in self.free:
                return self._given.get(key, self._default(key))
            if isinstance(dim, int):
                return dim
        return _SEQUENCE

    def _default(self, key: str) -> int:
        for spec, axis, own in self._axes:
            if own != key:
                continue
            if spec.rank in (4, 5) and _is_picture(spec):
                assert spec.shape is not None
                last = spec.shape[-1] in (1, 3, 4)
                channel = (len(spec.shape) - 1) if last else 1
                return _CHANNELS if axis == channel else _PICTURE
        return _SEQUENCE


def candidate_sizes(model: ir.Model) -> Iterator[dict[str, int]]:
    """Sizes to try one after another, for `synthetic_feeds(model, sizes=...)`: first none (the defaults), then a batch
    of one, small integers (an axis or a class may be meant), and one size for all other dynamic axes: usual lengths of
    sequences, pictures and frames of sound.
    """
    sizes = Sizes(input_specs(model))
    yield {}
    one = dict.fromkeys(sorted(sizes.batch), 1)
    if one:
        yield one
    integers = any(spec.dtype is not None and is_integer(spec.dtype) for spec in sizes.specs)
    if integers:
        yield one | {IDS: 2}
    for size in _TRIED if sizes.free else ():
        yield one | dict.fromkeys(sorted(sizes.free), size)
    if integers:
        yield one | {IDS: 1}


def _is_batch(spec: InputSpec, axis: int, key: str) -> bool:
    lower = key.lower()
    if "[" not in key and ("batch" in lower or lower in ("n", "b", "bs")):
        return "+" not in key
    if axis == 0:
        return "seq" not in lower and "len" not in lower and "time" not in lower
    # Recurrent state is [layers, batch, hidden]; an anonymous axis in it is the batch.
    return key == f"{spec.name}[{axis}]" and STATE.search(spec.name.lower()) is not None


def _is_past(spec: InputSpec, key: str, *, shared: bool) -> bool:
    lower = key.lower()
    if "+" in key or "total" in lower:
        return False
    return ("past" in lower and "[" not in key) or ("past" in spec.name.lower() and not shared)


def _is_mask(spec: InputSpec) -> bool:
    return "mask" in spec.name.lower()


def _is_picture(spec: InputSpec) -> bool:
    return spec.dtype is None or is_float(spec.dtype) or spec.dtype == "uint8"
