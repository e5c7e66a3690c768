"""Weights wherever they hide: found, named, re-encoded, run, saved and found again."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.encodings import Affine, Dense, Masked, Sparse
from onnxcompress.errors import PassError
from onnxcompress.model.load import load
from onnxcompress.model.save import save
from onnxcompress.model.spill import detach
from onnxcompress.model.weights import total, weights
from tests.builders import (
    ENCODERS,
    FLOAT_ACTIVATIONS,
    affine,
    by_key,
    checked,
    codebook,
    constant,
    floats,
    function,
    graph,
    halved,
    holding,
    info,
    model,
    node,
    op_types,
    opened,
    optimized,
    run,
    same_bits,
    tensors,
)

OURS = {"ExpandSparse", "Dequantize", "DequantizeHalf", "DequantizeLinear"}


@dataclasses.dataclass
class Place:
    """A model, what to run it on, and the roles of its weights by key."""

    proto: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    roles: dict[str, str]
    folds: bool = True  # nothing is left to expand at run time


PLACES: dict[str, Callable[[], Place]] = {}


def place(build: Callable[[], Place]) -> Callable[[], Place]:
    """Register one hiding place."""
    PLACES[build.__name__] = build
    return build


X = floats(3, 4, seed=9)
W = floats(4, 5, seed=1)
COND = info("c", [], TensorProto.BOOL)
XI, YO = info("x", [3, 4]), info("y", [3, 5])
YES = np.array(True)


def matmul(*inits: onnx.TensorProto, before: list[onnx.NodeProto] | None = None, w: str = "w") -> onnx.ModelProto:
    nodes = [*(before or []), node("MatMul", ["x", w], ["y"], name="mm")]
    return model(graph(nodes, [XI], [YO], list(inits)))


@place
def initializer() -> Place:
    return Place(matmul(*tensors(w=W)), {"x": X}, {"w": "matmul"})


@place
def constant_node() -> Place:
    return Place(matmul(before=[constant("w", W)]), {"x": X}, {"w": "matmul"})


@place
def constant_floats() -> Place:
    nodes = [
        node("Constant", [], ["b"], value_floats=[1.0, 2.0, 3.0, 4.0]),
        node("Constant", [], ["one"], value_float=2.0),
        node("Mul", ["x", "one"], ["x1"]),
        node("Add", ["x1", "b"], ["y"]),
    ]
    return Place(model(graph(nodes, [XI], [info("y", [3, 4])])), {"x": X}, {"b": "bias"})


@place
def behind_views() -> Place:
    nodes = [
        node("Identity", ["w"], ["w1"]),
        node("Transpose", ["w1"], ["w2"], perm=[1, 0]),
        node("Cast", ["w2"], ["w3"], to=TensorProto.FLOAT),
        node("Reshape", ["w3", "dims"], ["w4"]),
    ]
    inits = tensors(w=W.T.astype(np.float16), dims=np.array([4, 5]))
    return Place(matmul(*inits, before=nodes, w="w4"), {"x": X}, {"w": "matmul"})


@place
def tied() -> Place:
    nodes = [
        node("Gather", ["w", "ids"], ["e"]),
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        node("MatMul", ["e", "wt"], ["y"]),
    ]
    body = graph(nodes, [info("ids", [2], TensorProto.INT64)], [info("y", [2, 7])], tensors(w=floats(7, 4)))
    return Place(model(body), {"ids": np.array([6, 1])}, {"w": "matmul"})


@place
def shared_and_duplicated() -> Place:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "w"], ["b"]),
        node("MatMul", ["x", "twin"], ["c"]),
        node("Sum", ["a", "b", "c"], ["y"]),
    ]
    body = graph(nodes, [XI], [YO], tensors(w=W, twin=W, dead=W))
    return Place(model(body), {"x": X}, {"w": "matmul", "twin": "matmul", "dead": "other"})


def branch(name: str, w: np.ndarray, hidden: str) -> onnx.GraphProto:
    nodes = [node("MatMul", ["x", "w"], [f"{name}_y"])]
    inits = tensors(w=w) if hidden == "initializer" else []
    nodes = nodes if inits else [constant("w", w), *nodes]
    return graph(nodes, [], [info(f"{name}_y", [3, 5])], inits, name)


def branches(hidden: str) -> Place:
    then, other = branch("t", W, hidden), branch("e", -3 * W, hidden)
    body = graph([node("If", ["c"], ["y"], then_branch=then, else_branch=other)], [COND, XI], [YO])
    return Place(model(body), {"c": YES, "x": X}, {"y/then/w": "matmul", "y/else/w": "matmul"})


@place
def branch_initializers() -> Place:
    return branches("initializer")


@place
def branch_constants() -> Place:
    return branches("constant")


@place
def captured() -> Place:
    then = graph([node("MatMul", ["x", "w"], ["t"])], [], [info("t", [3, 5])], name="then")
    other = graph([node("MatMul", ["x2", "w"], ["e"])], [], [info("e", [3, 5])], name="else")
    nodes = [node("Neg", ["x"], ["x2"]), node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    return Place(
        model(graph(nodes, [COND, XI], [YO], tensors(w=W))), {"c": np.array(False), "x": X}, {"w": "matmul"}, False
    )


@place
def output_of_a_branch() -> Place:
    """The branches choose which weight the product takes."""
    then = graph([], [], [info("w", [4, 5])], tensors(w=W), "then")
    other = graph([constant("v", -W)], [], [info("v", [4, 5])], name="else")
    nodes = [
        node("If", ["c"], ["chosen"], then_branch=then, else_branch=other),
        node("MatMul", ["x", "chosen"], ["y"]),
    ]
    roles = {"chosen/then/w": "matmul", "chosen/else/v": "matmul"}
    return Place(model(graph(nodes, [COND, XI], [YO])), {"c": YES, "x": X}, roles)


@place
def loop_body() -> Place:
    body = graph(
        [node("MatMul", ["h", "w"], ["h1"]), node("Tanh", ["h1"], ["h2"]), node("Identity", ["go"], ["go1"])],
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h", [3, 4])],
        [info("go1", [], TensorProto.BOOL), info("h2", [3, 4])],
        tensors(w=floats(4, 4)),
        "body",
    )
    nodes = [node("Loop", ["n", "yes", "h0"], ["y"], body=body)]
    outer = graph(nodes, [], [info("y", [3, 4])], tensors(n=np.array(3), yes=YES, h0=X))
    # The first value of a state is a tensor like any other; it is not multiplied with as it stands.
    return Place(model(outer), {}, {"h0": "other", "y/body/w": "matmul"})


@place
def scan_body() -> Place:
    """A state, a weight that every step multiplies with, and stacked weights of which each step takes one."""
    body = graph(
        [
            node("MatMul", ["h", "one"], ["h1"]),
            node("MatMul", ["h1", "w"], ["h2"]),
            node("Identity", ["one"], ["one1"]),
            node("Tanh", ["h2"], ["h3"]),
        ],
        [info("h", [3, 4]), info("one", [4, 4]), info("w", [4, 4])],
        [info("h3", [3, 4]), info("one1", [4, 4])],
        name="body",
    )
    nodes = [node("Scan", ["h0", "fixed", "stack"], ["y", "unused"], body=body, num_scan_inputs=1)]
    inits = tensors(h0=X, fixed=floats(4, 4, seed=3), stack=floats(5, 4, 4, seed=4))
    outer = graph(nodes, [], [info("y", [3, 4])], inits)
    return Place(model(outer), {}, {"h0": "other", "fixed": "matmul", "stack": "matmul"})


@place
def nested_branches() -> Place:
    inner = branches("initializer").proto.graph.node[0]
    renamed = onnx.NodeProto()
    renamed.CopyFrom(inner)
    renamed.output[0] = "inner"
    then = graph([renamed], [], [info("inner", [3, 5])], name="outer_then")
    other = graph([node("MatMul", ["x", "v"], ["e"])], [], [info("e", [3, 5])], tensors(v=W), "outer_else")
    body = graph([node("If", ["c"], ["y"], then_branch=then, else_branch=other)], [COND, XI], [YO])
    roles = {"y/then/inner/then/w": "matmul", "y/then/inner/else/w": "matmul", "y/else/v": "matmul"}
    return Place(model(body), {"c": YES, "x": X}, roles)


@place
def function_body() -> Place:
    inner = function("Inner", ["a"], ["b"], [constant("w", W), node("MatMul", ["a", "w"], ["b"])])
    outer = function(
        "Outer",
        ["a"],
        ["b"],
        [node("Inner", ["a"], ["u"], domain="test"), constant("s", floats(5)), node("Mul", ["u", "s"], ["b"])],
    )
    nodes = [
        node("Outer", ["x"], ["p"], domain="test"),
        node("Inner", ["x"], ["q"], domain="test"),
        node("Add", ["p", "q"], ["y"]),
    ]
    proto = model(graph(nodes, [XI], [YO]), functions=[inner, outer], domains={"test": 1})
    return Place(proto, {"x": X}, {"Inner/w": "matmul", "Outer/s": "other"})


@place
def function_argument() -> Place:
    """Two calls with two weights, through a nested call that turns them."""
    turn = function("Turn", ["a"], ["b"], [node("Transpose", ["a"], ["b"], perm=[1, 0])])
    nodes = [node("Turn", ["m"], ["mt"], domain="test"), node("MatMul", ["a", "mt"], ["b"])]
    product = function("Product", ["a", "m"], ["b"], nodes)
    calls = [
        node("Product", ["x", "v"], ["p"], domain="test"),
        node("Product", ["x", "w"], ["q"], domain="test"),
        node("Add", ["p", "q"], ["y"]),
    ]
    inits = tensors(v=floats(5, 4, seed=7), w=floats(5, 4, seed=8))
    proto = model(graph(calls, [XI], [YO], inits), functions=[turn, product], domains={"test": 1})
    return Place(proto, {"x": X}, {"v": "matmul", "w": "matmul"})


@place
def function_output() -> Place:
    """A function that gives a weight of its body out."""
    made = function("Kernel", [], ["b"], [constant("w", W.T.copy()), node("Transpose", ["w"], ["b"], perm=[1, 0])])
    nodes = [node("Kernel", [], ["k"], domain="test"), node("MatMul", ["x", "k"], ["y"])]
    return Place(
        model(graph(nodes, [XI], [YO]), functions=[made], domains={"test": 1}), {"x": X}, {"Kernel/w": "matmul"}
    )


@place
def branch_in_a_function() -> Place:
    then, other = branch("t", W, "initializer"), branch("e", -W, "constant")
    made = function("Choose", ["c", "x"], ["b"], [node("If", ["c"], ["b"], then_branch=then, else_branch=other)])
    proto = model(
        graph([node("Choose", ["c", "x"], ["y"], domain="test")], [COND, XI], [YO]),
        functions=[made],
        domains={"test": 1},
    )
    roles = {"Choose/b/then/w": "matmul", "Choose/b/else/w": "matmul"}
    return Place(proto, {"c": YES, "x": X}, roles)


@place
def older_function() -> Place:
    """A function of an older opset than the model's."""
    made = function("Product", ["a"], ["b"], [constant("w", W), node("MatMul", ["a", "w"], ["b"])], opset=13)
    proto = model(
        graph([node("Product", ["x"], ["y"], domain="test")], [XI], [YO]), functions=[made], domains={"test": 1}
    )
    return Place(proto, {"x": X}, {"Product/w": "matmul"})


