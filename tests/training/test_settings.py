"""What settings come to."""

from __future__ import annotations

from typing import Any

import pytest

from onnxcompress.errors import PassError
from onnxcompress.training.settings import Settings
from onnxcompress.training.targets import Objective


@pytest.mark.parametrize(("updates", "epochs"), [(1, 30), (10, 30), (31, 10), (100, 3), (101, 3), (5000, 3)])
def test_a_small_set_is_passed_over_more_often(updates: int, epochs: int) -> None:
    assert Settings().epochs_of(updates) == epochs
    assert Settings(epochs=2).epochs_of(updates) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": "foo"}, "schedule: wanted cosine, linear, step, constant, got 'foo'"),
        ({"keep_zeros": "foo"}, "keep_zeros: wanted auto, always, never, got 'foo'"),
        ({"batch_norm": "foo"}, "batch_norm: wanted frozen, trained, got 'foo'"),
        ({"optimizer": "foo"}, "optimizer: wanted adamw, sgd, got 'foo'"),
        ({"lr": -1}, "lr: wanted a number above 0, got -1"),
        ({"lr": float("nan")}, "lr: wanted a number above 0, got nan"),
        ({"clip": -1}, "clip: wanted a norm above 0, or None, got -1"),
        ({"momentum": 2}, "momentum: wanted a share from 0 to below 1, got 2"),
        ({"warmup": 3}, "warmup: wanted a share of the steps, from 0 to below 1, got 3"),
        ({"epochs": 0}, "epochs: wanted at least 1, got 0"),
        ({"batch": 0}, "batch: wanted at least 1, got 0"),
    ],
)
def test_what_no_training_can_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PassError) as error:
        Settings(**given)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"feature_loss": "mse"}, "feature_loss: wanted values, cosine, got 'mse'"),
        ({"loss": "mse"}, "loss: wanted auto, classes, binary, values, cosine, got 'mse'"),
        ({"alpha": 2}, "alpha: wanted a share from 0 to 1, got 2"),
        ({"temperature": 0}, "temperature: wanted a number above 0 and up to 1e+06, got 0"),
        ({"smoothing": 1}, "smoothing: wanted a share from 0 to below 1, got 1"),
    ],
)
def test_what_no_loss_can_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PassError) as error:
        Objective(**given)
    assert str(error.value) == said
