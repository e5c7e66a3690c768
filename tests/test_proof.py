"""What the proof after a pass promises: models too large for memory are run from files with the same outcome."""

from __future__ import annotations

import dataclasses
import pathlib

import onnx
import pytest
from onnx import TensorProto, helper

import onnxcompress as oc
from onnxcompress import proof
from onnxcompress.errors import ModelError
from onnxcompress.model.limits import DEFAULT

MODELS = pathlib.Path(__file__).parent.parent / "models"
RECIPES = {
    "share": [{"weight-sharing": {"bits": 4}}],
    "prune": [{"magnitude-pruning": {"sparsity": 0.5, "storage": "sparse"}}],
    "share what was pruned": [{"magnitude-pruning": {"sparsity": 0.5}}, {"weight-sharing": {"bits": 4}}],
}


@pytest.mark.parametrize("model", ["digits_cnn", "digits_gru"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_large_model_is_proved_from_files(recipe: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = MODELS / model / "model.onnx"
    small = oc.compress(path, {"passes": RECIPES[recipe]}, calibration=MODELS / model / "calib.npz")
    monkeypatch.setattr(proof, "MAPPED_BYTES", 1000)
    middle = oc.compress(path, {"passes": RECIPES[recipe]}, calibration=MODELS / model / "calib.npz")
    monkeypatch.setattr(proof, "DEFAULT", dataclasses.replace(DEFAULT, inline_bytes=1000))
    large = oc.compress(path, {"passes": RECIPES[recipe]}, calibration=MODELS / model / "calib.npz")
    assert all(step.proof is None for step in large.steps[:-1])
    for done, first in ((middle, 0), (large, len(large.steps) - 1)):
        for step, like in list(zip(done.steps, small.steps, strict=True))[first:]:
            found, wanted = step.proof, like.proof
            assert found is not None
            assert wanted is not None
            assert found.latency_ratio is None
            assert wanted.latency_ratio is not None
            assert found.cosine == pytest.approx(wanted.cosine, abs=1e-5)
            assert found.top1 == wanted.top1


def test_expanded_weights_count_towards_the_size(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MODELS / "digits_cnn/model.onnx"
    shared = oc.compress(source, {"passes": [{"weight-sharing": {"bits": 1}}]}).model
    before = proof.expanded_bytes(oc.load(source))
    # Far below the bound nothing is looked at; near it the weights count as what they are expanded to.
    assert proof.expanded_bytes(shared) < 0.2 * before
    monkeypatch.setattr(proof, "MAPPED_BYTES", 1000)
    assert before <= proof.expanded_bytes(shared) < 1.2 * before


def test_an_output_numpy_has_no_type_for_is_named() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    with pytest.raises(ModelError, match=r"No corresponding Numpy type for Tensor Type\. bfloat16"):
        oc.compress(model, {"passes": ["simplify"]})
