"""Word and character error rates: jiwer's values, CTC decoding by hand, and what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.data.batch import Batch
from onnxcompress.errors import MetricError
from onnxcompress.validation.metrics import metric_named
from onnxcompress.validation.samples import Samples
from onnxcompress.validation.speech import CharacterErrorRate, WordErrorRate, edit_distance

MEANT = ["the cat sat on the mat", "hello world", "a  quick brown fox ", "one two three"]
SAID = ["the cat sit on mat", "hello wild world", "a quick brown fox", ""]


def evaluate(metric: CharacterErrorRate, outputs: dict[str, Any], labels: Any) -> Samples:
    array = np.asarray(labels)
    return metric.finish(metric.columns(outputs, Batch({}, array, None, len(array), 0)))


def test_strings_as_jiwer_counts() -> None:
    outputs = {"text": np.array(SAID, object)}
    words = evaluate(WordErrorRate(), outputs, MEANT)
    # jiwer 4.0.0: wer(MEANT, SAID), cer(MEANT, SAID).
    assert words.score() == pytest.approx(0.4)
    assert words.columns["errors"].tolist() == [2, 1, 0, 3]
    assert evaluate(CharacterErrorRate(), outputs, MEANT).score() == pytest.approx(0.375)
    assert not words.higher_is_better


def slow_distance(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return slow_distance(one[1:], other[1:])
    return 1 + min(slow_distance(one[1:], other), slow_distance(one, other[1:]), slow_distance(one[1:], other[1:]))


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_the_recursive_definition(one: str, other: str) -> None:
    assert edit_distance(one, other) == slow_distance(one, other)


def scores(ids: list[list[int]], tokens: int) -> dict[str, Any]:
    return {"logits": np.eye(tokens, dtype=np.float32)[np.array(ids)]}


def test_ctc_is_decoded_greedily() -> None:
    frames = scores([[0, 1, 1, 0, 1, 2, 2, 0], [3, 3, 3, 0, 0, 2, 0, 0]], 4)  # 1 1 2 and 3 2
    found = evaluate(CharacterErrorRate(), frames, [[1, 1, 2, -1], [3, 1, 2, 1]])
    assert found.columns["errors"].tolist() == [0, 2]
    assert found.columns["length"].tolist() == [3, 4]
    # Labels that use 0 leave the last id for the blank.
    last = evaluate(CharacterErrorRate(), scores([[0, 0, 3, 0, 1]], 4), [[0, 0, 1]])
    assert last.score() == 0
    words = evaluate(WordErrorRate(blank=0, separator=3), frames, [[1, 1, 2, -1], [3, 3, 2, 1]])
    assert (words.columns["errors"].tolist(), words.columns["length"].tolist()) == ([0, 1], [1, 1])


def test_ids_are_compared_as_they_are() -> None:
    found = evaluate(CharacterErrorRate(), {"ids": np.array([[5, 6, -1]])}, [[5, 7, 8]])
    assert found.score() == pytest.approx(2 / 3)


def test_what_does_not_fit() -> None:
    with pytest.raises(MetricError, match="the labels are strings, but output 'ids' holds token ids"):
        evaluate(CharacterErrorRate(), {"ids": np.array([[1]])}, ["a"])
    with pytest.raises(MetricError, match="nothing tells where words"):
        evaluate(WordErrorRate(), {"ids": np.array([[1, 2]])}, [[1, 2]])
    with pytest.raises(MetricError, match="is 2, the blank"):
        evaluate(CharacterErrorRate(blank=2), scores([[1]], 3), [[2]])
    assert {type(metric_named(name)[1]) for name in ("wer", "cer")} == {WordErrorRate, CharacterErrorRate}
