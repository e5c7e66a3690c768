"""Operators that move elements, and indexing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.autodiff.cases import Case, floats, ints

SHAPES = [
    Case("Reshape", {"x": floats(2, 6)}, constants={"s": ints(3, 4)}),
    Case("Reshape", {"x": floats(2, 6)}, constants={"s": ints(0, -1, 2)}),
    Case("Flatten", {"x": floats(2, 3, 2)}, {"axis": 2}),
    Case("Squeeze", {"x": floats(2, 1, 3)}, constants={"a": ints(1)}),
    Case("Unsqueeze", {"x": floats(2, 3)}, constants={"a": ints(0, -1)}),
    Case("Transpose", {"x": floats(2, 3, 4)}, {"perm": [1, 2, 0]}),
    Case("Transpose", {"x": floats(2, 3, 4)}),
    Case("Expand", {"x": floats(3, 1)}, constants={"s": ints(2, 1, 4)}),
    Case("Expand", {"x": floats(3, 1), "s": ints(2, 1, 4)}, wrt=["x"]),
    Case("Concat", {"a": floats(2, 3), "b": floats(2, 1), "c": floats(2, 2)}, {"axis": 1}),
    Case("Concat", {"a": floats(2, 3), "b": floats(2, 3, seed=1)}, {"axis": -1}),
    Case("Concat", {"a": floats(2, 3)}, {"axis": 0}),
    Case("Split", {"x": floats(2, 6)}, {"axis": 1}, {"s": ints(1, 2, 3)}, outputs=("y", "z", "u")),
    Case("Split", {"x": floats(6, 2)}, {"num_outputs": 2}, outputs=("y", "z")),
    Case("Split", {"x": floats(6, 2)}, outputs=("y", "z"), opset=13),
    Case("Slice", {"x": floats(4, 6)}, constants={"s": ints(1, 2), "e": ints(3, 4)}),
    Case("Slice", {"x": floats(4, 6)}, constants={"s": ints(1), "e": ints(3)}, opset=13),
    Case("Pad", {"x": floats(2, 3)}, constants={"p": ints(1, 0, 2, 1)}),
    Case("Pad", {"x": floats(2, 3), "v": np.float32(0.5)}, constants={"p": ints(1, 0, 2, 1)}, inputs=["x", "p", "v"]),
    Case("Pad", {"x": floats(3, 4)}, constants={"p": ints(-1, 0, 2, -1)}),
    Case("Pad", {"x": floats(3, 4)}, constants={"p": ints(1, 2), "a": ints(1)}, inputs=["x", "p", "", "a"]),
    Case("Pad", {"x": floats(3, 4), "p": ints(1, 2, 1, 1)}, wrt=["x"]),
    Case("Pad", {"x": floats(3, 4)}, {"mode": "reflect"}, {"p": ints(1, 2, 1, 1)}),
    Case("Pad", {"x": floats(3, 4)}, {"mode": "edge"}, {"p": ints(1, 2, 1, 1)}),
    Case("Pad", {"x": floats(3, 4)}, {"mode": "wrap"}, {"p": ints(1, 2, 1, 1)}, opset=19),
    Case("Tile", {"x": floats(2, 3)}, constants={"r": ints(2, 3)}),
    Case("Tile", {"x": floats(2, 3), "r": ints(1, 2)}, wrt=["x"]),
    Case("DepthToSpace", {"x": floats(2, 8, 2, 3)}, {"blocksize": 2, "mode": "DCR"}),
    Case("DepthToSpace", {"x": floats(2, 8, 2, 3)}, {"blocksize": 2, "mode": "CRD"}, dynamic=False),
    Case("SpaceToDepth", {"x": floats(2, 3, 4, 6)}, {"blocksize": 2}),
    Case("Trilu", {"x": floats(4, 4)}),
    Case("Trilu", {"x": floats(4, 4)}, {"upper": 0}, {"k": np.int64(1)}),
    Case("ReverseSequence", {"x": floats(4, 3, 2)}, constants={"l": ints(2, 4, 1)}),
    Case("Compress", {"x": floats(4, 3)}, {"axis": 0}, {"c": np.array([True, False, True, True])}),
    Case("CenterCropPad", {"x": floats(3, 4), "s": ints(5, 3)}, wrt=["x"], defined=True),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_movement(case: Case, dynamic: bool) -> None:
    if case.dynamic or not dynamic:
        case.check(dynamic)


SLICES: list[tuple[list[int], list[int], list[int], list[int]]] = [
    ([1, 0], [3, -1], [0, 1], [1, 1]),
    ([-2], [2**31], [1], [1]),
    ([9], [12], [1], [1]),
    ([0, 1], [4, 6], [0, 1], [2, 3]),
    ([-1], [-10], [0], [-1]),
    ([3], [100], [1], [2]),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), SLICES, ids=str)
def test_slices(starts: list[int], ends: list[int], axes: list[int], steps: list[int], dynamic: bool) -> None:
    s, e, a, t = ints(*starts), ints(*ends), ints(*axes), ints(*steps)
    Case("Slice", {"x": floats(4, 6)}, constants={"s": s, "e": e, "a": a, "t": t}).check(dynamic)
    Case("Slice", {"x": floats(4, 6), "s": s, "e": e}, constants={"a": a, "t": t}, wrt=["x"]).check(dynamic)


INDEXING = [
    Case("Gather", {"x": floats(5, 3)}, constants={"i": ints(0, 2, 2, -1)}),
    Case("Gather", {"x": floats(5, 3)}, {"axis": 1}, {"i": np.array([[0, 2], [2, 1]])}),
    Case("Gather", {"x": floats(5, 3)}, {"axis": 1}, {"i": np.int64(1)}),
    Case("Gather", {"x": floats(5, 3)}, constants={"i": np.int64(-1)}),
    Case("Gather", {"x": floats(5, 3, 2), "i": np.array([[0, 2], [2, 1]])}, {"axis": 1}, wrt=["x"]),
    Case("Gather", {"x": floats(5, 3, 2), "i": np.array(2)}, {"axis": 1}, wrt=["x"]),
    Case("Gather", {"x": floats(5, 3), "i": np.array([1, 1, 0], np.int32)}, wrt=["x"]),
    Case("GatherElements", {"x": floats(3, 4)}, {"axis": 1}, {"i": np.array([[0, 0], [1, 1], [2, 0]])}),
    Case("GatherND", {"x": floats(3, 4, 2)}, constants={"i": np.array([[0, 1], [2, 3], [0, 1]])}),
    Case("GatherND", {"x": floats(2, 4, 3)}, {"batch_dims": 1}, {"i": np.array([[[0]], [[2]]])}),
    Case("TopK", {"x": floats(3, 5)}, {"axis": 1}, {"k": ints(2)}, outputs=("y", "at")),
    Case("TopK", {"x": floats(3, 5)}, {"axis": 0, "largest": 0}, {"k": ints(2)}, outputs=("y", "at")),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", INDEXING, ids=str)
def test_indexing(case: Case, dynamic: bool) -> None:
    case.check(dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatter(reduction: str, dynamic: bool) -> None:
    x, order = floats(3, 4), ["x", "i", "u"]
    attributes: dict[str, Any] = {"reduction": reduction}
    elements = {"i": np.array([[0, 1], [1, 3]])}
    Case("ScatterElements", {"x": x, "u": floats(2, 2)}, {"axis": 1, **attributes}, elements, order).check(dynamic)
    rows = {"i": np.array([[0], [2]])}
    Case("ScatterND", {"x": x, "u": floats(2, 4)}, attributes, rows, order).check(dynamic)


def test_rows_of_an_embedding_add_up() -> None:
    """The same row thousands of times, from several threads: every use counts (exact in float32 below 2^24)."""
    import onnxruntime as ort

    from tests.autodiff.checking import gradient_model

    table, rows = np.zeros((3, 4), np.float32), np.random.default_rng(0).integers(0, 3, 20_000)
    case = Case("Gather", {"x": table, "i": rows}, wrt=["x"])
    ones = np.ones((20_000, 4), np.float32)
    built, names = gradient_model(case.model(), {"y": ones}, ["x"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 4
    session = ort.InferenceSession(built.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = np.repeat(np.bincount(rows, minlength=3)[:, None], 4, 1)
    for _ in range(5):
        np.testing.assert_array_equal(session.run([names["x"]], {"x": table, "i": rows, "seed/y": ones})[0], expected)
