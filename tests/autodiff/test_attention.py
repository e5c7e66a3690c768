"""ONNX Runtime's attention operators: what they are replaced by gives what its kernels give, and has a gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from tests.autodiff.cases import Case, floats
from tests.autodiff.checking import model_of, prepared

MS = "com.microsoft"
BATCH, STEPS, HEADS, GROUPS, SIZE = 2, 5, 4, 2, 16
WIDTH = HEADS * SIZE
ANGLES = np.outer(np.arange(16), 1 / (1 + np.arange(SIZE // 2)))
TABLES = {"cos": np.cos(ANGLES).astype(np.float32), "sin": np.sin(ANGLES).astype(np.float32)}


@dataclasses.dataclass
class Node:
    """One node. `inputs`: in the operator's order, "" for one left out."""

    op: str
    inputs: Sequence[str]
    feeds: Mapping[str, np.ndarray]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outputs: Sequence[str] = ("y",)

    def __str__(self) -> str:
        settings = (f"{name}={value}" for name, value in self.attributes.items() if "heads" not in name)
        return "-".join([self.op, *filter(None, self.inputs), *settings]).replace(" ", "")

    def case(self) -> Case:
        """It, to be differentiated; the truth is its definition's, which the other test holds to the kernel."""
        return Case(
            self.op,
            self.feeds,
            self.attributes,
            inputs=self.inputs,
            outputs=self.outputs,
            domain=MS,
            defined=True,
            wrt=[name for name, array in self.feeds.items() if array.dtype == np.float32 and name not in TABLES],
            dynamic=False,  # heads have sizes that the graph says
        )


def grouped(
    past: int = 0, steps: int = STEPS, packed: bool = False, extra: Mapping[int, np.ndarray] | None = None, **more: Any
) -> Node:
    """Inputs 0 to 8 of GroupQueryAttention, and `extra` ones by place."""
    names = ["q", "", ""] if packed else ["q", "k", "v"]
    wide = HEADS + 2 * GROUPS if packed else HEADS
    feeds = {"q": floats(BATCH, steps, wide * SIZE)}
    feeds |= {n: floats(BATCH, steps, GROUPS * SIZE, seed=i) for i, n in enumerate(names[1:], 1) if n}
    if past >= 0:
        feeds |= {n: floats(BATCH, GROUPS, past, SIZE, seed=i) for i, n in ((3, "past_k"), (4, "past_v"))}
    total = max(past, 0) + steps
    feeds |= {"lengths": np.full(BATCH, total - 1, np.int32), "total": np.array(total, np.int32), **TABLES}
    names += ["past_k", "past_v"] if past >= 0 else ["", ""]
    names += ["lengths", "total", "cos", "sin"]
    for place, array in (extra or {}).items():
        names += [""] * (place - len(names)) + [f"extra{place}"]
        feeds[f"extra{place}"] = array
    attributes = {"num_heads": HEADS, "kv_num_heads": GROUPS, **more}
    return Node("GroupQueryAttention", names, feeds, attributes, ("y", "present_k", "present_v"))


def several(names: Sequence[str], extra: Mapping[str, np.ndarray], **more: Any) -> Node:
    feeds = {n: floats(BATCH, STEPS, WIDTH, seed=i) for i, n in enumerate("qkv") if n in names} | dict(extra)
    outputs = ("y", "present_k", "present_v") if "past_k" in names else ("y",)
    return Node("MultiHeadAttention", names, feeds, {"num_heads": HEADS, **more}, outputs)


def projecting(
    names: Sequence[str], extra: Mapping[str, np.ndarray], sizes: Sequence[int] = (WIDTH,) * 3, **more: Any
) -> Node:
    feeds = {"x": floats(BATCH, STEPS, 6), "w": floats(6, sum(sizes), low=-0.3, high=0.3)}
    if "b" in names:
        feeds["b"] = floats(sum(sizes), seed=2)
    if len(set(sizes)) > 1:
        more["qkv_hidden_sizes"] = list(sizes)
    outputs = ("y", "present") if "past" in names else ("y",)
    return Node("Attention", names, feeds | dict(extra), {"num_heads": HEADS, **more}, outputs)


KEYS = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
LENGTHS = np.array([5, 3], np.int32)
PAIRS = np.random.default_rng(0).integers(0, 2, (BATCH, STEPS, STEPS)).astype(np.int32)
PAIRS[:, range(STEPS), range(STEPS)] = 1  # a row that sees nothing is rounded to what is left beside -10000
PAST = {"past_k": floats(BATCH, HEADS, 3, SIZE, seed=7), "past_v": floats(BATCH, HEADS, 3, SIZE, seed=8)}
SHORT = {"k": floats(BATCH, 7, WIDTH, seed=5), "v": floats(BATCH, 7, HEADS * 5, seed=6)}
APART = {"k": floats(BATCH, HEADS, 7, SIZE, seed=5), "v": floats(BATCH, HEADS, 7, SIZE, seed=6)}
POSITIONS = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]], np.int64)

