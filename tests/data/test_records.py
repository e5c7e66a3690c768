from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnxcompress.data.records import Records
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError

X = np.random.default_rng(0).standard_normal((6, 3, 4, 5)).astype(np.float32)


class Reader:
    """Shaped like onnxruntime's CalibrationDataReader, which cannot start again by itself."""

    def __init__(self) -> None:
        self.at = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self.at >= len(X):
            return None
        self.at += 2
        return {"x": X[self.at - 2 : self.at]}


class Rewindable(Reader):
    def rewind(self) -> None:
        self.at = 0


def generator() -> Iterator[dict[str, np.ndarray]]:
    for at in range(0, 6, 2):
        yield {"x": X[at : at + 2]}


@pytest.mark.parametrize("source", [Reader, Reader(), Rewindable(), generator, generator(), list(generator())])
def test_every_iteration_starts_again(source: Any, image: list[InputSpec]) -> None:
    data = open_data(source, image)
    for _ in range(3):
        assert [batch.count for batch in data] == [2, 2, 2]
        np.testing.assert_array_equal(np.concatenate([feeds["x"] for feeds in data.feeds()]), X)
    assert data.digest() == open_data({"x": X}, image).digest()
    assert data.len_hint() is None


def test_dicts_are_rebatched_when_a_batch_is_asked_for_or_fixed(image: list[InputSpec]) -> None:
    assert [batch.count for batch in open_data(generator, image, batch=4)] == [4, 2]
    fixed = [InputSpec("x", np.dtype(np.float32), (4, 3, 4, 5))]
    assert [batch.count for batch in open_data(generator, fixed)] == [4]
    assert [batch.count for batch in open_data(generator, fixed, last="fill")] == [4, 2]
    assert [batch.count for batch in open_data(generator, image, limit=3)] == [2, 1]


def test_an_endless_generator_is_read_up_to_the_limit(image: list[InputSpec]) -> None:
    def endless() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield {"x": X[:1]}

    for source in (endless, endless()):
        data = open_data(source, image, limit=5)
        assert sum(batch.count for batch in data) == 5
        assert len(data.digest()) == 64


def test_a_function_in_a_file(tmp_path: pathlib.Path, image: list[InputSpec]) -> None:
    (tmp_path / "helper.py").write_text("ROWS = 3\n")
    (tmp_path / "feed.py").write_text(
        "import numpy as np\nfrom helper import ROWS\n"
        "def feeds():\n    for i in range(ROWS):\n        yield {'x': np.full((3, 4, 5), i, 'u1'), 'y': i}\n"
        "def broken():\n    yield {'x': np.zeros((3, 4, 5))}\n    raise ValueError('no more\\nfiles')\n"
        "def needs(argument):\n    return []\n"
        "def tuples():\n    return [(1, 2)]\n"
    )
    (batch,) = open_data(f"{tmp_path}/feed.py:feeds", image)
    assert batch.labels is not None
    assert (batch.labels.tolist(), str(batch.feeds["x"].dtype)) == ([0, 1, 2], "float32")
    assert batch.feeds["x"][:, 0, 0, 0].tolist() == [0, 1, 2]
    for name, message in [
        ("broken", r"feed\.py:broken: raised ValueError: no more files \(line 8 of feed\.py\)"),
        ("needs", "raised TypeError"),
        ("tuples", "wanted dicts .*, got tuple"),
        ("missing", "has no function 'missing'"),
    ]:
        with pytest.raises(DataError, match=message):
            list(open_data(f"{tmp_path}/feed.py:{name}", image))
    (tmp_path / "bad.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(DataError, match="raised ModuleNotFoundError"):
        open_data(f"{tmp_path}/bad.py:feeds", image)
    with pytest.raises(DataError, match="no such file"):
        open_data(f"{tmp_path}/none.py:feeds", image)


def test_what_is_read_once_goes_to_a_file_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.data.records._SPOOL_BYTES", 1000)
    rows = [{"x": np.arange(300) + at, "r": [np.arange(2), np.arange(3)], "s": np.array(["a", "é"])} for at in range(4)]
    records = Records(iter(rows), "rows")
    first, second = iter(records), iter(records)
    assert next(first)["x"][0] == 0  # two readers, interleaved
    assert [item["x"][0] for item in second] == [0, 1, 2, 3]
    assert [item["x"][0] for item in first] == [1, 2, 3]
    for item in records:
        assert [row.tolist() for row in item["r"]] == [[0, 1], [0, 1, 2]]
        assert list(item["s"]) == ["a", "é"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no samples"),
        ([{"x": X, "y": np.arange(5)}], "5 labels for 6 samples"),
        ([{"x": X}, {"z": X}], "holds nothing for input 'x'"),
        ([{"x": X}, {"x": X[:, :2]}], r"wanted float32\[batch, 3, 4, 5\], got float32\[6, 2, 4, 5\]"),
        ([{"x": X[0, 0]}], r"got float32\[4, 5\]"),
        ([{"x": object()}], "wanted an array"),
        ([{"x": [[1, [2]], [3]]}], "'x'"),
    ],
)
def test_dicts_that_do_not_fit_are_refused(image: list[InputSpec], records: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(open_data(records, image))
    assert "\n" not in str(caught.value)


def test_mixed_ranks_in_one_dict_are_refused(tokens: list[InputSpec]) -> None:
    with pytest.raises(DataError, match="mix samples and whole batches"):
        open_data([{"ids": np.ones((2, 4), np.int64), "attention_mask": np.ones(4, np.int64)}], tokens)
