"""The teacher's logits, kept for every sample."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from onnxcompress.contract import Silent
from onnxcompress.model.load import load
from onnxcompress.training import heads, teacher
from onnxcompress.training.samples import collect
from onnxcompress.training.teacher import Teacher
from tests.training.small import arrays, mlp, opened, outputs, sequences, tagger


class _Counted(Silent):
    """How many samples were told of, beside how many there are."""

    def __init__(self) -> None:
        self.total = self.count = 0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.total = total

    def step(self, count: int = 1, now: str = "") -> None:
        self.count += count


@pytest.mark.parametrize("size", [16, 10, 100])
def test_sequences_are_run_without_padding_and_lie_where_they_were(
    size: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given, seen = load(tagger()), sequences(48), []
    samples = collect(opened(model, given))
    of, shown = heads.heads(model), _Counted()
    run = Teacher.logits

    def logits(self: Teacher, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(feeds["input_ids"].size)
        return run(self, feeds)

    monkeypatch.setattr(Teacher, "logits", logits)
    with Teacher(model, of) as guide:
        kept = teacher.cache(guide, samples, size, tmp_path, shown)
    assert kept is not None
    whole = outputs(model, given)["logits"]
    real = given["attention_mask"].astype(bool)
    np.testing.assert_allclose(kept["logits"][real], whole[real], atol=1e-6)
    longest = max(given["attention_mask"].sum(1))
    assert kept["logits"].shape == whole.shape
    assert not kept["logits"][:, longest:].any()
    assert (shown.count, shown.total) == (48, 48)
    if size < 48:
        assert sum(seen[1:]) < 0.8 * given["input_ids"].size  # after a first look at them whole


@pytest.mark.parametrize("size", [16, 24, 50])
def test_every_sample_is_kept_also_in_whole_calls(size: int) -> None:
    model, given = load(mlp()), arrays(50)
    with Teacher(model, heads.heads(model)) as guide:
        kept = teacher.cache(guide, collect(opened(model, given)), size, None, Silent())
    assert kept is not None
    np.testing.assert_allclose(kept["z"], outputs(model, {"x": given["x"]})["z"], atol=1e-6)
