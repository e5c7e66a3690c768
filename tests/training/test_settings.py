"""What settings come to."""

from __future__ import annotations

import pytest

from onnxcompress.training.settings import Settings


@pytest.mark.parametrize(("updates", "epochs"), [(1, 30), (10, 30), (31, 10), (100, 3), (101, 3), (5000, 3)])
def test_a_small_set_is_passed_over_more_often(updates: int, epochs: int) -> None:
    assert Settings().epochs_of(updates) == epochs
    assert Settings(epochs=2).epochs_of(updates) == 2
