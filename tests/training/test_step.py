"""The step against numpy: losses, optimizers, clipping, packing, accumulation, and each encoding's training form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.autodiff.errors import NoGradient
from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.encodings import Affine, Codebook, Dense, Encoding, Masked, Sparse
from onnxcompress.errors import PassError
from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training import losses, step, update
from onnxcompress.training.optimizers import SGD, AdamW, Optimizer
from onnxcompress.training.runner import Runner
from onnxcompress.training.schedules import Schedule
from onnxcompress.training.step import Inputs, TrainingGraph
from tests.builders import floats
from tests.training.small import arrays, mlp, outputs

FEEDS = arrays(8)


def cross_entropy(inputs: Inputs, values: Mapping[str, Tensor]) -> Tensor:
    """The loss of the tests: labels y, all weights 1."""
    z = values["z"]
    labels = inputs("y", ir.DataType.INT64, ["n"])
    return losses.cross_entropy(z, labels, inputs("weight", ir.DataType.FLOAT, ["n"]), 1)


def built(of: ir.Model, optimizer: Optimizer, **options: object) -> TrainingGraph:
    copy = step.forward(of, [FEEDS])
    return step.build(copy, ["z"], cross_entropy, optimizer, **options)  # type: ignore[arg-type]


def feeds(rows: slice = slice(None)) -> dict[str, np.ndarray]:
    return {"x": FEEDS["x"][rows], "y": FEEDS["y"][rows], "weight": np.ones(len(FEEDS["y"][rows]), np.float32)}


def numpy_step(w: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the network in float64, by hand."""
    x, y = FEEDS["x"].astype(np.float64), FEEDS["y"]
    h = x @ w["w1"] + w["b1"]
    r = np.maximum(h, 0)
    z = r @ w["w2"] + w["b2"]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    dz = (p - np.eye(4)[y]) / len(y)
    dh = (dz @ w["w2"].T) * (h > 0)
    return float(loss), {"w1": x.T @ dh, "b1": dh.sum(0), "w2": r.T @ dz, "b2": dz.sum(0)}


def numpy_training(steps: int, lr: float, clip: float | None, kind: str) -> dict[str, np.ndarray]:
    """The textbook update, in float64."""
    w = {k.key: k.array().astype(np.float64) for k in weights(load(mlp()))}
    m = {k: np.zeros_like(a) for k, a in w.items()}
    v = {k: np.zeros_like(a) for k, a in w.items()}
    for t in range(1, steps + 1):
        _, g = numpy_step(w)
        norm = np.sqrt(sum((a * a).sum() for a in g.values()))
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        for k in w:
            grad = g[k] * scale
            if kind == "sgd":
                m[k] = 0.9 * m[k] + grad
                w[k] = w[k] - lr * m[k]
                continue
            m[k] = 0.9 * m[k] + 0.1 * grad
            v[k] = 0.999 * v[k] + 0.001 * grad * grad
            decay = 0.01 if w[k].ndim == 2 else 0.0
            hat = np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8
            w[k] = w[k] * (1 - lr * decay) - lr * m[k] / (1 - 0.9**t) / hat
    return w


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(("kind", "optimizer", "lr"), [("adamw", AdamW(), 0.01), ("sgd", SGD(), 0.1)])
@pytest.mark.parametrize("run", [16, update.RUN])
def test_ten_steps_follow_the_textbook(
    kind: str, optimizer: Optimizer, lr: float, clip: float | None, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "RUN", run)
    graph = built(load(mlp()), optimizer, clip=clip)
    with Runner(graph) as runner:
        first, _ = runner.step([feeds()], lr, 1)
        for t in range(2, 11):
            runner.step([feeds()], lr, t)
        found = graph.trained({leaf.name: runner.read()[leaf.name] for leaf in graph.leaves})
    assert first == pytest.approx(numpy_step({w.key: w.array().astype(np.float64) for w in weights(load(mlp()))})[0])
    for key, wanted in numpy_training(10, lr, clip, kind).items():
        np.testing.assert_allclose(found[key]["w"], wanted, atol=2e-5, rtol=0)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = built(load(mlp()), AdamW()), built(load(mlp()), AdamW())
    with Runner(whole) as one, Runner(parts) as several:
        for t in range(1, 4):
            loss, norm = one.step([feeds()], 0.01, t)
            again, norm_again = several.step([feeds(slice(0, 4)), feeds(slice(4, 8))], 0.01, t)
            assert again == pytest.approx(loss, rel=1e-5)
            assert norm_again == pytest.approx(norm, rel=1e-4)
        a, b = one.read(), several.read()
    for leaf in whole.leaves:
        np.testing.assert_allclose(a[leaf.name], b[leaf.name], atol=1e-5)


