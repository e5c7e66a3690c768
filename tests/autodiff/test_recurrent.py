"""LSTM, GRU, RNN in every direction, with whatever inputs and outputs; what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcompress.autodiff import NoGradient
from tests.autodiff.cases import Case, floats, ints
from tests.autodiff.checking import gradient_model

STEPS, BATCH, INPUTS, HIDDEN = 4, 2, 3, 2
KINDS = [("LSTM", 4, {}), ("GRU", 3, {}), ("GRU", 3, {"linear_before_reset": 1}), ("RNN", 1, {})]


def layer(
    op: str, gates: int, direction: str, given: int, attributes: Any
) -> tuple[dict[str, np.ndarray], list[str], Any]:
    """Feeds, input names, attributes; `given` of the optional inputs are there: bias, then states."""
    ways = 2 if direction == "bidirectional" else 1
    shapes = {"x": (STEPS, BATCH, INPUTS), "w": (ways, gates * HIDDEN, INPUTS), "r": (ways, gates * HIDDEN, HIDDEN)}
    optional = {"b": (ways, 2 * gates * HIDDEN), "h": (ways, BATCH, HIDDEN), "c": (ways, BATCH, HIDDEN)}
    if op != "LSTM":
        del optional["c"]
    names = ["b", "", *list(optional)[1:]] if given == 2 else ["b"][:given]
    feeds = {n: floats(*s, low=-1, high=1, seed=i) for i, (n, s) in enumerate({**shapes, **optional}.items())}
    names = [*shapes, *names]
    return (
        {n: a for n, a in feeds.items() if n in names},
        names,
        {"hidden_size": HIDDEN, "direction": direction, **attributes},
    )


@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "gates", "attributes"), KINDS, ids=str)
def test_layers(op: str, gates: int, attributes: Any, direction: str, given: int) -> None:
    feeds, names, settings = layer(op, gates, direction, given, attributes)
    states = ["h_last", "c_last"] if op == "LSTM" else ["h_last"]
    for outputs in (["y", *states], ["y"], ["", "h_last"]):
        Case(op, feeds, settings, inputs=names, outputs=outputs).check(dynamic=given == 2)


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid"])
def test_rnn_activations(activation: str) -> None:
    feeds, names, settings = layer("RNN", 1, "forward", 2, {"activations": [activation]})
    Case("RNN", feeds, settings, inputs=names).check()


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_hidden_size_may_be_left_to_the_weights(op: str, gates: int) -> None:
    """ONNX lets it be; ONNX Runtime 1.32 wants it, so that only the gradient's nodes are compared."""
    feeds, names, settings = layer(op, gates, "forward", 1, {})
    seeds = {"y": np.ones((STEPS, 1, BATCH, HIDDEN), np.float32)}
    said, _ = gradient_model(Case(op, feeds, settings, inputs=names).model(), seeds, ["x", "w", "r", "b"])
    del settings["hidden_size"]
    left, found = gradient_model(Case(op, feeds, settings, inputs=names).model(), seeds, ["x", "w", "r", "b"])
    nodes = [[(node.op_type, node.input, node.output) for node in graph.node] for graph in (left.graph, said.graph)]
    assert nodes[0] == nodes[1]
    assert set(found) == {"x", "w", "r", "b"}
    with pytest.raises(NoGradient, match="hidden size is unknown; add the attribute"):
        gradient_model(Case(op, feeds, settings, inputs=names).model(dynamic=True), seeds, ["w"])


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sequence_lens", {"lengths": ints(4, 2).astype(np.int32)}, {}),
    ("clipped", {}, {"clip": 1.0}),
    ("activations", {}, {"activations": ["HardSigmoid", "Tanh", "Tanh"]}),
]


@pytest.mark.parametrize(("says", "extra", "attributes"), REFUSED, ids=str)
def test_refusals_name_the_reason_and_the_weights(says: str, extra: dict[str, Any], attributes: dict[str, Any]) -> None:
    feeds, names, settings = layer("LSTM", 4, "forward", 1, attributes)
    case = Case("LSTM", {**feeds, **extra}, settings, inputs=[*names, *extra])
    with pytest.raises(NoGradient, match=says) as caught:
        gradient_model(case.model(), {"y": np.ones((STEPS, 1, BATCH, HIDDEN), np.float32)}, ["w", "r", "b"])
    assert caught.value.cut_off == ("w", "r", "b")
    assert "cuts off w, r, b" in str(caught.value)
