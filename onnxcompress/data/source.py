"""`open_data`: one door for every way to hand over data."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from onnxcompress.data.batch import Data
from onnxcompress.data.plan import Options, Plan
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.record_data import RecordData
from onnxcompress.data.records import Records, load_function, split_reference
from onnxcompress.data.specs import InputSpec
from onnxcompress.data.table_data import TableData
from onnxcompress.data.tables import ArrayTable, NpyTable, NpzTable, Table, folder_tables
from onnxcompress.errors import DataError


def open_data(
    source: Any,
    specs: Sequence[InputSpec],
    *,
    labels: str | None = None,
    mapping: Mapping[str, str] | None = None,
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    limit: int | None = None,
    pad_to: int | None = None,
    last: Literal["drop", "fill"] = "drop",
    trim: bool = True,
) -> Data:
    """Open calibration or evaluation data for a model with inputs `specs`, and check that its first batch fits.

    `source`: an .npz; a folder of .npy named as the inputs, or of .npz read one after another; a .npy for a model
    with one input; `file.py:function`; a dict of arrays; a callable, CalibrationDataReader or iterable that yields
    dicts.

    Samples lie along the first axis of an array that has its input's rank. An array of one rank more holds one whole
    call a row (models with state), where `batch` does not matter. From dicts also: an array of one rank less is one
    sample, and a list holds samples of different lengths. An input without axes takes one value for every call, or
    one value a call. A decoder's past, its positions and the flag that it has a past may be missing: then every call
    starts a text.

    `labels`: the array with the labels; when not given, `y` if there is one. `mapping`: array -> input, where names
    differ. `batch`: samples a call for inputs with a dynamic first axis, by default at most 32 and at most 64 MB a
    feed; dicts are passed as they come unless it is given. A fixed first axis decides for itself; with `last="fill"`
    its last batch repeats its last sample (`Batch.count` says how many are real), with "drop" it is left out.
    `limit`: at most so many samples. `pad_to`: pad sequences with a mask to this many positions; else to the longest
    in the batch, and with `trim` positions that are padding in every row of a batch are dropped.

    Raises:
        DataError: one line that says which input wanted what and got what.
    """
    options = Options(labels, dict(mapping or {}), preprocess, batch, limit, pad_to, last, trim)
    if last not in ("drop", "fill"):
        raise DataError(f"last: wanted drop or fill, got {last!r}")
    data = _open(source, Plan(specs, options))
    if next(iter(data), None) is None:
        raise DataError("data: holds no whole batch")
    return data


def _open(source: Any, plan: Plan) -> Data:
    if isinstance(source, (str, os.PathLike)):
        reference = split_reference(os.fspath(source))
        if reference is not None:
            return RecordData(Records(load_function(*reference), os.fspath(source)), plan, os.fspath(source))
        return TableData(_tables(pathlib.Path(source), plan), plan)
    if isinstance(source, Mapping):
        return _open_arrays(source, plan)
    if callable(source) or hasattr(source, "get_next") or isinstance(source, Iterable):
        where = getattr(source, "__name__", None) or type(source).__name__
        return RecordData(Records(source, where), plan, where)
    raise DataError(f"data: wanted a path, arrays, a callable or an iterable of dicts, got {type(source).__name__}")


def _tables(path: pathlib.Path, plan: Plan) -> list[Table]:
    if path.is_dir():
        return folder_tables(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix == ".npz":
        return [NpzTable(path)]
    wanted = [name for name in plan.names if name not in plan.start.names]
    if path.suffix == ".npy" and len(wanted) == 1:
        back = {name: key for key, name in plan.options.mapping.items()}
        (name,) = wanted
        return [NpyTable(str(path), {back.get(name, name): path})]
    if path.suffix == ".npy":
        raise DataError(
            f"{path}: one array for {len(wanted)} inputs ({', '.join(wanted)}); give an .npz or a folder of .npy"
        )
    raise DataError(f"{path}: wanted an .npz, a folder of .npy or .npz, or file.py:function")


def _open_arrays(source: Mapping[Any, Any], plan: Plan) -> Data:
    record = next(iter(Records([source], "data")))
    if any(isinstance(value, list) for value in record.values()):
        return RecordData(Records([record], "data"), plan, "data")
    return TableData(
        [ArrayTable({name: value for name, value in record.items() if isinstance(value, np.ndarray)})], plan
    )
