"""Streaming statistics: order, threads and padding must not show."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from onnxcompress.calibration.feeding import batches, spread
from onnxcompress.calibration.ranges import observe, ranges
from onnxcompress.calibration.statistic import MinMax
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from tests.builders import floats, graph, info, model, node, opened, tensors

Calls = list[dict[str, np.ndarray]]


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), max_size=5), max_size=6), st.integers(0, 6))
def test_the_range_is_a_monoid(parts: list[list[float]], cut: int) -> None:
    arrays = [np.array(part, np.float32) for part in parts]
    whole, left, right = MinMax(), MinMax(), MinMax()
    for index, array in enumerate(arrays):
        whole.update(array)
        (left if index < cut else right).update(array)
    right.merge(left)
    assert right == whole
    joined = np.concatenate([np.zeros(0, np.float32), *arrays])
    if joined.size:
        assert (whole.least, whole.most, whole.count) == (joined.min(), joined.max(), joined.size)
    assert whole.known == bool(joined.size)


def test_padding_and_what_is_not_finite_stay_out() -> None:
    seen = MinMax()
    batch = np.array([[[1.0, 2.0], [900.0, -900.0]], [[3.0, 0.5], [-1.0, 2.5]]], np.float32)
    seen.update(batch, np.array([[True, False], [True, True]]))
    assert (seen.least, seen.most, seen.count) == (-1.0, 3.0, 6)
    seen.update(batch, np.array([[True, True, False]]))  # fits another value, not this one: nothing is kept out
    assert (seen.least, seen.most) == (-900.0, 900.0)
    seen.update(np.array([math.inf]))
    assert not seen.known


def net() -> onnx.ModelProto:
    inner = graph([node("Mul", ["h", "h"], ["square"])], [], [info("square", ["n", "t", 4])], name="inner")
    other = graph([node("Neg", ["h"], ["minus"])], [], [info("minus", ["n", "t", 4])], name="other")
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("If", ["c"], ["y"], then_branch=inner, else_branch=other),
    ]
    inputs = [info("x", ["n", "t", 3]), info("c", [], TensorProto.BOOL)]
    return model(graph(nodes, inputs, [info("y", ["n", "t", 4])], tensors(w=floats(3, 4))))


def calls() -> Calls:
    return [{"x": floats(2, 5, 3, seed=seed), "c": np.array(seed % 2 == 0)} for seed in range(7)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ranges_in_the_graph_equal_those_of_numpy(threads: int) -> None:
    names = ["x", "h", "y/then/square", "y/else/minus"]
    found = ranges(opened(net()), names, calls(), threads=threads)
    w = floats(3, 4)
    h = [feeds["x"] @ w for feeds in calls()]
    expected = {
        "x": [feeds["x"] for feeds in calls()],
        "h": h,
        "y/then/square": [a * a for a in h[0::2]],
        "y/else/minus": [-a for a in h[1::2]],
    }
    for name in names:
        all_values = np.stack(expected[name])
        assert found[name].least == pytest.approx(all_values.min(), rel=1e-6)
        assert found[name].most == pytest.approx(all_values.max(), rel=1e-6)
    outside = observe(opened(net()), names, calls(), MinMax, threads=threads)
    assert {n: (s.least, s.most) for n, s in outside.items()} == {n: (s.least, s.most) for n, s in found.items()}


def test_a_branch_never_taken_has_no_range() -> None:
    found = ranges(opened(net()), ["y/then/square", "y/else/minus"], calls()[1:2])
    assert not found["y/then/square"].known
    assert found["y/else/minus"].known


def masked_net() -> onnx.ModelProto:
    nodes = [node("Gather", ["table", "ids"], ["e"]), node("Cast", ["attention_mask"], ["m"], to=1)]
    outputs = [info("e", ["n", "t", 4]), info("m", ["n", "t"])]
    inputs = [info(name, ["n", "t"], TensorProto.INT64) for name in ("ids", "attention_mask")]
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    table[0] = 1000.0  # the row of the padding token
    return model(graph(nodes, inputs, outputs, tensors(table=table)))


def test_padding_known_from_a_mask_is_kept_out() -> None:
    ids = np.array([[3, 4, 0], [5, 0, 0]], np.int64)
    mask = (ids > 0).astype(np.int64)
    found = ranges(opened(masked_net()), ["e"], [{"ids": ids, "attention_mask": mask}])["e"]
    assert (found.least, found.most, found.count) == (12.0, 23.0, 12)
    open_mask = ranges(opened(masked_net()), ["e"], [{"ids": ids, "attention_mask": np.ones_like(ids)}])["e"]
    assert open_mask.most == 1000.0


def test_padding_known_from_the_data_layer_is_kept_out() -> None:
    model_ = opened(masked_net())
    ids = [np.array([3, 4, 5]), np.array([6])]
    data = open_data({"ids": ids, "attention_mask": [np.ones_like(row) for row in ids]}, input_specs(model_))
    found = ranges(model_, ["e"], data.feeds())["e"]
    assert (found.least, found.most, found.count) == (12.0, 27.0, 16)


def test_calls_can_be_spread_over_the_data() -> None:
    data = [{"x": np.full(1, i)} for i in range(10)]
    assert spread(data, 4) == 2
    assert [int(feeds["x"][0]) for feeds, _ in batches(data, 4, 2)] == [0, 2, 4, 6]
    assert spread(data, 100) == 1
