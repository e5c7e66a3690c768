"""How one table of arrays holds a model's inputs: as samples or as whole calls, and how many. Decided from headers
alone."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np

from onnxcompress.data.plan import Keys, Plan
from onnxcompress.data.tables import Header, Table
from onnxcompress.errors import DataError


@dataclasses.dataclass(frozen=True)
class Layout:
    """`units`: samples, or calls when `calls`. `step`: rows an input has in a unit; of whole calls, inputs that are
    missing here have one axis more. `values`: inputs without axes, one value for all or one a call."""

    table: Table
    keys: Keys
    calls: bool
    units: int
    step: dict[str, int]
    values: dict[str, np.ndarray]

    @property
    def varying(self) -> bool:
        """True when an input without axes changes from call to call."""
        return any(value.ndim for value in self.values.values())


def layout_of(table: Table, plan: Plan) -> Layout:
    """Find the inputs in `table`.

    Raises:
        DataError: an input is missing or has another shape, or the inputs disagree on the number of samples.
    """
    keys = plan.keys(table.names, table.where)
    headers = {name: table.header(key) for name, key in keys.inputs.items()}
    scalars = [name for name, header in headers.items() if plan.is_scalar(name, len(header.shape))]
    calls = any(_one_more(headers[name], plan, name) for name in headers if name not in scalars)
    step: dict[str, int] = {}
    extents: dict[str, tuple[int, int]] = {}
    for name, header in headers.items():
        if name in scalars:
            continue
        if calls and _one_more(header, plan, name):
            _check(plan, name, header.shape[1:], header.dtype, table.where, rows=False)
            extents[name] = (header.shape[0], 1)
        else:
            _check(plan, name, header.shape, header.dtype, table.where, rows=True)
            step[name] = (plan.first if calls else plan.multiplicity).get(name, 1)
            extents[name] = (header.shape[0], step[name])
    calls = calls or not extents
    units = _agree(extents, headers, table.where)
    values, units = _values(table, keys, scalars, units, 1 if calls else plan.fixed or 1)
    if keys.labels is not None:
        shape = table.header(keys.labels).shape
        if shape[:1] != (units,):
            raise DataError(
                f"{table.where}: labels {keys.labels!r} have shape {list(shape)}, the inputs hold {units} samples"
            )
    return Layout(table, keys, calls, units, step, values)


def _agree(extents: dict[str, tuple[int, int]], headers: dict[str, Header], where: str) -> int | None:
    """The number of units that all inputs hold: rows divided by the rows of a unit. None: no input has rows."""
    found = {rows // step if rows % step == 0 else -1 for rows, step in extents.values()}
    if len(found) > 1 or -1 in found:
        held = ", ".join(f"{name} {list(headers[name].shape)}" for name in extents)
        raise DataError(
            f"{where}: the inputs hold different numbers of samples: {held}; one row a sample, "
            "or an axis more and one row a whole call"
        )
    return next(iter(found), None)


def _values(
    table: Table, keys: Keys, scalars: list[str], units: int | None, per_call: int
) -> tuple[dict[str, np.ndarray], int]:
    """The inputs without axes, equal values as one; and the number of units, which they decide where nothing else
    does."""
    values = {}
    with contextlib.closing(table.reader()) as reader:
        for name in scalars:
            shape = table.header(keys.inputs[name]).shape
            if len(shape) > 1:
                raise DataError(
                    f"{table.where}: input {name!r}: wanted one value, or one a call, got shape {list(shape)}"
                )
            values[name] = reader.whole(keys.inputs[name])
    if units is None:
        units = max((len(value) for value in values.values() if value.ndim), default=1)
    for name, value in values.items():
        if value.ndim and value.size and (value == value[0]).all():
            values[name] = np.asarray(value[0])
        elif value.ndim and len(value) != -(-units // per_call):
            raise DataError(
                f"{table.where}: input {name!r}: wanted one value, or one for each of {-(-units // per_call)} calls, "
                f"got {len(value)}"
            )
    return values, units


def _one_more(header: Header, plan: Plan, name: str) -> bool:
    wanted = plan.spec(name).rank
    return wanted is not None and len(header.shape) == wanted + 1


def _check(plan: Plan, name: str, shape: tuple[int, ...], dtype: np.dtype, where: str, *, rows: bool) -> None:
    """Refuse what cannot fit before anything is read. Sequences may still be padded to their fixed length."""
    spec, preprocess = plan.spec(name), plan.options.preprocess
    if spec.shape is not None and len(shape) == len(spec.shape):
        if preprocess is not None:
            shape = preprocess.step(name).shape(shape, name)
        fixed = spec.shape[1] if len(shape) > 1 else None
        if name in plan.paddable and isinstance(fixed, int) and shape[1] < fixed:
            shape = (shape[0], fixed, *shape[2:])
    plan.check(name, shape, dtype, where, rows=rows)