@place
def listed_as_input_before_ir_4() -> Place:
    body = graph([node("MatMul", ["x", "w"], ["y"])], [XI, info("w", [4, 5])], [YO], tensors(w=W))
    return Place(model(body, opset=11, ir_version=3), {"x": X}, {"w": "matmul"})


@place
def listed_as_input_since_ir_4() -> Place:
    body = graph([node("MatMul", ["x", "w"], ["y"])], [XI, info("w", [4, 5])], [YO], tensors(w=W))
    return Place(model(body), {"x": X}, {"w": "matmul"}, False)


@place
def graph_output() -> Place:
    body = graph([node("MatMul", ["x", "w"], ["y"])], [XI], [YO, info("w", [4, 5])], tensors(w=W))
    return Place(model(body), {"x": X}, {"w": "matmul"})


@place
def constant_graph_output() -> Place:
    nodes = [constant("w", W), node("MatMul", ["x", "w"], ["y"])]
    return Place(model(graph(nodes, [XI], [info("w", [4, 5]), YO])), {"x": X}, {"w": "matmul"})


@place
def taken_names() -> Place:
    """The names an encoding would give its parts are in use."""
    parts = ("codes", "codebook", "shape", "channel", "tail", "mask", "values", "q", "scale", "zero_point")
    nodes = [node("Identity", ["x"], [f"w.{part}"]) for part in parts]
    nodes += [node("Sum", [f"w.{part}" for part in parts], ["s"]), node("MatMul", ["s", "w"], ["y"])]
    return Place(model(graph(nodes, [XI], [YO], tensors(w=W))), {"x": X}, {"w": "matmul"})


