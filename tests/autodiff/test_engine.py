"""The sweep itself, what it refuses, what it finds beforehand, and the table in the documentation."""

from __future__ import annotations

import inspect
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.autodiff import NoGradient, coverage, gradients
from onnxcompress.autodiff.definition import DEFINITIONS
from onnxcompress.autodiff.rule import REFUSALS, RULES, ZERO
from onnxcompress.autodiff.table import BY_STANDARD, WITHOUT, operators_table, summary
from onnxcompress.errors import ModelError, OnnxCompressError
from onnxcompress.model import bridge
from tests.autodiff.cases import floats
from tests.autodiff.checking import check, session

HEAD = '<ir_version: 8, opset_import: ["" : 18]>\n'


def model(text: str, head: str = HEAD) -> ir.Model:
    """A model from ONNX text."""
    return bridge.from_proto(onnx.parser.parse_model(head + text), "test")


def run(built: ir.Model, names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Any values of a model."""
    values = {v.name: v for node in built.graph for v in node.outputs}
    for name in names:
        if not values[name].is_graph_output():
            built.graph.outputs.append(values[name])
    results: list[np.ndarray] = session(bridge.to_proto(built)).run(list(names), feeds)
    return results


def test_uses_add_up() -> None:
    """x goes into four places, one node twice."""
    text = "g (float[2,3] x) => (float[2,3] y) { a = Mul(x, x) b = Tanh(x) c = Add(a, b) y = Mul(c, x) }"
    check(onnx.parser.parse_model(HEAD + text), {"x": floats(2, 3)})


def test_gradient_of_a_loss_needs_no_seed() -> None:
    built = model("g (float[3] x) => (float[1] loss) { a = Mul(x, x) loss = ReduceSum(a) }")
    found = gradients(built, {"loss": None}, ["x"])
    (dx,) = run(built, [str(found["x"].name)], {"x": np.array([1, 2, -3], np.float32)})
    np.testing.assert_array_equal(dx, [2, 4, -6])


def test_intermediate_values_and_outputs_have_gradients_too() -> None:
    """d y / d y = 1, d y / d a = 3 a^2 + 1 with a = 2 x."""
    built = model(
        """g (float[2] x) => (float[2] y) {
        two = Constant<value = float {2.0}>() a = Mul(x, two) b = Mul(a, a) c = Mul(b, a) y = Add(c, a) }"""
    )
    found = gradients(built, {"y": None}, ["x", "a", "y"])
    dx, da, dy = run(built, [str(found[n].name) for n in ("x", "a", "y")], {"x": np.array([1, 0.5], np.float32)})
    np.testing.assert_allclose(da, [13, 4])
    np.testing.assert_allclose(dx, [26, 8])
    np.testing.assert_array_equal(dy, [1, 1])


def test_only_paths_that_are_needed_are_differentiated() -> None:
    """Det has no rule, but the weight does not pass it; nodes that serve no gradient are not left behind."""
    built = model(
        """g (float[3,3] x, float[3,3] w) => (float[3,3] y) {
        d = Det(x) h = MatMul(x, w) s = Mul(h, d) y = Relu(s) }"""
    )
    before = len(built.graph)
    gradients(built, {"y": None}, ["w"])
    added = [node.op_type for node in list(built.graph)[before:]]
    assert added == ["Expand", "Greater", "Cast", "Mul", "Mul", "Gemm"]


def test_values_no_output_depends_on_are_absent() -> None:
    built = model("g (float[2] x, float[2] z) => (float[2] y, float[2] u) { y = Relu(x) u = Floor(z) }")
    assert list(gradients(built, {"y": None, "u": None}, ["x", "z"])) == ["x"]


def test_an_operator_without_a_rule_is_named_with_what_it_cuts_off() -> None:
    built = model("g (float[3,3] w, float[3,3] v) => (float y) { a = MatMul(w, v) y = Det(a) }")
    with pytest.raises(NoGradient, match=r"node 'y' \(Det\): has no gradient rule; it cuts off w, v") as caught:
        gradients(built, {"y": None}, ["w", "v"])
    assert caught.value.op_type == "Det"
    assert caught.value.cut_off == ("w", "v")
    assert isinstance(caught.value, OnnxCompressError)


def test_old_opsets_and_unknown_names_are_refused_in_one_line() -> None:
    text = "g (float[2] x) => (float[2] y) { y = Relu(x) }"
    with pytest.raises(ModelError, match="opset 12; gradients need 13"):
        gradients(model(text, '<ir_version: 7, opset_import: ["" : 12]>\n'), {"y": None}, ["x"])
    with pytest.raises(ModelError, match="'nothing' is no value"):
        gradients(model(text), {"y": None}, ["nothing"])


def test_functions_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
    g (float[3] x) => (float[3] y) { y = local.Square(x) }
    <domain: "local", opset_import: ["" : 18]>
    Square (a) => (b) { c = Mul(a, a) b = Mul(c, a) }"""
    check(onnx.parser.parse_model(text), {"x": floats(3)})


def test_dynamic_sizes_are_not_baked_in() -> None:
    """One gradient graph of a broadcasting chain, run at three sizes, once where an axis happens to be 1."""
    text = """g (float[N,M] x, float[K,M] w, float[M] b) => (float[1] loss) {
        h = Add(x, w) s = Mul(h, b) t = Tanh(s) loss = ReduceSum(t) }"""
    built = model(text)
    found = gradients(built, {"loss": None}, ["x", "w", "b"])
    for n, k, m in [(4, 4, 3), (4, 1, 3), (1, 5, 1)]:
        x, w, b = floats(n, m), floats(k, m, seed=1), floats(m, seed=2)
        dx, dw, db = run(built, [str(found[name].name) for name in "xwb"], {"x": x, "w": w, "b": b})
        h = (x + w).astype(np.float64)
        slope = 1 - np.tanh(h * b) ** 2
        for got, full, like in ((dx, slope * b, x), (dw, slope * b, w), (db, slope * h, b)):
            over = tuple(range(full.ndim - like.ndim))
            total = full.sum(over)
            total = total.sum(tuple(i for i, s in enumerate(like.shape) if s == 1 != total.shape[i]), keepdims=True)
            np.testing.assert_allclose(got, total, rtol=2e-6, atol=1e-6)


def test_gradients_can_be_differentiated_again() -> None:
    """The second derivative of x^4 through two sweeps."""
    built = model("g (float[3] x) => (float[3] y) { a = Mul(x, x) y = Mul(a, a) }")
    first = str(gradients(built, {"y": None}, ["x"])["x"].name)
    second = str(gradients(built, {first: None}, ["x"])["x"].name)
    x = np.array([0.5, -1, 2], np.float32)
    (ddx,) = run(built, [second], {"x": x})
    np.testing.assert_allclose(ddx, 12 * x**2, rtol=1e-6)


def test_coverage_says_beforehand_what_can_be_trained() -> None:
    built = model(
        """g (float[3,3] x) => (float y, float[3,3] z)
        <float[3,3] w = {1,0,0,0,1,0,0,0,1}, float[3,3] v = {1,0,0,0,1,0,0,0,1}, float[3] u = {1,2,3}> {
        a = MatMul(x, w) y = Det(a) b = MatMul(x, v) c = Add(b, w) z = Relu(c) d = Floor(u) }"""
    )
    nodes = len(built.graph)
    found = coverage(built)
    assert len(built.graph) == nodes
    assert found.reached == ("v",)
    assert found.cut_off == ("w",)  # one of its two ways is blocked, so its gradient would be wrong
    assert [(error.node, error.op_type) for error in found.blocked] == [("y", "Det")]
    assert found.unused == ("u",)
    assert found.operators == {"MatMul": 2, "Det": 1, "Add": 1, "Relu": 1}


def test_table_in_the_documentation_is_current() -> None:
    file = pathlib.Path(__file__).parents[2] / "docs" / "operators.md"
    assert file.read_text(encoding="utf-8") == operators_table(), (
        "run: python -m onnxcompress.autodiff > docs/operators.md"
    )


def test_documentation_is_in_words_and_lists_every_refusal() -> None:
    """One line a rule, no code in it; a rule that can refuse says what."""
    for (domain, op), function in RULES.items():
        if domain:
            continue
        assert 0 < len(summary(op)) <= 140, op
        for text in (summary(op), REFUSALS["", op]):
            assert not re.search(r"`|lambda|\{|\w\(\)|\bc\.|no rule", text), f"{op}: {text}"
        if "c.refuse(" in inspect.getsource(function):
            assert REFUSALS["", op], op


def test_every_standard_operator_is_accounted_for() -> None:
    """Those without a rule are the ones the documentation names."""
    without = {"BitCast", "ConvInteger", "DFT", "DeformConv", "Det", "MatMulInteger", "MaxRoiPool", "QLinearConv"}
    without |= {"ConcatFromSequence", "Optional", "OptionalGetElement", "SequenceAt", "SequenceConstruct"}
    without |= {"QLinearMatMul", "SequenceEmpty", "SequenceErase", "SequenceInsert", "STFT", "SplitToSequence"}
    without |= {"Unique"}
    newest = {s.name for s in onnx.defs.get_all_schemas() if not s.domain and not s.deprecated and s.since_version < 28}
    by_definition = {"LinearAttention", "SequenceMap", *BY_STANDARD, *(op for _, op in DEFINITIONS)}
    rest = newest - {op for _, op in RULES} - {op for _, op in ZERO} - by_definition
    assert rest <= without
    named = " ".join(WITHOUT)
    for op in without - {"ConcatFromSequence"}:
        assert op in named or re.search("Sequence|Optional", op), op


def test_every_registered_operator_exists_and_none_is_both() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    assert {op for _, op in RULES} <= known
    assert {op for _, op in ZERO} <= known
    assert not set(RULES) & ZERO
