"""In which order samples are trained on."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.model.load import load
from onnxcompress.training.order import Order
from onnxcompress.training.samples import collect
from tests.training.small import opened, sequences, tagger

LENGTHS = np.random.default_rng(0).geometric(1 / 12, 1000)


@pytest.mark.parametrize("sorted_by", [None, LENGTHS])
@pytest.mark.parametrize(("count", "batch"), [(40, 32), (32, 32), (7, 3), (5, 4), (3, 8), (100, 7)])
def test_no_sample_is_passed_over_more_than_another(count: int, batch: int, sorted_by: np.ndarray | None) -> None:
    lengths = None if sorted_by is None else sorted_by[:count]
    order = Order(count, batch, 3, lengths)
    epochs = order.batch
    updates = [order.samples(update) for update in range(order.updates(epochs))]
    assert {len(chosen) for chosen in updates} == {min(batch, count)}
    assert np.bincount(np.concatenate(updates)).tolist() == [epochs] * count
    assert [order.updates(n + 1) - order.updates(n) >= 1 for n in range(epochs)] == [True] * epochs
    again = Order(count, batch, 3, lengths)
    for update in reversed(range(len(updates))):  # a resumed training begins anywhere
        np.testing.assert_array_equal(again.samples(update), updates[update])
    other = Order(count, batch, 4, lengths)
    assert batch > count or any(
        not np.array_equal(other.samples(update), chosen) for update, chosen in enumerate(updates)
    )


def test_a_batch_holds_sequences_of_about_one_length() -> None:
    """How many positions are computed for one that is real."""
    cost = {}
    for name, lengths in (("random", None), ("sorted", LENGTHS)):
        order = Order(1000, 32, 0, lengths)
        chosen = [order.samples(update) for update in range(order.updates(5))]
        cost[name] = sum(32 * LENGTHS[c].max() for c in chosen) / sum(LENGTHS[c].sum() for c in chosen)
    assert cost["random"] > 3
    assert cost["sorted"] < 1.5


def test_batches_of_long_sequences_do_not_come_together_and_not_with_the_same_neighbours() -> None:
    order = Order(1000, 10, 0, LENGTHS)
    epochs = [[order.samples(e * 100 + update) for update in range(100)] for e in range(2)]
    means = np.array([LENGTHS[chosen].mean() for chosen in epochs[0]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
    first, second = ({frozenset(map(int, chosen)) for chosen in epoch} for epoch in epochs)
    assert not first & second


def test_lengths_are_those_of_the_mask() -> None:
    given = sequences(48)
    assert collect(opened(load(tagger()), given)).lengths is not None
    np.testing.assert_array_equal(collect(opened(load(tagger()), given)).lengths, given["attention_mask"].sum(1))
