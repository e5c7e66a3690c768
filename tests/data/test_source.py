from __future__ import annotations

import pathlib
import tracemalloc
from typing import Any

import numpy as np
import pytest

from onnxcompress.data.batch import Batch, Data
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = np.random.default_rng(0).standard_normal((70, 3, 4, 5)).astype(np.float32)
Y = np.arange(70)


def joined(data: Data, name: str) -> np.ndarray:
    return np.concatenate([batch.feeds[name][: batch.count] for batch in data])


def counts(data: Data) -> list[tuple[int, int]]:
    return [(batch.start, batch.count) for batch in data]


def refused(message: str, source: object, specs: list[InputSpec], **options: object) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(open_data(source, specs, **options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_samples_come_in_batches_with_their_labels_every_time(tmp_path: pathlib.Path, image: list[InputSpec]) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y, other=np.ones(3))
    data = open_data(tmp_path / "a.npz", image)
    assert (data.len_hint(), data.ignored, data.has_labels) == (70, ["other"], True)
    for _ in range(2):
        assert counts(data) == [(0, 32), (32, 32), (64, 6)]
        np.testing.assert_array_equal(joined(data, "x"), X)
        np.testing.assert_array_equal(np.concatenate([b.labels for b in data if b.labels is not None]), Y)
    assert [feeds["x"].shape for feeds in data.feeds()] == [(32, 3, 4, 5), (32, 3, 4, 5), (6, 3, 4, 5)]
    assert counts(open_data(tmp_path / "a.npz", image, batch=50, limit=60)) == [(0, 50), (50, 10)]


def test_the_default_batch_is_bounded_by_bytes() -> None:
    wide = [InputSpec("x", F32, ("batch", 6 << 20))]
    data = open_data({"x": np.zeros((5, 6 << 20), np.uint8)}, wide)  # 24 MiB a sample once it is float32
    assert counts(data) == [(0, 2), (2, 2), (4, 1)]


def test_streaming_an_npz_holds_a_few_batches(tmp_path: pathlib.Path) -> None:
    x = np.random.default_rng(0).integers(0, 3, (4096, 8192), np.uint8)  # 32 MiB
    np.savez_compressed(tmp_path / "a.npz", x=x)
    data = open_data(tmp_path / "a.npz", [InputSpec("x", np.dtype(np.uint8), ("batch", 8192))], batch=64)
    tracemalloc.start()
    total = sum(int(feeds["x"].sum(dtype=np.int64)) for feeds in data.feeds())
    digest = data.digest()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == int(x.sum(dtype=np.int64))
    assert len(digest) == 64
    assert peak < x.nbytes / 4


def test_the_digest_depends_on_content_alone(tmp_path: pathlib.Path, image: list[InputSpec]) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    np.savez_compressed(tmp_path / "b.npz", y=Y, more=Y, x=X)
    (tmp_path / "files").mkdir()
    np.save(tmp_path / "files" / "x.npy", X)
    np.save(tmp_path / "files" / "y.npy", Y)
    (tmp_path / "parts").mkdir()
    np.savez(tmp_path / "parts" / "1.npz", x=X[:33], y=Y[:33])
    np.savez(tmp_path / "parts" / "2.npz", x=X[33:].astype(">f4"), y=Y[33:])
    sources = [tmp_path / "a.npz", str(tmp_path / "b.npz"), tmp_path / "files", tmp_path / "parts", {"x": X, "y": Y}]
    sources.append([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)])  # one sample a dict
    sources.append(lambda: ({"x": X[at : at + 9], "y": Y[at : at + 9]} for at in range(0, 70, 9)))
    digests = {open_data(source, image).digest() for source in sources}
    assert len(digests) == 1
    assert open_data({"x": X, "y": Y}, image, batch=7).digest() in digests
    assert open_data({"x": X + 1, "y": Y}, image).digest() not in digests
    assert open_data({"x": X, "y": Y + 1}, image).digest() not in digests
    assert open_data({"x": X, "y": Y}, image, limit=69).digest() not in digests


