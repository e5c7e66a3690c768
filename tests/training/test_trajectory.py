"""Ten steps of SGD and AdamW follow PyTorch (`trajectory.py`) weight by weight, clipped or not, in any runs."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.model import bridge
from onnxcompress.model.weights import weights
from onnxcompress.training import step, update
from onnxcompress.training.optimizers import SGD, AdamW, Optimizer
from onnxcompress.training.runner import Runner
from tests.training.test_step import cross_entropy

FILE = pathlib.Path(__file__).with_name("trajectory.npz")
OPTIMIZERS: dict[str, tuple[Optimizer, float]] = {"sgd": (SGD(momentum=0.9), 0.05), "adamw": (AdamW(), 1e-3)}
CLIPS = {"free": None, "clipped": 0.1}
STORED = dict(np.load(FILE, allow_pickle=False))


def network(name: str) -> ir.Model:
    return bridge.from_proto(onnx.load_from_string(STORED[f"{name}/model"].tobytes()), name)


@pytest.mark.parametrize("run", [48, update.RUN])
@pytest.mark.parametrize("how", list(CLIPS))
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("name", ["convolutional", "encoder", "recurrent"])
def test_ten_steps_follow_pytorch(name: str, kind: str, how: str, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight within 1e-5 of what PyTorch made of it in float64, losses within 1e-6; no other weight moved."""
    monkeypatch.setattr(update, "RUN", run)
    optimizer, lr = OPTIMIZERS[kind]
    x, y = STORED[f"{name}/x"], STORED[f"{name}/y"]
    model = network(name)
    start = {weight.key: weight.array() for weight in weights(model)}
    graph = step.build(step.forward(model, [{"x": x[0]}]), ["z"], cross_entropy, optimizer, clip=CLIPS[how])
    losses = []
    with Runner(graph) as runner:
        for t, (inputs, labels) in enumerate(zip(x, y, strict=True), 1):
            weight = np.ones(len(labels), np.float32)
            loss, norm = runner.step([{"x": inputs, "y": labels, "weight": weight}], lr, t)
            losses.append(loss)
            assert norm > 0.1  # so that clipping does something
        found = graph.trained({leaf.name: runner.read()[leaf.name] for leaf in graph.leaves})
    case = f"{name}/{kind}/{how}"
    np.testing.assert_allclose(losses, STORED[f"{case}/losses"], rtol=1e-6, atol=0)
    wanted = {key.rsplit("/", 1)[1]: array for key, array in STORED.items() if key.startswith(f"{case}/after/")}
    assert set(found) == set(wanted)
    worst = {key: float(np.abs(found[key]["w"] - after).max()) for key, after in wanted.items()}
    print(case, f"{max(worst.values()):.2g}", f"torch {float(STORED[case + '/float32']):.2g}")
    assert max(worst.values()) <= 1e-5, worst
    assert max(float(np.abs(after - start[key]).max()) for key, after in wanted.items()) > 5e-3  # they went somewhere


def test_file_is_small() -> None:
    assert FILE.stat().st_size < 300 * 1024
