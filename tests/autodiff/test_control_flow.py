"""If, Loop and Scan."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcompress.autodiff import NoGradient, gradients
from onnxcompress.model import bridge
from tests.autodiff.cases import floats
from tests.autodiff.checking import check, prepared, session

HEAD = '<ir_version: 8, opset_import: ["" : 18]>\n'
BRANCHES = (
    HEAD
    + """g (float[2,3] x, float[3] w, float[3] v, bool c) => (float[2,3] y) {
  h = Mul(x, w)
  y = If (c) <
    then_branch = t () => (float[2,3] a) { s = Sigmoid(h) a = Mul(s, v) },
    else_branch = e () => (float[2,3] b) { b = Mul(h, x) }>
}"""
)
STEP = """body = b (float[2,3] h, float[2,3] xt) => (float[2,3] h2, float[2,3] yt) {
    m = MatMul(h, w) a = Add(m, xt) h2 = Tanh(a) yt = Mul(h2, xt) }"""
SCANS = [
    ("x [5,2,3]", "", "float[5,2,3] x", "float[5,2,3] y"),
    ("reversed", "scan_input_directions = [1], scan_output_directions = [1],", "float[5,2,3] x", "float[5,2,3] y"),
    ("other axes", "scan_input_axes = [1], scan_output_axes = [2],", "float[2,5,3] x", "float[2,3,5] y"),
]
LOOP = (
    HEAD
    + """g (float[2,3] s, float[3,3] w) => (float[2,3] z, float[N,2,3] y) {
  n = Constant<value = int64 {4}>()
  c = Constant<value = bool {1}>()
  z, k, y = Loop (n, c, s, s) <body = b (int64 i, bool c0, float[2,3] h, float[2,3] k0)
      => (bool c1, float[2,3] h2, float[2,3] k1, float[2,3] yt) {
    c1 = Identity(c0) fi = Cast<to = 1>(i) m = MatMul(h, w) a = Add(m, fi) h2 = Sin(a)
    k1 = Add(k0, h2) yt = Mul(h2, k0) }>
}"""
)
TURNS = (
    HEAD
    + """g (float[2,3] s, float[2,3] r, float[2,3] w, int64 n, bool c) => (float[2,3] z, float[2,3] u, float[N,2,3] y) {
  z, u, y = Loop (n, c, s, r) <body = b (int64 i, bool c0, float[2,3] h, float[2,3] k)
      => (bool c1, float[2,3] h2, float[2,3] k2, float[2,3] yt) {
    c1 = Identity(c0) h2 = Mul(h, w) k2 = Add(k, h2) yt = Mul(h2, k) }>
}"""
)
GROWING = (
    HEAD
    + """g (float[N,3] s, float[3] w) => (float[M,3] z) {
  n = Constant<value = int64 {3}>()
  z = Loop (n, , s) <body = b (int64 i, bool c0, float[K,3] h) => (bool c1, float[L,3] h2) {
    c1 = Identity(c0) a = ReduceSum<keepdims = 1>(h) m = Mul(a, w) q = ADDED }>
}"""
)
NESTED = (
    HEAD
    + """g (float[2] x, bool c) => (float[2] y) {
  y = If (c) <
    then_branch = t () => (float[2] a) {
      k = Constant<value = float[2] {1.5, -2.0}>()
      a = If (c) <
        then_branch = tt () => (float[2] p) { q = Constant<value = float[2] {3.0, 4.0}>() r = Mul(k, q) p = Mul(r, x) },
        else_branch = te () => (float[2] u) { u = Mul(k, x) }> },
    else_branch = e () => (float[2] b) { k = Constant<value = float[2] {7.0, 8.0}>() b = Mul(k, x) }>
}"""
)


@pytest.mark.parametrize("condition", [True, False])
def test_if(condition: bool) -> None:
    feeds = {"x": floats(2, 3), "w": floats(3), "v": floats(3, seed=1), "c": np.array(condition)}
    check(onnx.parser.parse_model(BRANCHES), feeds)


@pytest.mark.parametrize(("name", "settings", "x", "y"), SCANS, ids=lambda text: text[:12])
def test_scan(name: str, settings: str, x: str, y: str) -> None:
    text = f"{HEAD}g (float[2,3] s, {x}, float[3,3] w) => (float[2,3] z, {y}) {{\n"
    text += f"  z, y = Scan <num_scan_inputs = 1, {settings} {STEP}> (s, x)\n}}"
    sizes = (2, 5, 3) if name == "other axes" else (5, 2, 3)
    check(
        onnx.parser.parse_model(text), {"s": floats(2, 3), "x": floats(*sizes), "w": floats(3, 3, low=-0.7, high=0.7)}
    )


def test_loop() -> None:
    check(onnx.parser.parse_model(LOOP), {"s": floats(2, 3), "w": floats(3, 3, low=-0.7, high=0.7)})


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_loop_of_any_number_of_steps(steps: int, condition: bool) -> None:
    """Without a step the gradients of the states are those of their final values, and the weight's is zero."""
    feeds = {"s": floats(2, 3), "r": floats(2, 3, seed=1), "w": floats(2, 3, seed=2)}
    check(onnx.parser.parse_model(TURNS), {**feeds, "n": np.array(steps), "c": np.array(condition)})


@pytest.mark.parametrize(
    "added", ["Identity(m) h2 = Concat<axis = 0>(h, q)", "Identity(m) h2 = Pad(h, one)"], ids=["Concat", "sizes"]
)
def test_a_state_that_grows_is_refused(added: str) -> None:
    text = GROWING.replace("q = ADDED", f"q = {added}")
    if "one" in added:  # sizes are numbers, and known to differ
        text = text.replace("float[K,3]", "float[2,3]").replace("float[L,3]", "float[3,3]")
        text = text.replace("q = ", "one = Constant<value = int64[4] {0, 0, 1, 0}>() q = ")
    model = bridge.from_proto(onnx.parser.parse_model(text), "test")
    with pytest.raises(NoGradient, match=r"\(Loop\): its state 'h' changes its shape from step to step; it cuts off"):
        gradients(model, {"z": None}, ["s", "w"])


@pytest.mark.parametrize("condition", [True, False])
def test_constants_in_branches_come_out_where_they_can_be_trained(condition: bool) -> None:
    """Both branches call theirs k: one keeps the name, and the outputs stay what they were."""
    model, feeds = onnx.parser.parse_model(NESTED), {"x": floats(2), "c": np.array(condition)}
    moved = prepared(model)
    assert [tensor.name for tensor in moved.graph.initializer] == ["k", "q", "k_1"]
    (before,), (after,) = (session(m).run(["y"], feeds) for m in (model, moved))
    np.testing.assert_array_equal(after, before)
    names = ["k", "q", "k_1"]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in moved.graph.initializer}
    for name in names:  # as inputs, so that finite differences can move them
        moved.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]))
    del moved.graph.initializer[:]
    check(moved, {**feeds, **constants}, wrt=["x", *names])