def test_folders_of_npz_are_read_one_after_another(tmp_path: pathlib.Path, image: list[InputSpec]) -> None:
    np.savez(tmp_path / "b.npz", x=X[20:])
    np.savez(tmp_path / "a.npz", x=X[:20])
    data = open_data(tmp_path, image)
    assert counts(data) == [(0, 32), (32, 32), (64, 6)]
    np.testing.assert_array_equal(joined(data, "x"), X)
    assert counts(open_data(tmp_path, image, limit=25)) == [(0, 25)]
    np.save(tmp_path / "x.npy", X)
    refused("holds both", tmp_path, image)


def test_a_lone_npy_feeds_a_lone_input(tmp_path: pathlib.Path, image: list[InputSpec], tokens: list[InputSpec]) -> None:
    np.save(tmp_path / "whatever.npy", X)
    np.testing.assert_array_equal(joined(open_data(tmp_path / "whatever.npy", image), "x"), X)
    refused("one array for 2 inputs", tmp_path / "whatever.npy", tokens)


@pytest.mark.parametrize("size", [1, 8, 70])
def test_a_fixed_batch_is_respected(size: int) -> None:
    specs = [InputSpec("x", F32, (size, 3, 4, 5))]
    source = {"x": X, "y": Y}
    dropped = open_data(source, specs, batch=32)
    assert {batch.feeds["x"].shape[0] for batch in dropped} == {size}
    assert sum(batch.count for batch in dropped) == 70 // size * size
    filled = list(open_data(source, specs, last="fill"))
    assert {batch.feeds["x"].shape[0] for batch in filled} == {size}
    assert sum(batch.count for batch in filled) == 70
    last = filled[-1]
    assert last.labels is not None
    assert len(last.labels) == last.count
    np.testing.assert_array_equal(last.feeds["x"][last.count - 1 :], np.repeat(X[-1:], size - last.count + 1, 0))


def test_too_few_samples_for_a_fixed_batch() -> None:
    specs = [InputSpec("x", F32, (80, 3, 4, 5))]
    refused("holds 70 samples, but the model's batch is fixed at 80", {"x": X}, specs)
    (batch,) = open_data({"x": X}, specs, last="fill")
    assert (batch.count, len(batch.feeds["x"])) == (70, 80)
    refused("holds no (samples|whole batch)", [{"x": X}], specs)


