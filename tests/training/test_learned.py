"""What training takes for learned and what for a constant, in the forms in which exporters write it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.trainable import trainable
from onnxcompress.training.distill import Settings, distill
from onnxcompress.training.learned import Learned
from tests.builders import constant, floats, graph, info, model, node, tensors
from tests.numerics.test_positions import sinusoids
from tests.training.small import opened

T, C = 6, 8  # positions, channels
MASK = np.where(np.triu(np.ones((C, C)), 1), -100, 0).astype(np.float32)
CONSTANT, COMPUTED, MASKED = (
    "a constant, no weight of a layer",
    "computed from positions, not learned",
    "a mask, not learned",
)


def network(*middle: onnx.NodeProto, **given: np.ndarray) -> ir.Model:
    """ids [n, 6] -> Gather [20, 8] = e -> `middle` -> m [n, 6, 8] -> MatMul [8, 3] = z."""
    nodes = [node("Gather", ["words", "ids"], ["e"]), *middle, node("MatMul", ["m", "last"], ["z"])]
    held = tensors(words=floats(20, C), last=floats(C, 3, seed=1), **given)
    held += tensors(axes=np.array([1]), rows=np.arange(T), start=np.array([0]), end=np.array([T]))
    inputs = [info("ids", ["n", T], onnx.TensorProto.INT64)]
    return load(model(graph(nodes, inputs, [info("z", ["n", T, 3])], held)))


def reason(of: ir.Model, key: str) -> str:
    """Why the weight is left; "" where it is trained. The judgement agrees with what `inspect` tells."""
    found = weights(of)
    (weight,) = (each for each in found if each.key == key)
    said = Learned(of, found).refusal(weight)
    seen = trainable(of)
    assert seen.blocked == []
    assert seen.left.get(key, "") == said
    assert (key in seen.trained) == (said == "")
    return said


ADDED = node("Add", ["e", "p"], ["m"])
FORMS = {  # exporter's form -> nodes that bring a [1, 6, 8] or longer "w" to "p"
    "added": ([], (1, T, C)),
    "sliced": ([node("Slice", ["w", "start", "end", "axes"], ["p"])], (1, 2 * T, C)),
    "gathered": ([node("Gather", ["w", "rows"], ["p"])], (2 * T, C)),
    "gathered by a range": (
        [node("Shape", ["ids"], ["size"], start=1), constant("zero", np.array(0)), constant("one", np.array(1)),
         node("Squeeze", ["size"], ["count"]), node("Range", ["zero", "count", "one"], ["r"]),
         node("Gather", ["w", "r"], ["p"])],
        (2 * T, C),
    ),
    "looked up": (
        [node("Unsqueeze", ["rows", "axes"], ["at"]), node("GatherND", ["w", "at"], ["p"])],
        (2 * T, C),
    ),
    "joined of two axes": (
        [node("Expand", ["w", "wide"], ["y"]), node("Expand", ["w2", "wide2"], ["x"]),
         node("Concat", ["y", "x"], ["xy"], axis=-1), node("Reshape", ["xy", "flat"], ["p"])],
        (1, 3, C // 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_positions_are_learned(form: str) -> None:
    before, shape = FORMS[form]
    more = {"w2": floats(2, 1, C // 2, seed=3), "wide": np.array([2, 3, C // 2]), "wide2": np.array([2, 3, C // 2])}
    given = {**more, "flat": np.array([1, T, C])} if "two axes" in form else {}
    added = ADDED if before else node("Add", ["e", "w"], ["m"])
    of = network(*before, added, w=floats(*shape, seed=2), **given)
    assert reason(of, "w") == ""
    if given:
        assert reason(of, "w2") == ""


@pytest.mark.parametrize("form", ["added", "sliced", "gathered", "looked up"])
def test_sinusoids_are_not(form: str) -> None:
    before, shape = FORMS[form]
    table = sinusoids(*shape[-2:]).reshape(shape)
    of = network(*before, ADDED if before else node("Add", ["e", "w"], ["m"]), w=table)
    assert reason(of, "w") == COMPUTED


def test_a_word_embedding_is_learned_and_a_table_of_sines_that_is_looked_up_is_not() -> None:
    of = network(node("Gather", ["w", "ids"], ["p"]), node("Mul", ["e", "p"], ["m"]), w=sinusoids(20, C))
    assert reason(of, "words") == ""
    assert reason(of, "w") == COMPUTED


ATTENTION = [
    node("MatMul", ["e", "wq"], ["q"]),
    node("Transpose", ["e"], ["k"], perm=[0, 2, 1]),
    node("MatMul", ["k", "q"], ["scores"]),
    node("Add", ["scores", "w"], ["biased"]),
    node("Softmax", ["biased"], ["probabilities"], axis=-1),
    node("MatMul", ["e", "probabilities"], ["m"]),
]


def test_relative_positions_are_learned_and_masks_are_not() -> None:
    wq = floats(C, C, seed=4)
    assert reason(network(*ATTENTION, w=floats(1, C, C, seed=2), wq=wq), "w") == ""
    assert reason(network(*ATTENTION, w=MASK, wq=wq), "w") == MASKED
    assert reason(network(*ATTENTION, w=(MASK * 1e7 + floats(C, C)), wq=wq), "w") == CONSTANT
    ramp = -np.abs(np.arange(C)[:, None] - np.arange(C)).astype(np.float32)
    assert reason(network(*ATTENTION, w=ramp, wq=wq), "w") == COMPUTED


def test_behind_the_last_layer_lie_anchors() -> None:
    nodes = [node("MatMul", ["x", "v"], ["b"]), node("Add", ["b", "w"], ["z"])]
    body = graph(
        nodes, [info("x", ["n", T, C])], [info("z", ["n", T, 4])], tensors(v=floats(C, 4), w=floats(T, 4, seed=2))
    )
    assert reason(load(model(body)), "w") == CONSTANT


def test_before_the_first_layer_lies_the_mean_of_the_inputs() -> None:
    nodes = [node("Sub", ["x", "mean"], ["c"]), node("Div", ["c", "std"], ["s"]), node("Sub", ["s", "image"], ["d"])]
    nodes += [node("MatMul", ["d", "v"], ["a"]), node("Mul", ["a", "scale"], ["z"])]
    given = {"mean": floats(C), "std": floats(C, seed=1), "image": floats(T, C, seed=2), "scale": floats(4, seed=3)}
    of = load(model(graph(nodes, [info("x", ["n", T, C])], [info("z", ["n", T, 4])], tensors(v=floats(C, 4), **given))))
    assert {key: reason(of, key) for key in given} == {**dict.fromkeys(("mean", "std", "image"), CONSTANT), "scale": ""}


def test_tokens_and_queries_are_learned() -> None:
    """A class token in front of the positions, and queries that only meet constants before their layer."""
    nodes = [
        node("Shape", ["ids"], ["count"], start=0, end=1),
        constant("tail", np.array([1, C])),
        node("Concat", ["count", "tail"], ["size"], axis=0),
        node("Expand", ["token", "size"], ["tokens"]),
        node("Slice", ["e", "start", "last_row", "axes"], ["few"]),
        node("Concat", ["tokens", "few"], ["m0"], axis=1),
        node("ConstantOfShape", ["like"], ["nothing"]),
        node("Add", ["nothing", "queries"], ["asked"]),
        node("MatMul", ["asked", "wq"], ["q"]),
        node("Transpose", ["q"], ["qt"], perm=[1, 0]),
        node("MatMul", ["m0", "qt"], ["m1"]),
        node("MatMul", ["m1", "queries2"], ["m"]),
    ]
    given = {"token": floats(1, 1, C, seed=2), "queries": floats(3, C, seed=3), "wq": floats(C, C, seed=4)}
    of = network(*nodes, **given, queries2=floats(3, C, seed=5), last_row=np.array([T - 1]), like=np.array([3, C]))
    assert [reason(of, key) for key in (*given, "queries2")] == [""] * 4


def test_coordinates_that_are_joined_with_features_are_not() -> None:
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 4))).astype(np.float32)[None]
    nodes = [
        node("Conv", ["x", "v"], ["f"], kernel_shape=[1, 1]),
        node("Concat", ["f", "w"], ["g"], axis=1),
        node("Conv", ["g", "u"], ["z"], kernel_shape=[1, 1]),
    ]
    held = tensors(v=floats(2, 3, 1, 1), u=floats(3, 4, 1, 1), w=grid)
    of = load(model(graph(nodes, [info("x", [1, 3, 4, 5])], [info("z", [1, 3, 4, 5])], held)))
    assert [reason(of, key) for key in ("v", "u", "w")] == ["", "", COMPUTED]


def test_weights_behind_arithmetic_with_constants_are_learned() -> None:
    """Weight normalization v g / |v|, a pruning mask, a scale 1 + w (Gemma), a temperature exp(t)."""
    nodes = [
        node("ReduceL2", ["v"], ["length"], axes=[0], keepdims=1),
        node("Div", ["v", "length"], ["unit"]),
        node("Mul", ["unit", "g"], ["w"]),
        node("MatMul", ["e", "w"], ["a"]),
        node("Add", ["plus", "one"], ["scale"]),
        node("Mul", ["a", "scale"], ["b"]),
        node("Mul", ["dense", "kept"], ["pruned"]),
        node("MatMul", ["b", "pruned"], ["c"]),
        node("Exp", ["t"], ["temperature"]),
        node("Mul", ["c", "temperature"], ["m"]),
    ]
    kept = (floats(C, C, seed=6) > 0).astype(np.float32)
    given = {
        "v": floats(C, C, seed=2),
        "g": floats(1, C, seed=3),
        "plus": floats(C, seed=4),
        "dense": floats(C, C, seed=5),
    }
    of = network(*nodes, **given, kept=kept, t=floats(T, 1, seed=7), one=np.array(1, np.float32))
    assert [reason(of, key) for key in (*given, "t", "kept")] == ["", "", "", "", "", MASKED]


def test_statistics_that_are_written_out_are_measured() -> None:
    nodes = [
        node("MatMul", ["e", "v"], ["a"]),
        node("Add", ["variance", "eps"], ["more"]),
        node("Sqrt", ["more"], ["deviation"]),
        node("Div", ["a", "deviation"], ["b"]),
        node("Mul", ["b", "gamma"], ["m"]),
    ]
    given = {"variance": np.abs(floats(C, seed=2)), "gamma": floats(C, seed=3)}
    of = network(*nodes, v=floats(C, C, seed=4), eps=np.array(1e-5, np.float32), **given)
    assert reason(of, "variance") == "running statistics, measured and not learned"
    assert reason(of, "gamma") == ""


def test_rotary_frequencies_are_not_learned() -> None:
    nodes = [
        node("Cast", ["ids"], ["position"], to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["position", "axes"], ["row"]),
        node("MatMul", ["w", "row"], ["angles"]),
        node("Transpose", ["angles"], ["turned"], perm=[0, 2, 1]),
        node("Concat", ["turned", "turned"], ["both"], axis=-1),
        node("Cos", ["both"], ["c"]),
        node("Mul", ["e", "c"], ["m"]),
    ]
    assert reason(network(*nodes, w=floats(1, C // 2, 1, seed=2)), "w") == "frequencies, not learned"


def test_settings_of_operators_are_not_learned() -> None:
    """The scales of a Resize are a vector beside a layer's result."""
    nodes = [node("Conv", ["x", "v"], ["f"], kernel_shape=[1, 1]), node("Resize", ["f", "", "w"], ["z"], mode="linear")]
    held = tensors(v=floats(2, 3, 1, 1), w=np.array([1, 1, 2, 2], np.float32))
    of = load(model(graph(nodes, [info("x", [1, 3, 4, 4])], [info("z", [1, 2, 8, 8])], held)))
    assert reason(of, "w") == CONSTANT