@place
def names_taken_in_a_branch() -> Place:
    """The graph's weight meets the names of a branch, and the other way round."""
    then = graph([node("MatMul", ["x", "w.codes"], ["t"])], [], [info("t", [3, 5])], tensors(w__codes=W), "then")
    other = graph([node("MatMul", ["x", "v"], ["e"])], [], [info("e", [3, 5])], tensors(v=W), "else")
    nodes = [
        node("MatMul", ["x", "w"], ["v.codes"]),
        node("If", ["c"], ["z"], then_branch=then, else_branch=other),
        node("Add", ["z", "v.codes"], ["y"]),
    ]
    body = graph(nodes, [COND, XI], [YO], tensors(w=W))
    return Place(model(body), {"c": YES, "x": X}, {"w": "matmul", "z/then/w.codes": "matmul", "z/else/v": "matmul"})


@place
def recurrent() -> Place:
    arrays = {
        "W": floats(1, 16, 4, seed=1),
        "R": floats(1, 16, 4, seed=2),
        "B": floats(1, 32, seed=3),
        "h0": floats(1, 3, 4, seed=4),
        "c0": floats(1, 3, 4, seed=5),
        "P": floats(1, 12, seed=6),
    }
    nodes = [
        node("Unsqueeze", ["x", "at"], ["seq"]),
        node("LSTM", ["seq", "W", "R", "B", "", "h0", "c0", "P"], ["y"], hidden_size=4),
    ]
    body = graph(nodes, [XI], [info("y", [1, 1, 3, 4])], tensors(at=np.array([0]), **arrays))
    roles = {"W": "recurrent", "R": "recurrent", "B": "bias", "h0": "other", "c0": "other", "P": "other"}
    return Place(model(body), {"x": X}, roles)


