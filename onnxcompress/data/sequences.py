"""Sequences of different lengths: which inputs share a sequence axis with a mask, how they are padded, trimmed and
marked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.data.sizes import Sizes, axis_key
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError

_MASKS = ("attention_mask", "attn_mask", "input_mask")
_AXIS = 1  # rows, then positions


@dataclasses.dataclass(frozen=True)
class Group:
    """A mask input (rows, positions; 1 = real, 0 = padding) and the inputs that have its positions as their second
    axis, the mask among them.

    `length`: the model's fixed number of positions, None when dynamic. `named`: a symbol of the model says that the
    positions are the same; without it only arrays of the mask's own length are taken to share them.
    """

    mask: str
    members: tuple[str, ...]
    length: int | None
    named: bool


def groups(specs: Sequence[InputSpec]) -> list[Group]:
    """The mask inputs of a model. A mask is known by its name and by having two axes."""
    masks = [spec for spec in specs if spec.rank == 2 and _is_mask(spec.name)]
    found = []
    for mask in masks:
        assert mask.shape is not None
        dim = mask.shape[_AXIS]
        if not isinstance(dim, str) and len(masks) > 1:
            continue  # without a symbol nobody knows which of two sequences an input belongs to
        members = tuple(spec.name for spec in specs if _same_axis(spec, dim))
        new = _new_positions(specs, dim)
        named = isinstance(dim, str) and not new
        found.append(Group(mask.name, (*members, *new), dim if isinstance(dim, int) else None, named))
    return found


def _new_positions(specs: Sequence[InputSpec], dim: int | str | None) -> tuple[str, ...]:
    """The inputs that have the positions of a mask less those of the past, which are as many where there is no past."""
    sizes = Sizes(specs)
    if dim not in sizes.sums or not sizes.past:
        return ()
    return tuple(
        spec.name
        for spec in specs
        if (spec.rank or 0) > _AXIS and "past" not in spec.name.lower() and axis_key(spec, _AXIS) in sizes.free
    )


def _is_mask(name: str) -> bool:
    lower = name.lower()
    return lower == "mask" or (any(known in lower for known in _MASKS) and "causal" not in lower)


def _same_axis(spec: InputSpec, dim: int | str | None) -> bool:
    if spec.shape is None or len(spec.shape) <= _AXIS or "past" in spec.name.lower():
        return False
    return spec.shape[_AXIS] == dim


def paddable(found: Sequence[Group]) -> frozenset[str]:
    """The inputs whose second axis may be padded, because a mask tells the model so."""
    return frozenset(name for group in found for name in group.members)


def pad_positions(array: np.ndarray, length: int) -> np.ndarray:
    """`array` with its second axis filled up to `length` by zeros (empty strings)."""
    missing = length - array.shape[_AXIS]
    if missing <= 0:
        return array
    shape = (array.shape[0], missing, *array.shape[2:])
    blank = np.full(shape, "", object) if array.dtype == object else np.zeros(shape, array.dtype)
    return np.concatenate([array, blank], axis=_AXIS)


def fit(
    feeds: Mapping[str, np.ndarray], found: Sequence[Group], pad_to: int | None, trim: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Pad to the model's fixed length or `pad_to`, or drop positions that no row of the batch uses; and say which are
    real.

    Returns: the feeds, and `Batch.valid`.

    Raises:
        DataError: the inputs of one group differ in length, or are longer than the model allows.
    """
    fitted = dict(feeds)
    valid: dict[str, np.ndarray] = {}
    for group in found:
        members = [name for name in group.members if name in fitted and fitted[name].ndim > _AXIS]
        if group.mask not in members:
            continue
        lengths = {name: fitted[name].shape[_AXIS] for name in members}
        if not group.named:
            members = [name for name in members if lengths[name] == lengths[group.mask]]
            lengths = {name: lengths[name] for name in members}
        if len(set(lengths.values())) > 1:
            raise DataError(
                "inputs that share their positions differ in length: "
                + ", ".join(f"{name} {size}" for name, size in lengths.items())
            )
        wanted = group.length if group.length is not None else pad_to
        if wanted is not None:
            if lengths[group.mask] > wanted:
                raise DataError(
                    f"input {group.mask!r}: sequences of {lengths[group.mask]} positions, wanted at most {wanted}"
                )
            for name in members:
                fitted[name] = pad_positions(fitted[name], wanted)
        mask = fitted[group.mask]
        real = mask != 0
        if not np.array_equal(mask, real.astype(mask.dtype)):
            continue  # not zeros and ones: additive, or something else
        if wanted is None and trim and len(members) > 1:
            used = np.flatnonzero(real.any(axis=0))
            keep = int(used[-1]) + 1 if len(used) else 1
            if keep < real.shape[_AXIS]:
                real = real[:, :keep]
                for name in members:
                    fitted[name] = np.ascontiguousarray(fitted[name][:, :keep])
        if not real.all():
            valid.update(dict.fromkeys(members, real))
    return fitted, valid or None
