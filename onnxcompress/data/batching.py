"""Cut and join pieces of feeds into batches of a wanted number of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnxcompress.data.sequences import pad_positions

_FEED_BYTES = 64 << 20  # the default batch is bounded so that no feed is larger
_DEFAULT_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some consecutive samples at the rank of the inputs.

    `units`: how many samples. An array in `feeds` has `units` x its input's multiplicity rows; arrays named in
    `constants` go with every sample and are not cut. `start`: index of the first sample in the source. `whole`: one
    call as the user wants it, never cut or joined.
    """

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None
    units: int
    start: int
    constants: frozenset[str] = frozenset()
    whole: bool = False

    def cut(self, start: int, stop: int, multiplicity: Mapping[str, int]) -> Piece:
        """Samples `start` to `stop` of this piece."""
        if start == 0 and stop == self.units:
            return self
        feeds = {
            name: array
            if name in self.constants
            else array[start * multiplicity.get(name, 1) : stop * multiplicity.get(name, 1)]
            for name, array in self.feeds.items()
        }
        labels = None if self.labels is None else self.labels[start:stop]
        return Piece(feeds, labels, stop - start, self.start + start, self.constants)


class Batcher:
    """Collects pieces and gives them back in batches of `size` samples.

    Pieces that do not fit together (other shapes where padding is not allowed, other constants) are never mixed: the
    batch before is closed early. With `fixed`, a batch that stays short is dropped, or with `fill` filled up by
    repeating its last sample.
    """

    def __init__(
        self, size: int, *, paddable: frozenset[str], multiplicity: Mapping[str, int], fixed: bool, fill: bool
    ) -> None:
        self.size, self._paddable, self._multiplicity = size, paddable, multiplicity
        self._fixed, self._fill = fixed, fill
        self._pending: list[Piece] = []
        self._units = 0

    def push(self, piece: Piece) -> Iterator[Piece]:
        """Add a piece; yields the batches that became full."""
        if self._pending and not self._fits(self._pending[0], piece):
            yield from self.flush()
        done = 0
        while done < piece.units:
            take = min(self.size - self._units, piece.units - done)
            self._pending.append(piece.cut(done, done + take, self._multiplicity))
            self._units += take
            done += take
            if self._units == self.size:
                yield from self._take()

    def flush(self) -> Iterator[Piece]:
        """Yield what is left, as far as it may stand alone."""
        if not self._pending:
            return
        if self._fixed and not self._fill:
            self._pending, self._units = [], 0
            return
        yield from self._take()

    def _take(self) -> Iterator[Piece]:
        pieces, self._pending, self._units = self._pending, [], 0
        yield join(pieces, self._paddable)

    def fill(self, piece: Piece) -> dict[str, np.ndarray]:
        """The feeds of `piece`, filled up to a whole fixed batch."""
        missing = self.size - piece.units
        if not self._fixed or missing <= 0:
            return piece.feeds
        feeds = dict(piece.feeds)
        for name, array in piece.feeds.items():
            if name not in piece.constants:
                last = array[-self._multiplicity.get(name, 1) :]
                feeds[name] = np.concatenate([array, *[last] * missing])
        return feeds

    def _fits(self, one: Piece, other: Piece) -> bool:
        if one.constants != other.constants or (one.labels is None) != (other.labels is None):
            return False
        if one.labels is not None and other.labels is not None and one.labels.shape[1:] != other.labels.shape[1:]:
            return False
        for name, array in one.feeds.items():
            given = other.feeds[name]
            if name in one.constants:
                if not np.array_equal(array, given):
                    return False
            elif _row_shape(array, name in self._paddable) != _row_shape(given, name in self._paddable):
                return False
        return True


def _row_shape(array: np.ndarray, paddable: bool) -> tuple[int, ...]:
    return array.shape[2:] if paddable else array.shape[1:]


def join(pieces: Sequence[Piece], paddable: frozenset[str]) -> Piece:
    """One piece of several that fit together, sequences padded to the longest."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    feeds = {}
    for name, array in first.feeds.items():
        arrays = [piece.feeds[name] for piece in pieces]
        if name in first.constants:
            feeds[name] = array
            continue
        if name in paddable:
            longest = max(item.shape[1] for item in arrays)
            arrays = [pad_positions(item, longest) for item in arrays]
        feeds[name] = np.concatenate(arrays)
    labels = None
    if first.labels is not None:
        labels = np.concatenate([piece.labels for piece in pieces if piece.labels is not None])
    return Piece(feeds, labels, sum(piece.units for piece in pieces), first.start, first.constants)


def default_batch(sample_bytes: int, samples: int | None) -> int:
    """A batch for a dynamic first axis: at most 32 samples, all there are, or 64 MB in the largest feed."""
    most = _DEFAULT_BATCH if samples is None else min(_DEFAULT_BATCH, samples)
    return max(1, min(most, _FEED_BYTES // max(1, sample_bytes)))
