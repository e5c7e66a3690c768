"""The bundled models are what models/README.md says: scores, structure, data, no traces of where they were made."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

MODELS = pathlib.Path(__file__).parents[2] / "models"
NAMES = ["digits_cnn", "digits_gru", "gloss_transformer"]
# One sample of 700 is 0.0014: a last-bit difference between processors may flip one such sample, not two.
TOLERANCE = 0.002
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def load(name: str) -> onnx.ModelProto:
    return onnx.load(MODELS / name / "model.onnx")


def arrays(name: str, split: str) -> dict[str, np.ndarray]:
    with np.load(MODELS / name / f"{split}.npz") as file:
        return dict(file)


def facts(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "model.json").read_text())
    return found


def run(name: str, data: dict[str, np.ndarray]) -> np.ndarray:
    """The model's logits for `data`, arrays named as its inputs; one thread, CPU provider."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(MODELS / name / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {i.name: data[i.name].astype(NUMPY[i.type]) for i in session.get_inputs()}
    logits: np.ndarray = session.run(None, feeds)[0]
    return logits


def accuracy(name: str, data: dict[str, np.ndarray]) -> float:
    return float((run(name, data).argmax(1) == data["y"]).mean())


def operators(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_stated_score_is_what_onnxruntime_computes(name: str) -> None:
    data = arrays(name, "eval")
    assert facts(name)["metric"] == "accuracy"
    assert facts(name)["eval_samples"] == len(data["y"]) >= 700
    assert accuracy(name, data) == pytest.approx(facts(name)["score"], abs=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_readme_states_the_same_score_and_size(name: str) -> None:
    row = next(line for line in (MODELS / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert f"{facts(name)['score']:.4f}" in row
    assert f"{facts(name)['parameters']:,}" in row
    assert f"{(MODELS / name / 'model.onnx').stat().st_size:,}" in row


@pytest.mark.parametrize("name", NAMES)
def test_file_is_valid_and_carries_no_traces(name: str) -> None:
    model = load(name)
    onnx.checker.check_model(model, full_check=True)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    raw = model.SerializeToString()
    assert not any(trace in raw for trace in (b"pkg.torch", b".py", b"site-packages", b"/work", b"/home"))


@pytest.mark.parametrize("name", NAMES)
def test_data_fits_the_inputs_and_splits_are_disjoint(name: str) -> None:
    inputs = {value.name: value.type.tensor_type for value in load(name).graph.input}
    rows: list[bytes] = []
    for split in ("train", "calib", "eval"):
        data = arrays(name, split)
        assert data.keys() == {*inputs, "y"}
        assert all(array.dtype in (np.uint8, np.uint16) and len(array) == len(data["y"]) for array in data.values())
        assert all(data[key].ndim == len(kind.shape.dim) for key, kind in inputs.items())
        samples = np.concatenate([data[key].reshape(len(data["y"]), -1) for key in sorted(inputs)], axis=1)
        rows += {sample.tobytes() for sample in samples}  # equal inputs inside one split are no leak
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("digits_cnn", {"image": ["batch", 1, 8, 8]}),
        ("digits_gru", {"rows": ["batch", "steps", 8]}),
        ("gloss_transformer", {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}),
    ],
)
def test_dynamic_axes_are_declared_and_work(name: str, axes: dict[str, list[str | int]]) -> None:
    declared = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in load(name).graph.input
    }
    assert declared == axes
    data = arrays(name, "calib")
    several = run(name, {key: array[:3] for key, array in data.items()})
    alone = np.concatenate([run(name, {key: array[i : i + 1] for key, array in data.items()}) for i in range(3)])
    np.testing.assert_allclose(several, alone, atol=1e-4)  # float32 sums in another order


def test_cnn_keeps_batch_normalization_depthwise_and_residual_blocks() -> None:
    model = load("digits_cnn")
    count = operators(model)
    assert (count["Conv"], count["BatchNormalization"], count["Add"]) == (12, 12, 3)
    maker = {output: node for node in model.graph.node for output in node.output}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert all(maker[norm.input[0]].op_type == "Conv" for norm in norms)
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    groups = [attribute(n, "group") for n in model.graph.node if n.op_type == "Conv" and shapes[n.input[1]][1] == 1]
    assert sorted(groups) == [1, 32, 64, 256]  # the stem reads one channel; the others are depthwise


def test_transformer_has_attention_with_mask_layer_normalization_gelu_and_embedding() -> None:
    model = load("gloss_transformer")
    count = operators(model)
    assert count["LayerNormalization"] == 7
    assert count["Softmax"] == count["Erf"] == 3  # Gelu is written with Erf below opset 20
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    tables = [shapes[n.input[0]] for n in model.graph.node if n.op_type == "Gather" and n.input[0] in shapes]
    vocabulary = (MODELS / "gloss_transformer" / "vocabulary.txt").read_text().splitlines()
    assert [len(vocabulary), 64] in tables
    assert facts("gloss_transformer")["parameters"] >= 300_000


def test_padding_of_the_transformer_changes_nothing() -> None:
    data = arrays("gloss_transformer", "eval")
    length = 6
    short = np.flatnonzero(data["attention_mask"].sum(1) == length)[:50]
    padded = {key: data[key][short] for key in ("input_ids", "attention_mask")}
    assert len(short) == 50
    trimmed = {key: array[:, :length] for key, array in padded.items()}
    # Masked scores are 1e4 lower: their softmax is exactly 0 in float32, what is left is the order of sums.
    np.testing.assert_allclose(run("gloss_transformer", padded), run("gloss_transformer", trimmed), atol=1e-4)


def test_both_branches_of_the_if_hold_weights_and_are_used() -> None:
    branches = [node for node in load("digits_gru").graph.node if node.op_type == "If"]
    assert len(branches) == 1
    for side in ("then_branch", "else_branch"):
        graph = attribute(branches[0], side)
        assert sorted(tuple(t.dims) for t in graph.initializer) == [(10,), (10, 64), (64,), (64, 64)]
    data = arrays("digits_gru", "eval")
    part = {"rows": data["rows"][:, :5], "y": data["y"]}
    stated = facts("digits_gru")["score_first_5_rows"]
    assert accuracy("digits_gru", part) == pytest.approx(stated, abs=TOLERANCE)
    assert stated > 0.85


def test_everything_together_stays_under_five_megabytes() -> None:
    kept = [path for path in MODELS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in kept) < 5_000_000