def test_one_rank_more_is_one_whole_call_a_row(tmp_path: pathlib.Path, stateful: list[InputSpec]) -> None:
    arrays: dict[str, Any] = {
        "input": np.random.default_rng(0).standard_normal((9, 1, 16)).astype(np.float32),
        "state": np.random.default_rng(1).standard_normal((9, 2, 1, 8)).astype(np.float32),
        "sr": np.full(9, 16000),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    reader_like = [{name: array[at] for name, array in arrays.items()} for at in range(9)]
    for source in (tmp_path / "a.npz", arrays, [arrays], reader_like):
        calls = list(open_data(source, stateful, batch=4))
        assert [(call.start, call.count) for call in calls] == [(at, 1) for at in range(9)]
        for at, call in enumerate(calls):
            assert call.feeds["sr"].shape == ()
            for name, array in arrays.items():
                np.testing.assert_array_equal(call.feeds[name], array[at])
    assert open_data(tmp_path / "a.npz", stateful).digest() == open_data(arrays, stateful).digest()


def test_an_input_without_axes_takes_one_value_or_one_a_call() -> None:
    specs = [InputSpec("x", F32, ("batch", 2)), InputSpec("sr", I64, ())]
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    for value in (np.int64(7), np.full(5, 7), np.array(7)):
        (batch,) = open_data({"x": x, "sr": value}, specs)
        assert (batch.feeds["sr"].shape, int(batch.feeds["sr"]), batch.count) == ((), 7, 5)
    calls = list(open_data({"x": x, "sr": np.arange(5)}, specs))
    assert [(int(call.feeds["sr"]), call.count) for call in calls] == [(at, 1) for at in range(5)]
    refused("one for each of 5 calls, got 4", {"x": x, "sr": np.arange(4)}, specs)
    refused("wanted one value", {"x": x, "sr": np.zeros((5, 2), np.int64)}, specs)


def test_names_can_be_mapped_and_labels_named(image: list[InputSpec]) -> None:
    data = open_data({"photos": X, "class": Y}, image, mapping={"photos": "x"}, labels="class")
    (first, *_) = data
    assert first.labels is not None
    assert (first.labels.tolist(), data.ignored) == (list(range(32)), [])
    assert open_data({"x": X, "y": Y}, [*image, InputSpec("y", I64, ("batch",))]).has_labels is False
    refused(r"holds nothing for input 'x' .*--map photos=x", {"photos": X}, image)
    refused(
        r"--map photo: holds no array 'photo' \(did you mean 'photos'\?\)", {"photos": X}, image, mapping={"photo": "x"}
    )
    refused("the model has no input 'z'", {"photos": X}, image, mapping={"photos": "z"})
    refused("two arrays", {"a": X, "b": X}, image, mapping={"a": "x", "b": "x"})
    refused("--labels class: holds no array 'class'", {"x": X}, image, labels="class")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": X.transpose(0, 2, 3, 1)},
            r"wanted float32\[batch, 3, 4, 5\], got float32\[70, 4, 5, 3\]; channels come last",
        ),
        ({"x": X[:, :, :, :4]}, r"wanted float32\[batch, 3, 4, 5\], got float32\[70, 3, 4, 4\]"),
        ({"x": X[0]}, r"got float32\[3, 4, 5\]; the first axis must be the samples'"),
        ({"x": X[None, None]}, r"got float32\[1, 1, 70, 3, 4, 5\]"),
        ({"x": X[:0]}, "holds no samples"),
        ({"x": X, "y": Y[:69]}, r"labels 'y' have shape \[69\], the inputs hold 70 samples"),
        ({}, "holds nothing for input 'x'"),
        ({"x": np.full((2, 3, 4, 5), "a")}, "cannot turn"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: pathlib.Path, image: list[InputSpec], arrays: dict[str, np.ndarray], message: str
) -> None:
    refused(message, arrays, image)
    plain: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    np.savez(tmp_path / "a.npz", **plain)
    refused(message, tmp_path / "a.npz", image)


def test_inputs_must_agree_on_the_number_of_samples(tokens: list[InputSpec]) -> None:
    ids = np.ones((4, 6), np.int64)
    refused(
        "different numbers of samples: ids .4, 6., attention_mask .3, 6.",
        {"ids": ids, "attention_mask": ids[:3]},
        tokens,
    )


def test_bad_options_and_sources_are_refused(tmp_path: pathlib.Path, image: list[InputSpec]) -> None:
    refused("no such file or folder", tmp_path / "none.npz", image)
    refused("neither .npy files", tmp_path, image)
    (tmp_path / "a.txt").write_text("x")
    refused("wanted an .npz, a folder", tmp_path / "a.txt", image)
    refused("wanted a path", 3, image)
    refused("batch: wanted at least 1", {"x": X}, image, batch=0)
    refused("limit: wanted at least 1", {"x": X}, image, limit=0)
    refused("has no inputs", {"x": X}, [])
    refused("is a optional", {"x": X}, [InputSpec("x", F32, None, "optional")])


def masked(lengths: list[int], width: int) -> dict[str, np.ndarray]:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return {"ids": mask * np.arange(1, width + 1), "attention_mask": mask}


