"""What a model's inputs ask of the data: which array is which input, how big a batch is, and the last checks before a
call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from onnxcompress.data import sequences
from onnxcompress.data.axes import as_wanted, batch_axes
from onnxcompress.data.batch import Batch
from onnxcompress.data.batching import Batcher, Piece
from onnxcompress.data.cast import safe_cast
from onnxcompress.data.decoder import Start
from onnxcompress.data.preprocess import Preprocess, suggestion
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError

_LABELS = "y"


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of `open_data`."""

    labels: str | None = None
    mapping: Mapping[str, str] = dataclasses.field(default_factory=dict)
    preprocess: Preprocess | None = None
    batch: int | None = None
    limit: int | None = None
    pad_to: int | None = None
    last: Literal["drop", "fill"] = "drop"
    trim: bool = True


@dataclasses.dataclass(frozen=True)
class Keys:
    """Which array of a source is which input, which holds the labels, and which are no concern of the model.

    Inputs that are known when a text starts (`decoder.Start`) may be missing."""

    inputs: dict[str, str]
    labels: str | None
    ignored: list[str]


class Plan:
    """The inputs of one model, and the options, applied to any source.

    Raises:
        DataError: the options do not fit the inputs.
    """

    def __init__(self, specs: Sequence[InputSpec], options: Options) -> None:
        self.specs, self.options = list(specs), options
        self.names = [spec.name for spec in specs]
        if not specs:
            raise DataError("the model has no inputs, so there is nothing to feed")
        for spec in specs:
            if spec.kind != "tensor":
                raise DataError(f"input {spec.name!r} is a {spec.kind}, which arrays cannot feed")
        for key, name in options.mapping.items():
            if name not in self.names:
                raise DataError(f"--map {key}={name}: the model has no input {name!r}{suggestion(name, self.names)}")
        if len(set(options.mapping.values())) < len(options.mapping):
            raise DataError("--map: two arrays are mapped to one input")
        if options.preprocess is not None:
            options.preprocess.check(self.names)
        for what, value in (("batch", options.batch), ("limit", options.limit), ("pad_to", options.pad_to)):
            if value is not None and value < 1:
                raise DataError(f"{what}: wanted at least 1, got {value}")
        self.start = Start(specs)
        self.groups = sequences.groups(specs)
        self.paddable = sequences.paddable(self.groups)
        self.axes = batch_axes(specs)
        held = {spec.name: spec.shape for spec in specs if spec.shape and spec.name in self.axes}
        sizes = {name: dim for name, dims in held.items() if isinstance(dim := dims[self.axes[name]], int)}
        # Inputs with batch axes of different fixed sizes have no common batch: then one sample is one call.
        several = len(set(sizes.values())) > 1
        self.multiplicity: dict[str, int] = sizes if several else {}
        self.first = {name: dims[0] for name, dims in held.items() if isinstance(dims[0], int)}
        self.fixed: int | None = 1 if several else next(iter(sizes.values()), None)
        if self.fixed == 0 or 0 in self.multiplicity.values():
            raise DataError("an input has a fixed first axis of size 0")

    def is_scalar(self, name: str, rank: int) -> bool:
        """True when an array of `rank` axes for input `name` holds single values and no samples."""
        wanted = self.spec(name).rank
        return wanted == 0 or (wanted is None and rank == 0)

    def keys(self, names: Sequence[str], where: str) -> Keys:
        """Find the inputs among the arrays `names` of a source called `where`."""
        options = self.options
        for key in options.mapping:
            if key not in names:
                raise DataError(f"{where}: --map {key}: holds no array {key!r}{suggestion(key, names)}")
        back = {name: key for key, name in options.mapping.items()}
        inputs = {name: back.get(name, name) for name in self.names}
        labels = options.labels or _LABELS
        absent = self.start.absent([name for name, key in inputs.items() if key in names], where)
        inputs = {name: key for name, key in inputs.items() if name not in absent}
        for name, key in inputs.items():
            if key not in names:
                spare = [other for other in names if other not in inputs.values() and other != labels]
                example = spare[0] if spare else "KEY"
                raise DataError(
                    f"{where}: holds nothing for input {name!r} ({self.spec(name).describe()}), "
                    f"only {', '.join(names) or 'nothing'}; "
                    f"name an array as the input, or say --map {example}={name}"
                )
        if options.labels is not None and options.labels not in names:
            raise DataError(f"{where}: --labels {labels}: holds no array {labels!r}{suggestion(labels, names)}")
        found = labels if labels in names and (options.labels is not None or labels not in inputs.values()) else None
        ignored = [name for name in names if name not in inputs.values() and name != found]
        return Keys(inputs, found, ignored)

    def spec(self, name: str) -> InputSpec:
        """The input called `name`."""
        return self.specs[self.names.index(name)]

    def prepare(self, name: str, array: np.ndarray) -> np.ndarray:
        """Preprocess (scalars excepted) and cast an array of the input's rank."""
        spec, preprocess = self.spec(name), self.options.preprocess
        if preprocess is not None and array.ndim:
            array = preprocess.step(name).apply(array, name)
        return safe_cast(array, spec.dtype, name)

    def batcher(self, size: int) -> Batcher:
        """A fresh collector of batches."""
        return Batcher(
            size,
            paddable=self.paddable,
            multiplicity=self.multiplicity,
            fixed=self.fixed is not None,
            fill=self.options.last == "fill",
        )

    def finish(self, piece: Piece, batcher: Batcher | None, where: str) -> Batch:
        """The batch of a prepared piece: filled up, padded, trimmed, checked."""
        feeds = piece.feeds if batcher is None or piece.whole else batcher.fill(piece)
        try:
            feeds, valid = sequences.fit(feeds, self.groups, self.options.pad_to, self.options.trim and not piece.whole)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        feeds = self.start.completed(feeds if piece.whole else as_wanted(feeds, self.axes))
        for spec in self.specs:
            self.check(spec.name, feeds[spec.name].shape, feeds[spec.name].dtype, where)
        if piece.labels is not None and len(piece.labels) != piece.units:
            raise DataError(f"{where}: {len(piece.labels)} labels for {piece.units} samples")
        return Batch(feeds, piece.labels, valid, piece.units, piece.start)

    def check(self, name: str, shape: tuple[int, ...], dtype: np.dtype, where: str, *, rows: bool = False) -> None:
        """Compare the shape of one call (`rows`: of many samples along the first axis) with what the input wants.

        Raises:
            DataError: naming input, wanted and got.
        """
        spec = self.spec(name)
        if spec.shape is None:
            return
        dims = list(spec.shape)
        if rows and dims:
            dims.pop(self.axes.get(name, 0))
            dims.insert(0, None)
        if len(shape) == len(dims) and all(
            size == dim for size, dim in zip(shape, dims, strict=True) if isinstance(dim, int)
        ):
            return
        raise DataError(
            f"{where}: input {name!r}: wanted {spec.describe()}, got {dtype}{list(shape)}{_remedy(shape, spec)}"
        )


def _remedy(shape: tuple[int, ...], spec: InputSpec) -> str:
    wanted = spec.shape or ()
    if len(shape) == len(wanted) == 4 and isinstance(wanted[1], int) and wanted[1] == shape[3] != shape[1]:
        return "; channels come last here: say transpose: [2, 0, 1] in --preprocess"
    if len(shape) == len(wanted) == 4 and isinstance(wanted[3], int) and wanted[3] == shape[1] != shape[3]:
        return "; channels come first here: say transpose: [1, 2, 0] in --preprocess"
    if len(shape) == len(wanted) - 1:
        return "; the first axis must be the samples'"
    return "; is another array meant (--map KEY=INPUT)?"
