"""A step whose batch comes in several calls: the same as in one, the same bytes on any number of threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.autodiff.tensor import Tensor
from onnxcompress.model.load import load
from onnxcompress.training import runner as runners
from onnxcompress.training.distill import Conditions, Settings, distill
from onnxcompress.training.heads import heads
from onnxcompress.training.losses import cross_entropy
from onnxcompress.training.optimizers import SGD, AdamW
from onnxcompress.training.runner import Runner
from onnxcompress.training.samples import call_size
from onnxcompress.training.step import Inputs, TrainingGraph, build, forward
from onnxcompress.training.storage import ALIGNED, Buffer, Layout
from onnxcompress.training.update import RUN, runs
from tests.house import ROOT
from tests.training.small import arrays, mlp, opened
from tests.training.test_features import fresh
from tests.training.test_step import built

DATA = arrays(24)
COUNTED = (np.arange(24) % 5 != 0).astype(np.float32) * np.linspace(0.5, 2, 24, dtype=np.float32)
COUNTED[8:12] = 0  # a call in which nothing counts


def calls(*edges: int) -> list[dict[str, np.ndarray]]:
    cuts = [slice(a, b) for a, b in zip((0, *edges), (*edges, 24), strict=True)]
    return [{"x": DATA["x"][cut], "y": DATA["y"][cut], "weight": COUNTED[cut]} for cut in cuts]


def trained(
    graph: TrainingGraph, parts: list[dict[str, np.ndarray]], threads: int = 1, steps: int = 5
) -> tuple[Any, dict[str, np.ndarray]]:
    with Runner(graph, threads=threads) as runner:
        told = [runner.step(parts, 0.01, t) for t in range(1, steps + 1)]
        return told, runner.read()


@pytest.mark.parametrize("edges", [(12,), (8, 12), (3, 8, 12, 20), (1, 2, 3, 5, 7, 8, 12, 13)])
def test_calls_of_any_size_and_weight_add_up_to_the_batch(edges: tuple[int, ...]) -> None:
    graph = built(load(mlp()), SGD(), clip=0.5)
    (whole, one), (parts, several) = trained(graph, calls()), trained(graph, calls(*edges))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    for name, array in one.items():
        np.testing.assert_allclose(several[name], array, atol=1e-6)
    (weighted, _), logs = whole[0], _losses()
    assert weighted == pytest.approx(float((logs * COUNTED).sum() / COUNTED.sum()), rel=1e-5)


def _losses() -> np.ndarray:
    """Each sample's loss before training."""
    found = []
    with Runner(built(load(mlp()), SGD(), clip=None)) as runner:
        for index in range(24):
            feeds = {"x": DATA["x"][index : index + 1], "y": DATA["y"][index : index + 1]}
            found.append(runner.step([{**feeds, "weight": np.ones(1, np.float32)}], 0.0, 1)[0])
    return np.array(found)


