from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from onnxcompress.data.preprocess import Preprocess
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import InputSpec
from onnxcompress.errors import DataError

YAML = "transpose: [2, 0, 1]\nscale: 1/255\nmean: [0.485, 0.456, 0.406]\nstd: [0.229, 0.224, 0.225]\n"


def test_the_order_is_transpose_scale_mean_std(tmp_path: pathlib.Path, image: list[InputSpec]) -> None:
    (tmp_path / "p.yaml").write_text(YAML)
    raw = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
    data = open_data({"x": raw}, image, preprocess=Preprocess.load(tmp_path / "p.yaml"))
    (batch,) = data
    wanted = (raw / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert batch.feeds["x"].dtype == np.float32
    np.testing.assert_allclose(batch.feeds["x"], wanted.transpose(0, 3, 1, 2), rtol=2e-6, atol=1e-6)
    assert batch.feeds["x"].flags.c_contiguous


def test_json_and_whole_array_transpose_say_the_same(tmp_path: pathlib.Path) -> None:
    (tmp_path / "p.yaml").write_text(YAML)
    same = {
        "transpose": [0, 3, 1, 2],
        "scale": 1 / 255,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "axis": 1,
    }
    (tmp_path / "p.json").write_text(json.dumps(same))
    raw = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    one, other = (Preprocess.load(tmp_path / name).step("x").apply(raw, "x") for name in ("p.yaml", "p.json"))
    np.testing.assert_array_equal(one, other)


def test_an_inputs_own_entry_replaces_the_general_one() -> None:
    steps = Preprocess.parse({"scale": 2, "inputs": {"ids": {"cast": "int64"}}})
    assert steps.step("x").apply(np.ones((1, 2)), "x").tolist() == [[2.0, 2.0]]
    ids = steps.step("ids").apply(np.array([[1.9, -1.9]]), "ids")
    assert (str(ids.dtype), ids.tolist()) == ("int64", [[1, -1]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "wanted keys"),
        ({"sclae": 1}, r"unknown key 'sclae' \(did you mean 'scale'\?\)"),
        ({"scale": "x"}, "scale: wanted a number"),
        ({"scale": "1/0"}, "scale: wanted a number"),
        ({"scale": True}, "scale: wanted a number"),
        ({"mean": []}, "empty list"),
        ({"mean": float("nan")}, "finite"),
        ({"std": [1, 0]}, "std: must not be zero"),
        ({"transpose": [1, 1]}, "each axis from 0 once"),
        ({"transpose": 3}, "each axis from 0 once"),
        ({"cast": "int99"}, "cast: wanted an element type"),
        ({"cast": "object"}, "cast: wanted an element type"),
        ({"axis": "c"}, "axis: wanted a whole number"),
        ({"inputs": {"x": {"std": 0}}}, "inputs: x: std: must not be zero"),
        ({"inputs": [1]}, "inputs: wanted one entry an input"),
    ],
)
def test_bad_files_are_refused_in_one_line(content: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Preprocess.parse(content)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "p.yaml").write_text("a: [")
    (tmp_path / "q.yaml").write_text("!!python/object/apply:os.getcwd []")
    for name in ("p.yaml", "q.yaml", "none.yaml"):
        with pytest.raises(DataError, match=name):
            Preprocess.load(tmp_path / name)


def test_values_and_inputs_that_do_not_fit_are_refused(image: list[InputSpec]) -> None:
    x = np.zeros((2, 3, 4, 5), np.float32)
    for content, message in [
        ({"mean": [1, 2]}, "mean of input 'x' has 2 values"),
        ({"transpose": [1, 0]}, r"transpose \[1, 0\] of input 'x'"),
        ({"transpose": [1, 0, 2, 3]}, "with 0 first"),
        ({"inputs": {"xx": {"scale": 1}}}, r"no input 'xx' \(did you mean 'x'\?\)"),
    ]:
        with pytest.raises(DataError, match=message):
            open_data({"x": x}, image, preprocess=Preprocess.parse(content))
    square = np.zeros((2, 3, 4, 3), np.float32)
    with pytest.raises(DataError, match="more than one axis fits"):
        Preprocess.parse({"mean": [1, 2, 3]}).step("x").apply(square, "x")


def test_it_is_part_of_the_digest(image: list[InputSpec]) -> None:
    x = np.ones((2, 3, 4, 5), np.float32)
    plain, scaled, same = (
        open_data({"x": x}, image, preprocess=p).digest()
        for p in (None, Preprocess.parse({"scale": 2}), Preprocess.parse({"scale": 2.0}))
    )
    assert plain != scaled == same