def test_positions_no_row_uses_are_dropped_and_padding_is_marked(tokens: list[InputSpec]) -> None:
    arrays = masked([3, 5, 8, 8], 12)
    one, other = open_data(arrays, tokens, batch=2)
    assert one.feeds["ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert one.valid is not None
    assert {name: mask.sum() for name, mask in one.valid.items()} == {"ids": 8, "attention_mask": 8}
    assert (other.feeds["ids"].shape, other.valid) == ((2, 8), None)
    (whole, _) = open_data(arrays, tokens, batch=2, trim=False)
    assert whole.feeds["ids"].shape == (2, 12)
    (padded, _) = open_data(arrays, tokens, batch=2, pad_to=20)
    assert padded.feeds["ids"].shape == (2, 20)
    assert padded.valid is not None
    assert int(padded.valid["ids"].sum()) == 8
    refused("sequences of 12 positions, wanted at most 4", arrays, tokens, pad_to=4)


def test_fixed_sequences_are_never_trimmed_but_padded() -> None:
    fixed = [InputSpec("ids", I64, ("batch", 10)), InputSpec("attention_mask", I64, ("batch", 10))]
    (batch,) = open_data(masked([3, 2], 6), fixed)
    assert batch.feeds["ids"].shape == (2, 10)
    assert batch.valid is not None
    assert int(batch.valid["ids"].sum()) == 5
    refused("wanted", masked([3, 2], 12), fixed)
    alone = [InputSpec("ids", I64, ("batch", 10))]
    refused(r"wanted int64\[batch, 10\], got int64\[2, 6\]", {"ids": np.ones((2, 6), np.int64)}, alone)


def test_masks_that_are_not_zeros_and_ones_are_left_alone(tokens: list[InputSpec]) -> None:
    arrays = masked([3, 2], 6)
    arrays["attention_mask"] = (arrays["attention_mask"] - 1) * 10000
    (batch,) = open_data(arrays, tokens)
    assert (batch.feeds["ids"].shape, batch.valid) == ((2, 6), None)


def ragged(batch: Batch) -> list[list[int]]:
    assert batch.valid is not None
    return [row[real].tolist() for row, real in zip(batch.feeds["ids"], batch.valid["ids"], strict=True)]


def test_samples_of_different_lengths_are_padded_with_their_mask(tokens: list[InputSpec]) -> None:
    rows = [np.arange(1, n + 1) for n in (2, 5, 3)]
    ones = [np.ones(len(row), np.int64) for row in rows]
    dicts = [{"ids": row, "attention_mask": one} for row, one in zip(rows, ones, strict=True)]
    objects = np.empty(3, object)
    objects[:] = rows
    for source in (dicts, {"ids": rows, "attention_mask": ones}, {"ids": objects, "attention_mask": ones}):
        (batch,) = open_data(source, tokens)
        assert batch.feeds["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1, 1, 1, 0, 0]]
        assert ragged(batch) == [row.tolist() for row in rows]
    assert len({open_data(source, tokens).digest() for source in (dicts, {"ids": rows, "attention_mask": ones})}) == 1


def test_without_a_mask_only_equal_lengths_share_a_batch() -> None:
    specs = [InputSpec("ids", I64, ("batch", "seq"))]
    data = open_data([{"ids": np.arange(n)} for n in (2, 2, 5, 3, 3)], specs)
    assert [batch.feeds["ids"].shape for batch in data] == [(2, 2), (1, 5), (2, 3)]
    assert all(batch.valid is None for batch in data)
    assert counts(data) == [(0, 2), (2, 1), (3, 2)]


def test_inputs_of_unknown_rank_take_what_comes() -> None:
    specs = [InputSpec("x", None, None)]
    (batch,) = open_data({"x": np.ones((4, 2))}, specs)
    assert (batch.feeds["x"].shape, str(batch.feeds["x"].dtype)) == ((4, 2), "float64")


def test_inputs_with_different_fixed_first_axes_are_fed_call_by_call() -> None:
    specs = [InputSpec("a", F32, (1, 3)), InputSpec("b", F32, (2, 3))]
    a, b = np.arange(9, dtype=np.float32).reshape(3, 3), np.arange(18, dtype=np.float32).reshape(6, 3)
    calls = list(open_data({"a": a, "b": b}, specs))
    assert [call.feeds["b"].tolist() for call in calls] == [b[at : at + 2].tolist() for at in (0, 2, 4)]
    refused("different numbers of samples", {"a": a, "b": b[:5]}, specs)
