"""A file is proved against its parent: what its encodings explain holds, and anything else is named."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np
import onnx_ir as ir
import pytest

import onnxcompress as oc
from onnxcompress.encodings import Affine, Codebook, Dense, Masked, Sparse
from onnxcompress.model.weights import Weight
from onnxcompress.verification import Verification, verify
from onnxcompress.verification.judge import judge
from onnxcompress.verification.result import WeightProof
from tests.builders import affine, floats, graph, info, model, node, opened, tensors
from tests.house import BUNDLED_QUICK, bundled, split

PRUNED = {"magnitude-pruning": {"sparsity": 0.5}}
SPARSE = {"magnitude-pruning": {"sparsity": 0.5, "storage": "sparse"}}
FORMS = {
    "pruned": [PRUNED],
    "sparse": ["simplify", SPARSE],
    "shared": ["simplify", {"weight-sharing": {"bits": 4}}],
    "pruned and shared": ["simplify", PRUNED, {"weight-sharing": {"bits": 4}}],
    "dynamic": ["dynamic-quantization"],
    "static": ["static-quantization"],
    "simplified and static": ["simplify", "static-quantization"],
    "pruned and static": [PRUNED, "static-quantization"],
}


def made(name: str, form: str, folder: pathlib.Path) -> pathlib.Path:
    """A bundled model in that form, saved."""
    out = folder / "out.onnx"
    oc.compress(bundled(name), {"passes": FORMS[form]}, out=out, calibration=split(name, "calib"))
    return out


def held(model: ir.Model, key: str) -> Weight:
    """The weight of that name."""
    return next(weight for weight in oc.weights(model) if weight.key == key)


def chance(row: WeightProof) -> float:
    """How far above its expectation an error may lie: rounding of few elements is rarely as large as their mean is.

    The mean square of n rounding errors, uniform over a step, has a standard deviation of sqrt(0.8 / n) of itself; four
    of those are allowed, and a fifth for weights of any size.
    """
    return max(1.2, math.sqrt(1 + 4 * math.sqrt(0.8 / math.prod(row.shape))))


def kinds(found: Verification) -> dict[str, str]:
    """Where -> kind of each problem."""
    return {problem.where: problem.kind for problem in found.problems}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BUNDLED_QUICK)
def test_what_the_passes_make_holds(name: str, form: str, tmp_path: pathlib.Path) -> None:
    found = verify(made(name, form, tmp_path), bundled(name), calibration=split(name, "calib"))
    assert found.problems == ()
    assert [note.partition(":")[0] for note in found.notes] == (
        ["activations were measured on a model that was compressed already"] if form == "pruned and static" else []
    )
    assert [row for row in found.weights if row.error > chance(row) * row.expected + 1e-6] == []
    encoded = [row for row in found.weights if row.encoding != "dense"]
    assert encoded
    assert max(row.error for row in encoded) < (0.02 if "static" in form and "pruned" not in form else 0.6)


def test_a_file_that_does_not_say_what_was_done_is_tried_both_ways() -> None:
    small = oc.compress(bundled("digits_cnn"), ["simplify", {"weight-sharing": {"bits": 4}}]).model
    found = verify(small, bundled("digits_cnn"))
    assert found.holds
    assert "compared with the parent after the recipe 'lossless'" in found.notes


def test_an_untouched_model_holds_with_error_zero() -> None:
    found = verify(bundled("digits_cnn"), bundled("digits_cnn"))
    assert found.holds
    assert {row.error for row in found.weights} == {0.0}
    assert found.notes == ("no provenance: this file does not say what it was made from",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """digits_cnn in some forms."""
    return {
        form: made("digits_cnn", form, tmp_path_factory.mktemp(form.replace(" ", "-")))
        for form in ("pruned", "sparse", "shared", "static", "dynamic")
    }


KEY = "residual2.first.weight"


def broken(files: dict[str, pathlib.Path], form: str) -> tuple[ir.Model, Weight]:
    """A copy to break, and the weight to break in it."""
    model = oc.load(files[form])
    return model, held(model, KEY)


def found_in(model: ir.Model, *, calibration: bool = False) -> Verification:
    data = split("digits_cnn", "calib") if calibration else None
    return verify(model, bundled("digits_cnn"), calibration=data)


def test_a_scale_of_five_percent_more_is_caught(files: dict[str, pathlib.Path]) -> None:
    model, weight = broken(files, "static")
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    scale = encoding.scale.copy()
    scale[3] *= np.float32(1.05)
    weight.replace(dataclasses.replace(encoding, scale=scale))
    found = found_in(model)
    assert kinds(found) == {KEY: "weight"}
    row = next(row for row in found.weights if row.key == KEY)
    assert row.unexplained > 0
    assert "half a step" in row.why


def test_a_zero_point_off_by_one_is_caught(files: dict[str, pathlib.Path]) -> None:
    model, weight = broken(files, "static")
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    weight.replace(dataclasses.replace(encoding, zero_point=np.ones(encoding.scale.shape, np.int8)))
    found = found_in(model)
    assert kinds(found) == {KEY: "weight"}
    row = next(row for row in found.weights if row.key == KEY)
    assert (
        row.against == "parent with BatchNormalization"
    )  # that is what it was quantized from, not what fits by chance
    assert row.unexplained > 0.9 * weight.size


def normalized(scale: float, *, folded: bool, raw: bool = False) -> ir.Model:
    """A convolution and its BatchNormalization, which multiplies by `scale`.

    `folded`: taken in by the convolution, which has a bias in its place. `raw`: but the weight is as it was.
    """
    array = floats(8, 4, 3, 3)
    arrays = {"w": array * np.float32(scale) if folded and not raw else array}
    if folded:
        arrays["norm.bias"] = np.zeros(8, np.float32)
        nodes = [node("Conv", ["x", "w", "norm.bias"], ["norm"])]
    else:
        arrays |= {name: np.zeros(8, np.float32) for name in ("beta", "mean")}
        arrays |= {"gamma": np.full(8, scale, np.float32), "variance": np.ones(8, np.float32)}
        norm = node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["norm"], epsilon=0.0)
        nodes = [node("Conv", ["x", "w"], ["c"]), norm]
    nodes.append(node("Relu", ["norm"], ["y"]))
    body = graph(nodes, [info("x", [1, 4, 6, 6])], [info("y", [1, 8, 4, 4])], tensors(**arrays))
    return opened(model(body))


@pytest.mark.parametrize("scale", [0.5, 1.01, 3.0])
def test_the_graph_says_whether_a_weight_took_in_its_normalization(scale: float) -> None:
    parent = normalized(scale, folded=False)
    for folded, against in ((False, "parent"), (True, "parent with BatchNormalization")):
        made = normalized(scale, folded=folded)
        found = verify(made, parent)
        assert found.problems == ()
        assert {row.key: row.against for row in found.weights}["w"] == against
        weight = held(made, "w")
        right = affine(weight.array(), "dequantize-linear", axis=0)
        weight.replace(dataclasses.replace(right, zero_point=np.ones(right.scale.shape, np.int8)))
        row = next(row for row in verify(made, parent).weights if row.key == "w")
        assert row.against == against
        assert row.unexplained >= weight.size - 8  # the largest of each of 8 channels may have been cut off


def test_a_weight_that_did_not_take_in_the_normalization_that_is_gone_is_caught() -> None:
    found = verify(normalized(1.01, folded=True, raw=True), normalized(1.01, folded=False))
    assert kinds(found) == {"w": "weight"}


@pytest.mark.parametrize("form", ["pruned", "sparse", "shared", "static"])
def test_one_element_is_caught_in_every_encoding(files: dict[str, pathlib.Path], form: str) -> None:
    model, weight = broken(files, form)
    encoding = weight.encoding
    if isinstance(encoding, Affine):
        q = encoding.q.copy()
        q.reshape(-1)[77] += 1
        weight.replace(dataclasses.replace(encoding, q=q))
    elif isinstance(encoding, Codebook):
        codes = encoding.codes.copy()
        codes.reshape(-1)[77] ^= 1
        weight.replace(dataclasses.replace(encoding, codes=codes))
    else:
        array = encoding.decode().copy()
        at = int(np.flatnonzero(array)[77])
        array.reshape(-1)[at] = np.nextafter(array.reshape(-1)[at], np.float32(9))
        weight.replace(Sparse.pack(array) if isinstance(encoding, Sparse) else Masked(array))
    found = found_in(model)
    assert kinds(found) == {KEY: "weight"}
    assert next(row for row in found.weights if row.key == KEY).unexplained == 1


@pytest.mark.parametrize("form", ["pruned", "shared", "static"])
def test_a_zeroed_channel_is_caught(files: dict[str, pathlib.Path], form: str) -> None:
    model, weight = broken(files, form)
    array = weight.array().copy()
    array[5] = 0
    encoding = weight.encoding
    if isinstance(encoding, Affine):
        q = encoding.q.copy()
        q[5] = 0
        weight.replace(dataclasses.replace(encoding, q=q))
    else:
        weight.replace(Masked(array))
    assert kinds(found_in(model)) == {KEY: "weight"}


def test_a_dropped_bias_is_named_with_its_layer(files: dict[str, pathlib.Path]) -> None:
    model = oc.load(files["static"])
    conv = next(node for node in model.graph if node.op_type == "Conv" and len(node.inputs) == 3)
    bias = conv.inputs[2]
    assert bias is not None
    conv.resize_inputs(2)
    found = found_in(model)
    (problem,) = [problem for problem in found.problems if problem.kind == "structure"]
    assert problem.layers == (conv.outputs[0].name,)
    assert str(bias.name) in problem.message


def test_a_rewired_graph_is_caught(files: dict[str, pathlib.Path]) -> None:
    model = oc.load(files["static"])
    first, second = [node for node in model.graph if node.op_type == "Relu"][:2]
    second.replace_input_with(0, first.inputs[0])
    assert "structure" in kinds(found_in(model)).values()


def test_weights_of_two_layers_exchanged_are_caught(files: dict[str, pathlib.Path]) -> None:
    model = oc.load(files["pruned"])
    found = [w for w in oc.weights(model) if w.role == "conv"]
    one, other = next((a, b) for a in found for b in found if a.key < b.key and a.shape == b.shape)
    arrays = one.array().copy(), other.array().copy()
    one.replace(Dense(arrays[1]))
    other.replace(Dense(arrays[0]))
    assert kinds(found_in(model)) == {one.key: "weight", other.key: "weight"}
    model = oc.load(files["pruned"])
    found = [w for w in oc.weights(model) if w.key in (one.key, other.key)]
    nodes, values = [w.uses[0].node for w in found], [w.value for w in found]
    nodes[0].replace_input_with(1, values[1])
    nodes[1].replace_input_with(1, values[0])
    assert set(kinds(found_in(model)).values()) == {"structure"}


def test_another_parent_is_named(files: dict[str, pathlib.Path]) -> None:
    found = verify(files["static"], bundled("digits_gru"))
    assert "provenance" in {problem.kind for problem in found.problems}


def test_activations_are_compared_with_the_data(files: dict[str, pathlib.Path]) -> None:
    for move in ("zero point", "scale"):
        model = oc.load(files["static"])
        q = next(node for node in model.graph if node.op_type == "QuantizeLinear")
        value = q.inputs[2 if move == "zero point" else 1]
        assert value is not None
        assert value.const_value is not None
        old = value.const_value.numpy()
        value.const_value = ir.tensor(old + np.uint8(1) if move == "zero point" else old * np.float32(1.05))
        found = found_in(model, calibration=True)
        assert {problem.kind for problem in found.problems} == {"activation"}, move
    other = verify(files["static"], bundled("digits_cnn"), calibration=split("digits_cnn", "eval"))
    assert other.holds
    assert "not what the file was calibrated with" in other.notes[0]


def test_a_pair_that_disagrees_is_caught_without_data(files: dict[str, pathlib.Path]) -> None:
    model = oc.load(files["static"])
    dq = next(n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].producer() is not None)  # type: ignore[union-attr]
    fresh = ir.Value(name="other", const_value=ir.tensor(np.array(0.5, np.float32), name="other"))
    model.graph.initializers["other"] = fresh
    dq.replace_input_with(1, fresh)
    assert set(kinds(found_in(model)).values()) == {"activation"}


def test_a_trained_model_is_compared_and_not_judged(tmp_path: pathlib.Path) -> None:
    recipe = ["simplify", PRUNED, {"distill": {"epochs": 1, "data": str(split("digits_cnn", "calib"))}}]
    oc.compress(bundled("digits_cnn"), {"passes": recipe}, out=tmp_path / "o.onnx")
    found = verify(tmp_path / "o.onnx", bundled("digits_cnn"))
    assert found.problems == ()
    assert any("told, not judged" in note for note in found.notes)
    assert not any(row.judged for row in found.weights)
    assert 0.1 < max(row.error for row in found.weights) < 1


@pytest.mark.parametrize("factor", [1.05, 8.0])
def test_a_codebook_that_grew_does_not_explain_itself(factor: float) -> None:
    array = floats(64, 32)
    shared = np.linspace(-3, 3, 16, dtype=np.float32)
    codes = np.abs(array[..., None] - shared).argmin(-1).astype(np.uint8)
    means = np.array([array[codes == k].mean() if (codes == k).any() else shared[k] for k in range(16)], np.float32)
    codes = np.abs(array[..., None] - means).argmin(-1).astype(np.uint8)
    assert judge(Codebook(codes, means), array).unexplained == 0
    wrong = judge(Codebook(codes, means * np.float32(factor)), array)
    assert wrong.unexplained > 50
    assert wrong.error > 1.1 * wrong.expected


def test_pruning_takes_the_smallest() -> None:
    array = floats(16, 16)
    least = np.abs(array) < np.median(np.abs(array))
    right = judge(Masked(np.where(least, np.float32(0), array)), array)
    assert right.unexplained == 0
    assert right.error == pytest.approx(right.expected)
    assert judge(Masked(np.where(least, array, np.float32(0))), array).unexplained == np.count_nonzero(~least)