@pytest.mark.parametrize("name", PLACES)
def test_found_with_key_and_role(name: str) -> None:
    made = PLACES[name]()
    found = opened(made.proto)
    assert {key: weight.role for key, weight in by_key(found).items()} == made.roles
    again = load(checked(found))
    assert {key: weight.role for key, weight in by_key(again).items()} == made.roles


@pytest.mark.parametrize("kind", [k for k in ENCODERS if k != "dense"])
@pytest.mark.parametrize("name", PLACES)
def test_replaced_everywhere(name: str, kind: str) -> None:
    made = PLACES[name]()
    found, plain = opened(made.proto), opened(made.proto)
    replaced = 0
    for weight, twin in zip(weights(found), weights(plain), strict=True):
        encoding = ENCODERS[kind](weight.array(), weight.axis())
        if encoding.least_opset > made.proto.opset_import[0].version:
            with pytest.raises(PassError, match="needs opset"):
                weight.replace(encoding)
            continue
        weight.replace(encoding)
        twin.replace(Dense(encoding.decode()))
        replaced += 1
        masked = isinstance(encoding, Masked) or weight.encoding.same(encoding)
        assert masked, f"{weight.key}: {weight.encoding.kind} is not {encoding.kind}"
    assert replaced or made.proto.opset_import[0].version < encoding.least_opset
    data, expected = checked(found), checked(plain)
    for ours, theirs in zip(
        run(data, made.feeds, entries=FLOAT_ACTIVATIONS),
        run(expected, made.feeds, entries=FLOAT_ACTIVATIONS),
        strict=True,
    ):
        if kind.startswith("dequantize"):  # ONNX Runtime fuses it with a product, which then adds in another order
            assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
        elif made.folds:
            assert same_bits(ours, theirs)
        else:
            assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
    again = load(data)
    mine, theirs_by_key = by_key(found), by_key(again)
    assert mine.keys() == theirs_by_key.keys() == made.roles.keys()
    for key, weight in mine.items():
        assert weight.encoding.same(theirs_by_key[key].encoding), key
        assert weight.role == theirs_by_key[key].role == made.roles[key], key
    if made.folds and not kind.startswith("dequantize"):
        left = op_types(optimized(data).graph)
        assert not {op for op in left if op in OURS or op.startswith("Depalettize")}
        assert left <= op_types(optimized(expected).graph), "something is left to expand at run time"