@pytest.mark.parametrize("edges", [(12,), (8, 12), (3, 8, 12, 20)])
def test_the_result_does_not_depend_on_threads(edges: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.training.update.RUN", 64)  # several runs to share
    graph = built(load(mlp()), AdamW())
    results = [trained(graph, calls(*edges), threads) for threads in (1, 2, 3)]
    assert len(results[0][1]) == 12
    for told, state in results[1:]:
        assert told == results[0][0]
        assert all(state[name].tobytes() == array.tobytes() for name, array in results[0][1].items())


@pytest.mark.parametrize("taught", [False, True])
def test_a_whole_training_does_not_depend_on_threads(taught: bool) -> None:
    student = load(mlp())
    teacher = fresh(student) if taught else None
    settings, data = Settings(epochs=2, batch=32), opened(student, arrays(64), 32)
    found = [
        distill(teacher, student, data, settings=settings, conditions=Conditions(threads=threads)) for threads in (1, 2)
    ]
    for key, parts in found[0].parameters.items():
        assert found[1].parameters[key]["w"].tobytes() == parts["w"].tobytes()


@pytest.mark.parametrize(("count", "lanes"), [(1, 1), (2, 2), (9, runners.LANES)])
def test_lanes_follow_from_the_calls(count: int, lanes: int) -> None:
    with Runner(built(load(mlp()), SGD()), threads=1) as runner:
        runner.step(calls(*range(1, count)), 0.01, 1)
        assert len(runner._lanes) == lanes


def test_runners_of_one_graph_do_not_disturb_each_other() -> None:
    """Convolutions run blocked for the shapes of a runner's first step: in a graph of its own."""
    model = load(ROOT / "models" / "digits_cnn" / "model.onnx")
    with np.load(ROOT / "models" / "digits_cnn" / "train.npz") as stored:
        data = {name: stored[name][:16] for name in stored.files}
    labels = data.pop("y")
    data = {name: array.astype(np.float32) for name, array in data.items()}
    output = heads(model)[0].logits

    def loss(inputs: Inputs, values: Mapping[str, Tensor]) -> Tensor:
        y, weight = inputs("y", ir.DataType.INT64, ["n"]), inputs("weight", ir.DataType.FLOAT, ["n"])
        return cross_entropy(values[output], y, weight, 1)

    graph = build(forward(model, [data]), [output], loss, SGD())
    before = [node.op_type for node in graph.model.graph]
    feeds = {**data, "y": labels.astype(np.int64), "weight": np.ones(16, np.float32)}
    halves = [{name: array[cut] for name, array in feeds.items()} for cut in (slice(0, 8), slice(8, 16))]
    first = trained(graph, halves)
    assert [node.op_type for node in graph.model.graph] == before
    trained(graph, [feeds])
    again = trained(graph, halves)
    assert all(again[1][name].tobytes() == array.tobytes() for name, array in first[1].items())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    graph = built(load(mlp()), AdamW())
    with Runner(graph) as runner:
        runner.step(calls(12), 0.01, 1)
        before = runner.read()
        poisoned = calls(12)
        poisoned[1]["x"] = np.full_like(poisoned[1]["x"], np.nan)
        loss, norm = runner.step(poisoned, 0.01, 2)
        assert np.isnan(loss)
        assert np.isnan(norm)
        assert all(array.tobytes() == before[name].tobytes() for name, array in runner.read().items())
        assert np.isnan(runner.gradients()["parameter/w1/w"]).any()


def test_what_is_read_can_be_gone_on_from() -> None:
    graph = built(load(mlp()), AdamW())
    with Runner(graph) as runner:
        for t in range(1, 4):
            runner.step(calls(12), 0.01, t)
        middle = runner.read()
        runner.step(calls(12), 0.01, 4)
        end = runner.read()
    with Runner(graph) as runner:
        runner.write(middle)
        runner.step(calls(12), 0.01, 4)
        assert all(array.tobytes() == end[name].tobytes() for name, array in runner.read().items())


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (15, 15), (16, 8), (17, 17), (32, 16), (64, 16), (66, 33)])
def test_a_batch_is_split_by_its_size_alone(batch: int, size: int) -> None:
    assert call_size(batch) == size


def test_runs_cover_every_parameter_once() -> None:
    graph = built(load(mlp()), AdamW())
    leaves = sorted(graph.leaves, key=lambda leaf: (leaf.decay, leaf.initial.size > 100))
    layout = Layout.of({leaf.name: leaf.initial.shape for leaf in leaves})
    assert all(start % ALIGNED == 0 for start in layout.starts.values())
    found = runs(leaves, layout, relative=True)
    covered = np.zeros(layout.size, int)
    for run in found:
        assert run.size <= RUN
        assert len(run.factors) in (1, run.size)
        covered[run.start : run.start + run.size] += 1
    for leaf in leaves:
        at = layout.starts[leaf.name]
        assert (covered[at : at + leaf.initial.size] == 1).all()
        (run,) = [run for run in found if run.start <= at < run.start + run.size]
        factor = run.factors[0] if len(run.factors) == 1 else run.factors[at - run.start]
        assert factor == pytest.approx(leaf.relative)
        assert run.decay == leaf.decay


def test_a_buffer_lies_on_cache_lines_and_is_not_copied() -> None:
    buffer = Buffer(40, np.dtype(np.float32), "cpu")
    assert buffer.address % 64 == 0
    buffer.write(np.arange(40))
    assert buffer.read().ctypes.data == buffer.address
    layout = Layout.of({"a": (2, 3), "b": (), "c": (8,)})
    assert layout.starts == {"a": 0, "b": 16, "c": 32}
    np.testing.assert_array_equal(layout.split(buffer.read())["a"], [[0, 1, 2], [3, 4, 5]])
    assert layout.split(buffer.read())["b"] == 16


def test_an_accumulated_gradient_is_what_the_last_reshape_would_give() -> None:
    graph = built(load(mlp()), SGD())
    outputs = {value.name: value for value in graph.model.graph.outputs}
    for leaf in graph.leaves:
        assert int(np.prod(graph.shapes[leaf.name])) == leaf.initial.size
        node = outputs[f"gradient/{leaf.name}"].producer()
        assert isinstance(node, ir.Node)
        assert node.op_type not in ("Reshape", "Unsqueeze", "Squeeze", "Flatten")