NODES = [
    grouped(),
    grouped(do_rotary=1),
    grouped(do_rotary=1, rotary_interleaved=1),
    grouped(do_rotary=1, packed=True),
    grouped(past=-1, scale=0.3),
    grouped(past=3, steps=1, do_rotary=1),
    grouped(past=3, steps=1, local_window_size=2),
    grouped(local_window_size=2),
    grouped(local_window_size=9),
    grouped(softcap=2.0),
    grouped(smooth_softmax=1),
    grouped(extra={11: floats(HEADS)}),
    grouped(extra={10: floats(BATCH, HEADS, STEPS, STEPS)}, softcap=2.0),
    grouped(extra={10: floats(1, 1, STEPS, STEPS)}),
    several("qkv", {}),
    several("qkv", {}, unidirectional=1, scale=0.2),
    several(["q", "k", "v", "b"], {"b": floats(3 * WIDTH)}),
    several(["q", "k", "v", "", "mask"], {"mask": KEYS}),
    several(["q", "k", "v", "", "mask"], {"mask": LENGTHS}, mask_filter_value=-50.0),
    several(["q", "k", "v", "", "mask", "bias"], {"mask": PAIRS, "bias": floats(1, HEADS, STEPS, STEPS)}),
    several(["q", "k", "v", "", "", "", "past_k", "past_v"], PAST, unidirectional=1),
    several("qkv", SHORT),
    several("qkv", APART),
    projecting("xwb", {}),
    projecting("xw", {}, unidirectional=1),
    projecting("xwb", {}, (WIDTH, WIDTH, HEADS * 5), scale=0.4),
    projecting(["x", "w", "b", "mask"], {"mask": KEYS}),
    projecting(["x", "w", "b", "mask"], {"mask": LENGTHS}),
    projecting(["x", "w", "b", "mask"], {"mask": PAIRS}),
    projecting(["x", "w", "b", "", "past"], {"past": floats(2, BATCH, HEADS, 3, SIZE)}, unidirectional=1),
    projecting(["x", "w", "b", "", "", "bias"], {"bias": floats(BATCH, HEADS, STEPS, STEPS)}),
    Node("RotaryEmbedding", ["x", "p", *TABLES], {"x": floats(2, 5, WIDTH), "p": POSITIONS, **TABLES}),
    Node("RotaryEmbedding", ["x", "p", *TABLES], {"x": floats(2, 3, 5, SIZE), "p": POSITIONS[1, :1], **TABLES}),
    Node(
        "RotaryEmbedding",
        ["x", "p", *TABLES],
        {"x": floats(2, 5, HEADS * 20), "p": POSITIONS, **TABLES},
        {"num_heads": HEADS, "rotary_embedding_dim": SIZE, "interleaved": 1},
    ),
]


@pytest.mark.parametrize("node", NODES, ids=str)
def test_a_definition_gives_what_the_kernel_gives(node: Node) -> None:
    proto = helper.make_node(node.op, list(node.inputs), list(node.outputs), domain=MS, **node.attributes)
    model = model_of([proto], node.feeds, node.outputs, 17, domains={MS: 1})
    written = prepared(model)
    assert not any(inner.domain for inner in written.graph.node)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # or it is made one node again
    runs = [
        ort.InferenceSession(each.SerializeToString(), options).run(None, dict(node.feeds)) for each in (model, written)
    ]
    for kernel, ours in zip(*runs, strict=True):
        assert kernel.shape == ours.shape
        np.testing.assert_allclose(ours, kernel, rtol=0, atol=5e-6 * max(1, np.abs(kernel).max()))


@pytest.mark.parametrize("node", NODES, ids=str)
def test_gradients(node: Node) -> None:
    errors = node.case().check()
    assert errors.exact < 1e-6
    assert errors.runtime < 1e-5


def test_shorter_rows_are_right_up_to_their_end() -> None:
    node = grouped(do_rotary=1)
    feeds = {**node.feeds, "lengths": np.array([STEPS - 1, STEPS - 3], np.int32)}
    proto = helper.make_node(node.op, list(node.inputs), list(node.outputs), domain=MS, **node.attributes)
    model = model_of([proto], feeds, node.outputs, 17, domains={MS: 1})
    kernel, ours = (
        ort.InferenceSession(each.SerializeToString()).run(["y"], feeds)[0] for each in (model, prepared(model))
    )
    np.testing.assert_allclose(ours[0], kernel[0], atol=1e-6)
    np.testing.assert_allclose(ours[1, : STEPS - 2], kernel[1, : STEPS - 2], atol=1e-6)
