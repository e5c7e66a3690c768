"""Losses on tensors within the models, and the L1 penalty, against numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training.distill import Settings, Trained, distill, write
from onnxcompress.training.initial import randomize
from onnxcompress.training.order import Order
from onnxcompress.training.targets import FeatureLoss, Objective
from tests.training.small import arrays, mlp, opened, sequences, tagger

STILL = Settings(epochs=1, batch=64, lr=1e-20)  # weights do not move: the loss is that of the start


def fresh(of: ir.Model) -> ir.Model:
    randomize(of, 0)
    return of


def found(of: ir.Model) -> dict[str, np.ndarray]:
    return {w.key: w.array().astype(np.float64) for w in weights(of)}


def fitted(objective: Objective, settings: Settings = STILL, teacher: ir.Model | None = None) -> Trained:
    student = fresh(load(mlp()))
    data = opened(student, {"x": arrays(64)["x"]})
    return distill(teacher or load(mlp()), student, data, objective=objective, settings=settings)


def hidden(of: ir.Model) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w, x = found(of), arrays(64)["x"].astype(np.float64)
    h = x @ w["w1"] + w["b1"]
    r = np.maximum(h, 0)
    return h, r, r @ w["w2"] + w["b2"]


@pytest.mark.parametrize("kind", ["values", "cosine"])
@pytest.mark.parametrize("names", ["h", "r=h"])
def test_the_distance_of_a_feature_is_added(kind: FeatureLoss, names: str) -> None:
    mine, theirs = hidden(fresh(load(mlp()))), hidden(load(mlp()))
    a, b = mine[1 if names.startswith("r") else 0], theirs[0]
    distance = ((a - b) ** 2).mean()
    if kind == "cosine":
        distance = (1 - (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))).mean()
    output = ((mine[2] - theirs[2]) ** 2).mean()
    objective = Objective("values", features=(names,), feature_loss=kind, feature_weight=0.3)
    done = fitted(objective)
    assert done.epochs[0].loss == pytest.approx(output + 0.3 * distance, rel=1e-5)
    said = "squared error" if kind == "values" else "cosine distance"
    assert done.losses == {"z": "squared error", f"feature {names[0]}": f"0.3 x {said}"}


def test_a_feature_is_learned() -> None:
    objective = Objective("values", features=("h",), feature_weight=5)
    done = fitted(objective, Settings(epochs=40, batch=16, lr=1e-2))
    student = fresh(load(mlp()))
    before = np.abs(hidden(student)[0] - hidden(load(mlp()))[0]).mean()
    write(student, done.parameters)
    assert np.abs(hidden(student)[0] - hidden(load(mlp()))[0]).mean() < 0.1 * before


@pytest.mark.parametrize("feature", ["t", "t=h"])
def test_features_of_sequences_leave_padding_out(feature: str) -> None:
    student, teacher, given = fresh(load(tagger())), load(tagger()), sequences()
    w, v = found(student), found(teacher)
    mask = given["attention_mask"].astype(bool)
    h, g = (of["table"][given["input_ids"]] * mask[..., None] for of in (w, v))
    mine, theirs = np.tanh(h @ w["w1"]), np.tanh(g @ v["w1"])
    other = theirs if feature == "t" else g
    order = Order(48, 8, 0, mask.sum(1))
    wanted = []
    for update in range(6):
        rows = order.samples(update)
        real = mask[rows]
        output = (((mine @ w["w2"] - theirs @ v["w2"])[rows]) ** 2).mean(-1)[real].mean()
        wanted.append(output + (((mine - other)[rows]) ** 2).mean(-1)[real].mean())
    settings = Settings(epochs=1, batch=8, lr=1e-20)
    objective = Objective("values", features=(feature,))
    done = distill(teacher, student, opened(student, given), objective=objective, settings=settings)
    assert done.epochs[0].loss == pytest.approx(np.mean(wanted), rel=1e-5)


def test_features_that_do_not_fit_are_refused() -> None:
    for names, message in [
        ("nope", "the student has no tensor 'nope'"),
        ("h=nope", "the teacher has no tensor 'nope'"),
        ("h=z", r"the student's tensor 'h' is \[n, 200\], the teacher's 'z' is \[n, 4\]: they do not fit"),
    ]:
        with pytest.raises(ModelError, match=message):
            fitted(Objective(features=(names,)))
    student = load(mlp())
    with pytest.raises(ModelError, match="--feature h: is learned from a teacher, and there is none"):
        distill(None, student, opened(student, arrays(64)), objective=Objective(features=("h",)))


def test_the_l1_penalty_pushes_layers_to_zero() -> None:
    w = found(fresh(load(mlp())))
    layers = sum(np.abs(w[key]).sum() for key in ("w1", "w2"))
    plain, penalized = fitted(Objective("values")), fitted(Objective("values", l1=1e-3))
    assert penalized.epochs[0].loss - plain.epochs[0].loss == pytest.approx(1e-3 * layers, rel=1e-4)
    settings = Settings(epochs=20, batch=16, optimizer="sgd", lr=1e-2, clip=None, momentum=0)
    without, with_it = (fitted(Objective("values", l1=l1), settings).parameters for l1 in (0.0, 0.05))
    small = [np.mean(np.abs(p["w1"]["w"]) < 0.02) for p in (without, with_it)]
    assert small[1] > 2 * small[0]
    pushed = 0.05 * 1e-2 * 80 / 2  # l1 x lr x steps, the learning rate declines to nearly nothing
    change = np.abs(without["w1"]["w"]).mean() - np.abs(with_it["w1"]["w"]).mean()
    assert change == pytest.approx(pushed, rel=0.15)
