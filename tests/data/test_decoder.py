"""Data without a past, for decoders that take one."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.data.source import open_data
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError

IDS = np.arange(20).reshape(4, 5)
PAST = {f"past_key_values.0.{part}": np.ones((4, 2, 3, 4), np.float32) for part in ("key", "value")}


def test_a_text_starts_without_a_past(decoder: list[InputSpec]) -> None:
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batches = list(open_data({"input_ids": IDS, "attention_mask": mask}, decoder, batch=3))
    assert [batch.count for batch in batches] == [3, 1]
    feeds = batches[0].feeds
    assert sorted(feeds) == sorted(spec.name for spec in decoder)
    assert feeds["past_key_values.0.key"].shape == feeds["past_key_values.0.value"].shape == (3, 2, 0, 4)
    assert feeds["past_key_values.0.key"].dtype == np.float32
    assert feeds["use_cache_branch"].tolist() == [False]
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]
    assert feeds["position_ids"].dtype == np.int64


def test_what_the_data_has_is_kept(decoder: list[InputSpec]) -> None:
    given = {"input_ids": IDS, "attention_mask": np.ones((4, 8), np.int64), **PAST, "position_ids": IDS % 5 + 3}
    (batch,) = open_data(given, decoder[:-1])
    assert batch.feeds["past_key_values.0.key"].shape == (4, 2, 3, 4)
    np.testing.assert_array_equal(batch.feeds["position_ids"], IDS % 5 + 3)
    assert batch.feeds["attention_mask"].shape == (4, 8)


def test_a_part_of_the_past_is_refused(decoder: list[InputSpec]) -> None:
    given = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "past_key_values.0.key": PAST["past_key_values.0.key"],
    }
    with pytest.raises(DataError, match=r"a part of the past, but nothing for input 'past_key_values\.0\.value'"):
        open_data(given, decoder)


def test_other_inputs_are_still_wanted(decoder: list[InputSpec]) -> None:
    with pytest.raises(DataError, match="nothing for input 'attention_mask'"):
        open_data({"input_ids": IDS}, decoder)


def test_texts_of_different_lengths_are_padded_with_their_mask(decoder: list[InputSpec]) -> None:
    rows = [np.arange(n) for n in (3, 5, 2)]
    given = {"input_ids": rows, "attention_mask": [np.ones_like(row) for row in rows]}
    (batch,) = open_data(given, decoder, batch=3)
    assert batch.feeds["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.feeds["input_ids"].shape == batch.feeds["position_ids"].shape == (3, 5)
    assert batch.valid is not None
    np.testing.assert_array_equal(batch.valid["input_ids"], batch.feeds["attention_mask"] == 1)


def test_the_same_text_has_the_same_digest_with_its_empty_past_or_without(decoder: list[InputSpec]) -> None:
    given = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    assert open_data(given, decoder).digest() == open_data(dict(reversed(given.items())), decoder).digest()
    changed = {**given, "input_ids": IDS[::-1]}
    assert open_data(given, decoder).digest() != open_data(changed, decoder).digest()
