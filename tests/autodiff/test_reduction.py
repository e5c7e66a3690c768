"""Reductions, with every form their axes have had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.autodiff.cases import Case, floats, ints

OPS = [
    "ReduceSum",
    "ReduceMean",
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceProd",
    "ReduceMax",
    "ReduceMin",
]


def _x(op: str) -> np.ndarray:
    return floats(2, 3, 4, low=0.5 if op in ("ReduceLogSum", "ReduceProd") else -2)


@pytest.mark.parametrize("axes", [None, [1], [-1], [0, 2], []], ids=str)
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_axes_as_an_input(op: str, keep: int, axes: list[int] | None) -> None:
    constants: dict[str, Any] = {} if axes is None else {"axes": ints(*axes)}
    Case(op, {"x": _x(op)}, {"keepdims": keep}, constants).check(dynamic=bool(keep))
    if axes == []:
        Case(op, {"x": _x(op)}, {"keepdims": keep, "noop_with_empty_axes": 1}, constants).check()


@pytest.mark.parametrize("axes", [None, [0, 2]], ids=str)
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("op", [op for op in OPS if op != "ReduceSum"])
def test_axes_as_an_attribute(op: str, keep: int, axes: list[int] | None) -> None:
    Case(op, {"x": _x(op)}, {"keepdims": keep, **({"axes": axes} if axes else {})}, opset=13).check(dynamic=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("op", OPS)
def test_axes_known_at_run_time(op: str, keep: int, dynamic: bool) -> None:
    Case(op, {"x": _x(op), "axes": ints(2, 0)}, {"keepdims": keep}, wrt=["x"]).check(dynamic)


OTHERS = [
    Case("CumSum", {"x": floats(3, 4)}, constants={"axis": np.int64(1)}),
    Case("CumSum", {"x": floats(3, 4)}, {"exclusive": 1}, {"axis": np.int64(1)}),
    Case("CumSum", {"x": floats(3, 4)}, {"reverse": 1}, {"axis": np.int64(0)}),
    Case("CumSum", {"x": floats(3, 4)}, {"reverse": 1, "exclusive": 1}, {"axis": np.int64(-1)}),
    Case("LpNormalization", {"x": floats(3, 4)}),
    Case("LpNormalization", {"x": floats(3, 4, low=0.5)}, {"p": 1, "axis": 0}),
    Case("Softmax", {"x": floats(3, 4)}),
    Case("Softmax", {"x": floats(3, 4, 2)}, {"axis": 1}),
    Case("LogSoftmax", {"x": floats(3, 4)}),
    Case("LogSoftmax", {"x": floats(3, 4)}, {"axis": 0}),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_along_an_axis(case: Case, dynamic: bool) -> None:
    case.check(dynamic)