def test_scales_within_the_branch_of_an_if_are_learned() -> None:
    def branch(name: str) -> onnx.GraphProto:
        nodes = [
            node("MatMul", ["e", f"{name}.v"], [f"{name}.a"]),
            node("Mul", [f"{name}.a", f"{name}.w"], [f"{name}.b"]),
        ]
        held = tensors(**{f"{name}.v": floats(C, C, seed=3), f"{name}.w": floats(C, seed=4)})
        return graph(nodes, [], [info(f"{name}.b", ["n", T, C])], held, name)

    nodes = [node("ReduceSum", ["ids"], ["sum"], keepdims=0), node("Greater", ["sum", "zero"], ["is"])]
    nodes += [node("If", ["is"], ["m"], then_branch=branch("one"), else_branch=branch("two"))]
    of = network(*nodes, zero=np.array(0))
    assert all(reason(of, key) == "" for key in (weight.key for weight in weights(of)))


def test_positions_move_when_a_model_is_trained() -> None:
    of = network(node("Add", ["e", "w"], ["m"]), w=floats(1, T, C, seed=2))
    generator = np.random.default_rng(0)
    source = {"ids": generator.integers(0, 20, (32, T)), "y": generator.integers(0, 3, (32, T))}
    done = distill(None, of, opened(of, source), settings=Settings(epochs=2, batch=16, lr=1e-2))
    before = next(weight.array() for weight in weights(of) if weight.key == "w")
    assert np.abs(done.parameters["w"]["w"] - before).min() > 1e-4