def test_relative_steps_move_each_weight_in_proportion() -> None:
    graph = built(load(mlp()), AdamW(weight_decay=0.0), relative=True, clip=None)
    start = {w.key: w.array() for w in weights(load(mlp()))}
    with Runner(graph) as runner:
        runner.step([feeds()], 1e-3, 1)
        found = graph.trained({leaf.name: runner.read()[leaf.name] for leaf in graph.leaves})
    # Adam's first step is lr in every element with a gradient; RMS 0.1 is twice the reference.
    moved = np.abs(found["w2"]["w"] - start["w2"])
    assert np.median(moved) == pytest.approx(1e-3 * np.sqrt(np.mean(start["w2"] ** 2)) / 0.05, rel=0.01)
    assert np.median(np.abs(found["b2"]["w"] - start["b2"])) == pytest.approx(1e-3, rel=0.01)


def encodings() -> dict[str, Encoding]:
    w = floats(6, 200, seed=1) * 0.4
    mask = np.abs(w) > 0.3
    codes = np.random.default_rng(0).integers(0, 4, w.shape).astype(np.uint8)
    table = np.array([-0.5, 0.0, 0.2, 0.6], np.float32)
    rows = np.linspace(0.5, 1.5, 6, dtype=np.float32)[:, None] * table
    q = np.clip(np.rint(w / 0.01), -128, 127).astype(np.int8)
    unsigned = np.clip(np.rint(w / 0.01) + 128, 0, 255).astype(np.uint8)
    scale = np.linspace(0.008, 0.02, 200, dtype=np.float32)
    return {
        "dense": Dense(w),
        "masked": Masked.apply(w, mask),
        "sparse": Sparse.pack(w * mask),
        "codebook": Codebook(codes, table),
        "codebook per channel": Codebook(codes, rows, 0),
        "affine": Affine(q, np.array(0.01, np.float32)),
        "affine per channel": Affine(q, scale, np.zeros(200, np.int8), 1),
        "affine folded": Affine(unsigned, np.array(0.01, np.float32), np.array(128, np.uint8), form="folded"),
    }


@pytest.mark.parametrize("name", list(encodings()))
def test_an_encoding_trains_from_what_it_decodes_to_and_keeps_its_structure(name: str) -> None:
    encoding = encodings()[name]
    of = load(mlp())
    next(w for w in weights(of) if w.key == "w1").replace(encoding)
    before = outputs(of, {"x": FEEDS["x"]})["z"].astype(np.float64)
    logs = before - before.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    graph = built(of, AdamW(), clip=None)
    assert not graph.left
    with Runner(graph) as runner:
        loss, _ = runner.step([feeds()], 0.01, 1)
        assert loss == pytest.approx(-logs[np.arange(8), FEEDS["y"]].mean(), rel=1e-5)
        for t in range(2, 30):
            last, _ = runner.step([feeds()], 0.01, t)
        found = graph.trained({leaf.name: runner.read()[leaf.name] for leaf in graph.leaves})
    assert last < loss / 2
    new = encoding.updated(found["w1"])
    assert not np.array_equal(new.decode(), encoding.decode())
    assert (new.kind, new.shape, new.dtype, new.structure()) == (
        encoding.kind,
        encoding.shape,
        encoding.dtype,
        encoding.structure(),
    )
    if name != "dense" and not name.startswith("affine"):
        np.testing.assert_array_equal(new.decode()[encoding.decode() == 0], 0)
    if isinstance(encoding, Codebook) and isinstance(new, Codebook):
        np.testing.assert_array_equal(new.codes, encoding.codes)
    # What is stored computes what the last step computed.
    with_new = bridge.clone(of)
    next(w for w in weights(with_new) if w.key == "w1").replace(new)
    for weight in weights(with_new):
        if weight.key != "w1":
            weight.replace(weight.encoding.updated(found[weight.key]))
    z = outputs(with_new, {"x": FEEDS["x"]})["z"]
    assert (z.argmax(1) == FEEDS["y"]).mean() >= 0.9


def test_nothing_to_train_says_why() -> None:
    with pytest.raises(PassError, match="nothing in it can be trained: 4 x not selected"):
        built(load(mlp()), AdamW(), allows=lambda weight: False)


def test_unselected_weights_stay_constant() -> None:
    graph = built(load(mlp()), AdamW(), allows=lambda weight: weight.key == "w2")
    assert set(graph.left) == {"w1", "b1", "b2"}
    assert [leaf.key for leaf in graph.leaves] == ["w2"]


def test_weights_behind_an_operator_without_a_gradient_are_called_by_their_names() -> None:
    of = load(mlp())
    hidden = next(node for node in of.graph if node.op_type == "Relu")
    hidden.op_type, hidden.domain = "Mystery", "some.domain"
    of.opset_imports["some.domain"] = 1
    with pytest.raises(NoGradient, match=r"\(Mystery\): .*; it cuts off w1, b1: leave these out") as raised:
        built(of, AdamW())
    assert raised.value.cut_off == ("w1", "b1")


def test_a_schedule_warms_up_and_declines() -> None:
    cosine = Schedule(1.0, 100, "cosine", warmup=0.1, floor=0.01)
    assert [cosine(0), cosine(9)] == pytest.approx([0.1, 1.0])
    assert cosine(55) == pytest.approx(0.01 + 0.99 / 2)
    assert cosine(99) < 0.02
    steps = dataclasses.replace(cosine, kind="step", warmup=0.0)
    assert [steps(0), steps(50), steps(75)] == pytest.approx([1.0, 0.1, 0.01])