def test_only_the_named_branch_changes() -> None:
    made = branch_initializers()
    found = opened(made.proto)
    keyed = by_key(found)
    new = codebook(keyed["y/else/w"].array(), 4)
    keyed["y/else/w"].replace(new)
    again = by_key(load(checked(found)))
    assert again["y/else/w"].encoding.same(new)
    assert again["y/then/w"].encoding.kind == "dense"
    assert same_bits(again["y/then/w"].array(), W)
    expected = X @ new.decode()
    assert np.allclose(run(checked(found), {"c": np.array(False), "x": X})[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["initializer", "constant_node", "branch_constants", "function_body", "taken_names"])
def test_replaced_again_and_again(name: str) -> None:
    """Nothing of an earlier encoding stays behind, and the key stays."""
    made = PLACES[name]()
    found = opened(made.proto)
    for kind in ("codebook-16", "dense", "sparse", "channels-3", "codebook-3", "masked", "folded", "sparse", "folded"):
        at_once = opened(made.proto)
        for weight, twin in zip(weights(found), weights(at_once), strict=True):
            encoding = ENCODERS[kind](np.asarray(weight.array()), weight.axis())
            weight.replace(encoding)
            twin.replace(encoding)
        assert by_key(found).keys() == made.roles.keys()
        data = checked(found)
        if kind not in ("dense", "masked"):  # what was a Constant node is an initializer by then
            assert len(data) == len(checked(at_once)), kind
    run(data, made.feeds)


def test_the_same_weight_object_can_be_replaced_twice() -> None:
    found = opened(initializer().proto)
    (weight,) = weights(found)
    for kind in ("codebook-16", "dense", "sparse", "masked"):
        weight.replace(ENCODERS[kind](np.asarray(weight.array()), 1))
        assert weight.nbytes == by_key(load(checked(found)))["w"].nbytes
    assert sorted(found.graph.initializers) == ["w"]


def test_parts_shared_with_another_weight_stay() -> None:
    """Quantizers give all weights one zero point, and equal ones one scale."""
    nodes = [
        node("DequantizeLinear", ["v.q", "s", "z"], ["v"]),
        node("DequantizeLinear", ["w.q", "s", "z"], ["w"]),
        node("MatMul", ["x", "v"], ["u"]),
        node("MatMul", ["u", "w"], ["y"]),
    ]
    q = np.arange(16, dtype=np.int8).reshape(4, 4)
    inits = tensors(v__q=q, w__q=-q, s=np.array(0.5, np.float32), z=np.array(1, np.int8))
    found = opened(model(graph(nodes, [XI], [info("y", [3, 4])], inits)))
    keyed = by_key(found)
    assert keyed.keys() == {"v", "w"}
    keyed["v"].replace(Sparse.pack(np.asarray(keyed["v"].array())))
    again = load(checked(found))
    assert set(again.graph.initializers) == {"v.mask", "v.values", "v.shape", "w.q", "s", "z"}
    expected = X @ ((q - 1.0) * 0.5) @ ((-q - 1.0) * 0.5)
    assert np.allclose(run(checked(found), {"x": X}, optimize=False)[0], expected, rtol=1e-5)


def test_an_integer_and_a_float_of_one_stem() -> None:
    """Keys of "w" and "w.q" do not change places when one is replaced."""
    nodes = [
        node("MatMul", ["x", "w"], ["y"]),
        node("MatMulInteger", ["k", "w.q"], ["z"]),
    ]
    inputs = [XI, info("k", [3, 4], TensorProto.UINT8)]
    outputs = [YO, info("z", [3, 5], TensorProto.INT32)]
    found = opened(model(graph(nodes, inputs, outputs, tensors(w=W, w__q=np.ones((4, 5), np.int8)))))
    before = {key: weight.value.name for key, weight in by_key(found).items()}
    assert before == {"w": "w", "w.q": "w.q"}
    by_key(found)["w"].replace(affine(W, "folded"))
    assert by_key(load(checked(found))).keys() == before.keys()


def test_paths_that_meet_get_numbers() -> None:
    """A name may contain a slash; attributes of nodes of one name count too."""
    made = branch_initializers()
    made.proto.graph.initializer.append(numpy_helper.from_array(W, "y/then/w"))
    ml = [
        node("Normalizer", ["x"], ["n"], domain="ai.onnx.ml", name="ml"),
        node("Scaler", ["n"], ["a"], domain="ai.onnx.ml", name="ml", offset=[0.0] * 4, scale=[1.0, 2.0, 3.0, 4.0]),
        node("Scaler", ["a"], ["b"], domain="ai.onnx.ml", name="ml", offset=[1.0], scale=[4.0, 3.0, 2.0, 1.0]),
    ]
    made.proto.graph.node.extend(ml)
    made.proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    found = opened(made.proto)
    keys = {"y/then/w", "y/then/w#2", "y/else/w", "ml/offset", "ml/scale", "ml/scale#2"}
    assert by_key(found).keys() == keys
    by_key(found)["y/then/w"].replace(codebook(W, 4))
    assert by_key(load(checked(found))).keys() == keys


def test_attributes_are_counted_and_left() -> None:
    nodes = [
        node("Scaler", ["x"], ["s"], domain="ai.onnx.ml", name="std", offset=[0.0] * 4, scale=[2.0] * 4),
        node(
            "LinearClassifier", ["s"], ["label", "p"], domain="ai.onnx.ml", name="clf",
            coefficients=[float(v) for v in floats(12)], intercepts=[0.0, 1.0, 2.0], classlabels_ints=[0, 1, 2],
        ),
    ]  # fmt: skip
    proto = model(
        graph(nodes, [XI], [info("label", [3], TensorProto.INT64), info("p", [3, 3])]), domains={"ai.onnx.ml": 1}
    )
    keyed = by_key(opened(proto))
    assert {key: weight.nbytes for key, weight in keyed.items()} == {
        "std/offset": 16, "std/scale": 16, "clf/coefficients": 48, "clf/intercepts": 12
    }  # fmt: skip
    assert same_bits(keyed["clf/coefficients"].array(), floats(12))
    assert keyed["clf/coefficients"].uses[0].op_type == "ai.onnx.ml::LinearClassifier"
    with pytest.raises(PassError, match="clf/coefficients: lives in an attribute"):
        keyed["clf/coefficients"].replace(Dense(floats(12)))


def test_scalars_and_empty_tensors_are_no_weights() -> None:
    inits = tensors(
        scalar=np.array(2.0, np.float32), one=np.ones((1, 1), np.float32), none=np.zeros((0, 4), np.float32)
    )
    nodes = [
        node("Mul", ["x", "scalar"], ["a"]),
        node("Mul", ["a", "one"], ["b"]),
        node("Concat", ["b", "none"], ["y"], axis=0),
    ]
    assert weights(opened(model(graph(nodes, [XI], [info("y", [3, 4])], inits)))) == []


def test_overridable_says_so() -> None:
    assert by_key(opened(listed_as_input_since_ir_4().proto))["w"].overridable
    assert not by_key(opened(listed_as_input_before_ir_4().proto))["w"].overridable
    assert not by_key(opened(initializer().proto))["w"].overridable


def test_every_element_belongs_to_one_weight() -> None:
    found = opened(shared_and_duplicated().proto)
    assert total(weights(found)) == 3 * W.nbytes
    for weight in weights(found):
        weight.replace(codebook(np.asarray(weight.array()), 16))
    again = load(checked(found))
    stored = sum(int(v.const_value.nbytes) for v in again.graph.initializers.values() if v.const_value is not None)
    assert total(weights(again)) == stored == 3 * (10 + 64 + 16)


def test_a_mask_of_few_zeros_survives() -> None:
    """Fewer zeros than tell a pruned weight from another, and a mask of what is no weight of a layer."""
    body = graph(
        [node("MatMul", ["x", "w"], ["a"]), node("Mul", ["a", "g"], ["y"])],
        [info("x", [3, 40])],
        [info("y", [3, 50])],
        tensors(w=floats(40, 50), g=floats(50)),
    )
    found = opened(model(body))
    masks = {"w": np.ones((40, 50), bool), "g": np.ones(50, bool)}
    masks["w"][3, 7] = masks["g"][4] = False
    for key, weight in by_key(found).items():
        weight.replace(Masked.apply(np.asarray(weight.array()), masks[key]))
        assert weight.encoding.kind == "masked"
    again = by_key(load(checked(found)))
    for key, weight in again.items():
        assert isinstance(weight.encoding, Masked)
        assert np.array_equal(weight.encoding.mask, masks[key])
        weight.replace(Dense(floats(*weight.shape)))
        assert weight.encoding.kind == "dense"


def test_dense_of_another_tensor_keeps_its_own_name() -> None:
    """A tensor object may serve two weights; a file names each initializer by its tensor."""
    found = opened(shared_and_duplicated().proto)
    keyed = by_key(found)
    tensor = ir.tensor(-W, name="somewhere else")
    for weight in keyed.values():
        weight.replace(Dense(tensor))
    keyed["w"].replace(codebook(W, 4))
    keyed["w"].replace(Dense(tensor))
    again = by_key(load(checked(found)))
    assert again.keys() == keyed.keys()
    assert all(same_bits(np.asarray(weight.array()), -W) for weight in again.values())
    assert tensor.name == "somewhere else"


def test_another_shape_may_take_its_place() -> None:
    """Structured pruning makes weights smaller."""
    found = opened(listed_as_input_before_ir_4().proto)
    (weight,) = weights(found)
    weight.replace(Dense(W[:, :2].copy()))
    (value,) = [v for v in found.graph.inputs if v.name == "w"]
    assert value.shape is not None
    assert value.shape.numpy() == (4, 2)


@pytest.mark.parametrize("kind", ["dense", "masked", "sparse", "codebook-16", "channels-16", "folded"])
def test_large_arrays_wait_in_the_work_folder(kind: str, tmp_path: pathlib.Path) -> None:
    array = floats(1500, 1400)
    found = opened(holding(array))
    (weight,) = weights(found, tmp_path)
    new = ENCODERS[kind](array, 0)
    weight.replace(new)
    files = list(tmp_path.iterdir())
    least = {
        "dense": 8.4e6,
        "masked": 8.4e6,
        "sparse": 4.2e6,
        "codebook-16": 1.05e6,
        "channels-16": 1.05e6,
        "folded": 2.1e6,
    }
    assert len(files) == 1
    assert abs(files[0].stat().st_size - least[kind]) < 0.01 * least[kind]
    held = [v.const_value for v in found.graph.initializers.values() if v.const_value is not None]
    tensor = max(held, key=lambda t: int(t.nbytes))
    assert tensor.nbytes == files[0].stat().st_size
    assert isinstance(_base(tensor.numpy()), np.memmap)
    saved = save(found, tmp_path / "out.onnx").path
    (again,) = weights(load(saved))
    assert again.encoding.same(new)


def test_a_mask_survives_the_end_of_the_work_folder(tmp_path: pathlib.Path) -> None:
    array = floats(1000, 500)
    array[3, 4] = 0
    found = opened(holding(array))
    (weight,) = weights(found, tmp_path)
    weight.replace(Masked(array))
    detach(found)
    for file in tmp_path.iterdir():
        file.unlink()
    (again,) = weights(load(checked(found)))
    assert again.encoding.same(Masked(array))


def _base(array: np.ndarray) -> object:
    base: object = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return base


def test_an_unpacked_codebook_is_not_held() -> None:
    """Unpacked, codes are up to eight times what the model stores."""
    found = opened(holding(floats(64, 64)))
    (weight,) = weights(found)
    weight.replace(codebook(floats(64, 64), 16))
    first = weight.encoding
    assert weight.encoding is first
    number = id(first)
    assert weight.nbytes == 2048 + 64 + 16
    del first
    assert weight._seen is not None
    assert weight._seen() is None, number


def test_integers_of_an_integer_operator_are_not_replaced() -> None:
    nodes = [node("MatMulInteger", ["k", "w_quantized"], ["z"])]
    proto = model(
        graph(
            nodes,
            [info("k", [3, 4], TensorProto.UINT8)],
            [info("z", [3, 5], TensorProto.INT32)],
            tensors(w_quantized=np.ones((4, 5), np.int8)),
        )
    )
    (weight,) = weights(opened(proto))
    assert (weight.key, weight.encoding.kind, weight.role) == ("w", "affine", "matmul")
    with pytest.raises(PassError, match="w: its consumer takes integers"):
        weight.replace(Dense(W))
    (other,) = weights(opened(initializer().proto))
    with pytest.raises(PassError, match="written by the pass"):
        other.replace(Affine(np.ones((4, 5), np.int8), np.ones((), np.float32), form="integer"))


def test_the_order_is_the_files() -> None:
    """A scope's own constants first, then the scopes within, in the order of a node's attributes."""
    made = names_taken_in_a_branch()
    assert [weight.key for weight in weights(opened(made.proto))] == ["w", "z/else/v", "z/then/w.codes"]


def test_sparse_initializers_come_dense() -> None:
    dense = halved(W)
    at = np.flatnonzero(dense)
    sparse = onnx.SparseTensorProto()
    sparse.values.CopyFrom(numpy_helper.from_array(dense.reshape(-1)[at], "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(at.astype(np.int64)))
    sparse.dims.extend(W.shape)
    proto = matmul()
    proto.graph.sparse_initializer.append(sparse)
    (weight,) = weights(opened(proto))
    assert (weight.key, weight.encoding.kind) == ("w", "masked")
    assert same_bits(weight.array(), dense)
    weight.replace(Sparse.pack(dense))
    data = checked(weight.model)
    assert not onnx.load_from_string(data).graph.sparse_initializer
    assert np.allclose(run(data, {"x": X})[0], X @ dense, atol=1e-5)
