"""In which order samples are trained on."""

from __future__ import annotations

import numpy as np

TOGETHER = 16  # batches among which samples are sorted by their length


class Order:
    """Which samples each update takes: `batch` of `count`, in an order that follows from the seed alone.

    An epoch is a permutation of the samples, drawn from the seed and its number. The epochs follow each other and are
    cut into batches of one size: a rest that fills none begins the next epoch's first, so that no sample is passed over
    more than another, and every call keeps its shape.

    `lengths` [count]: of sequences, whose padding costs as much as they do. Then 16 batches at a time are sorted by
    length and taken in random order, so that a batch holds sequences of about one length, another one each epoch.
    """

    def __init__(self, count: int, batch: int, seed: int, lengths: np.ndarray | None = None) -> None:
        self.count, self.batch, self._seed, self._lengths = count, min(batch, count), seed, lengths
        self._drawn: dict[int, np.ndarray] = {}

    def updates(self, epochs: int) -> int:
        """How many updates so many epochs, from the first, have room for."""
        return epochs * self.count // self.batch

    def samples(self, update: int) -> np.ndarray:
        """The samples of update `update`, int64 [batch]."""
        epoch, at = divmod(update * self.batch, self.count)
        found = self._epoch(epoch)[at : at + self.batch]
        missing = self.batch - len(found)
        return np.concatenate([found, self._epoch(epoch + 1)[:missing]]) if missing else found

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._drawn:
            generator = np.random.default_rng([self._seed, epoch])
            drawn = generator.permutation(self.count)
            if self._lengths is not None:
                drawn = self._grouped(drawn, -epoch * self.count % self.batch, self._lengths[drawn], generator)
            self._drawn = {number: order for number, order in self._drawn.items() if number == epoch - 1}
            self._drawn[epoch] = drawn
        return self._drawn[epoch]

    def _grouped(self, drawn: np.ndarray, lead: int, lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """`drawn` with its whole batches made of like lengths. The first `lead` end the batch before."""
        whole = (len(drawn) - lead) // self.batch * self.batch
        places = np.arange(len(drawn))
        inner = places[lead : lead + whole]
        for at in range(0, whole, TOGETHER * self.batch):
            part = inner[at : at + TOGETHER * self.batch]
            part[:] = part[np.argsort(lengths[part], kind="stable")]
        batches = inner.reshape(-1, self.batch)
        batches[:] = batches[generator.permutation(len(batches))]
        return drawn[places]


def split(chosen: np.ndarray, size: int) -> list[np.ndarray]:
    """The samples of one update in calls of at most `size`."""
    return [chosen[at : at + size] for at in range(0, len(chosen), size)]
