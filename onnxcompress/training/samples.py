"""Training samples with random access."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np

from onnxcompress.data import sequences
from onnxcompress.data.axes import as_wanted, batch_axes, batch_first
from onnxcompress.data.batch import Data
from onnxcompress.errors import DataError
from onnxcompress.training.targets import IGNORED

IN_MEMORY = 1 << 30  # bytes of an array above which it lies in a file of the work folder


@dataclasses.dataclass(frozen=True)
class Samples:
    """All samples of a data source, the first axis theirs.

    `feeds`: input -> array; those in `constants` go with every call as they are. `labels`: None where there are none.
    `count`: how many samples. `axes`: input -> the axis along which the model wants its samples; 0 for others.
    """

    feeds: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    labels: np.ndarray | None
    count: int
    groups: tuple[sequences.Group, ...] = ()
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The feeds of the samples `indices`, whole."""
        feeds = {name: _wide(np.asarray(array[indices])) for name, array in self.feeds.items()}
        return {**as_wanted(feeds, self.axes), **self.constants}

    def call(self, indices: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The feeds of the samples `indices`, positions that are padding in all of them left out, and which are real.

        Returns: feeds; booleans (samples, positions), None where nothing is padded.
        """
        fitted, valid = sequences.fit(self.rows(indices), self.groups, None, True)
        return fitted, None if valid is None else next(iter(valid.values()))

    @property
    def lengths(self) -> np.ndarray | None:
        """int64 [count]: the positions of each sample up to its last real one; None where calls leave none out."""
        for group in self.groups:
            if group.length is None and len(group.members) > 1 and group.mask in self.feeds:
                real = np.asarray(self.feeds[group.mask]) != 0
                return np.where(real.any(1), real.shape[1] - real[:, ::-1].argmax(1), 0)
        return None


def _wide(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, which `wide.widen` has made of such inputs."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def collect(data: Data, work: pathlib.Path | None = None) -> Samples:
    """Read `data` once; whole calls are taken apart into their samples. Arrays above 1 GiB go to files in `work`.

    Raises:
        DataError: batches do not fit together, or the model wants whole calls that cannot be shuffled into batches.
    """
    stores: dict[str, _Store] = {}
    constants: dict[str, np.ndarray] = {}
    labels: list[np.ndarray] = []
    count = 0
    axes = batch_axes(data.specs)
    fixed = any(s.shape and s.name in axes and isinstance(s.shape[axes[s.name]], int) for s in data.specs)
    for batch in data:
        rows = {name: a for name, a in batch_first(batch.feeds, axes).items() if name in axes and a.ndim}
        for name, array in batch.feeds.items():
            if name not in rows:
                constants.setdefault(name, array)
                if not np.array_equal(constants[name], array):
                    raise DataError(f"input {name!r} has one value a call: such data cannot be shuffled into batches")
        held = _held(rows, batch.count, fixed)
        for name, array in rows.items():
            stores.setdefault(name, _Store(name, work)).add(array[:held])
        if batch.labels is not None:
            given = np.asarray(batch.labels)
            labels.append(given[0] if held > batch.count and given.shape[:2] == (1, held) else given)
        count += held
    if not count:
        raise DataError("data: holds no samples")
    feeds = {name: store.array() for name, store in stores.items()}
    for name, array in feeds.items():
        if len(array) != count:
            raise DataError(f"input {name!r}: {len(array)} rows for {count} samples")
    return Samples(feeds, constants, _joined(labels, count), count, tuple(sequences.groups(data.specs)), axes)


def _held(rows: Mapping[str, np.ndarray], count: int, fixed: bool) -> int:
    """How many samples the rows of one call hold: a whole call more than `count`, which says one. Repetitions of the
    last, with which a `fixed` batch is filled up, are none.

    Raises:
        DataError: the inputs hold different numbers.
    """
    sizes = {name: len(array) for name, array in rows.items()}
    most = max(sizes.values(), default=count)
    if min(sizes.values(), default=count) != most or most < count:
        told = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
        raise DataError(f"the inputs of one call hold different numbers of samples ({told}), and should {count}")
    while fixed and most > count and all(np.array_equal(array[most - 1], array[most - 2]) for array in rows.values()):
        most -= 1
    return most


def _joined(labels: list[np.ndarray], count: int) -> np.ndarray | None:
    """All labels; where they are of positions, those that shorter sequences do not have are left out of the loss."""
    if not labels:
        return None
    if (given := sum(len(part) for part in labels)) != count:
        raise DataError(f"labels: {given} for {count} samples: all have them, or none")
    if all(part.ndim == 2 and part.dtype.kind in "iu" for part in labels):
        longest = max(part.shape[1] for part in labels)
        padded = [((0, 0), (0, longest - part.shape[1])) for part in labels]
        if any(pad[1][1] for pad in padded):
            pairs = zip(labels, padded, strict=True)
            labels = [np.pad(part.astype(np.int64), pad, constant_values=IGNORED) for part, pad in pairs]
    try:
        return np.concatenate(labels)
    except ValueError as error:
        raise DataError("labels: samples differ in their shape; bring them to one") from error


class _Store:
    """Rows added one batch after the other; sequences of different lengths are padded to the longest."""

    def __init__(self, name: str, work: pathlib.Path | None) -> None:
        self._name, self._work = name, work
        self._parts: list[np.ndarray] = []
        self._file: pathlib.Path | None = None
        self._bytes = 0
        self._rows = 0

    def add(self, array: np.ndarray) -> None:
        self._bytes += array.nbytes
        self._rows += len(array)
        if self._work is not None and self._bytes > IN_MEMORY and self._file is None:
            with tempfile.NamedTemporaryFile(dir=self._work, suffix=".spill", delete=False) as file:
                self._file = pathlib.Path(file.name)
            waiting, self._parts = self._parts, []
            for part in waiting:
                self._append(part)
        if self._file is not None:
            self._append(array)
        else:
            self._parts.append(np.array(array))

    def _append(self, array: np.ndarray) -> None:
        if self._parts and self._parts[0].shape[1:] != array.shape[1:]:
            raise DataError(f"input {self._name!r}: samples differ in shape; pad them to one length first")
        self._parts = [array[:0].copy()]
        assert self._file is not None
        with open(self._file, "ab") as file:
            np.ascontiguousarray(array).tofile(file)

    def array(self) -> np.ndarray:
        if self._file is not None:
            like = self._parts[0]
            return np.memmap(self._file, like.dtype, "r", shape=(self._rows, *like.shape[1:]))
        if self._parts[0].ndim > 1 and len({part.shape[1] for part in self._parts}) > 1:
            longest = max(part.shape[1] for part in self._parts)
            self._parts = [sequences.pad_positions(part, longest) for part in self._parts]
        try:
            return np.concatenate(self._parts)
        except ValueError as error:
            raise DataError(f"input {self._name!r}: samples differ in shape; bring them to one") from error


def call_size(batch: int) -> int:
    """How many of `batch` samples one call takes where it may take any number: a half from 16 on, a quarter from 64,
    as far as that divides it (the kernels are chosen for calls of one shape).

    Calls run side by side, each on one thread, where several threads of one call gain little (ONNX Runtime 1.32). The
    number follows from the batch and not from the threads, so that a result does not depend on the machine.
    """
    most = 4 if batch >= 64 else 2 if batch >= 16 else 1
    return batch // max(parts for parts in (1, 2, 4) if parts <= most and batch % parts == 0)
