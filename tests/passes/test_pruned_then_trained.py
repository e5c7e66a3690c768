"""Zeros of pruning through other passes and training, in one recipe's hands and from file to file."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.contract import Pass, Run
from onnxcompress.model.load import load
from onnxcompress.model.save import to_bytes
from onnxcompress.model.weights import weights
from onnxcompress.passes.dynamic_quantization import DynamicQuantization
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.passes.static_quantization import StaticQuantization
from onnxcompress.passes.weight_sharing import WeightSharing
from onnxcompress.training.distill import Settings, distill, write
from tests.builders import floats, graph, info, model, node, tensors
from tests.passes.quantized import Calls
from tests.training.small import opened

CODES = {
    "static": StaticQuantization(min_sqnr=0, max_error=1),
    "static, per tensor": StaticQuantization(per_channel=False, min_sqnr=0, max_error=1),
    "static, reduced": StaticQuantization(overflow="reduced", min_sqnr=0, max_error=1),
    "dynamic": DynamicQuantization(max_error=1),
    "dynamic, per tensor": DynamicQuantization(per_channel=False, max_error=1),
    "shared": WeightSharing(bits=4, granularity="tensor"),
    "shared by channel": WeightSharing(bits=4, granularity="channel"),
}


def network() -> onnx.ModelProto:
    """ids [n, 8] -> Gather [100, 16] -> Transpose -> Conv + BatchNormalization -> Relu -> GRU -> Gemm (transB) = z."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("Transpose", ["e"], ["t"], perm=[0, 2, 1], name="turn"),
        node("Conv", ["t", "kernel"], ["c"], pads=[1, 1], name="conv"),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["b"], name="norm"),
        node("Relu", ["b"], ["r"], name="relu"),
        node("Transpose", ["r"], ["s"], perm=[2, 0, 1], name="first"),
        node("GRU", ["s", "w", "u"], ["", "h"], hidden_size=24, name="gru"),
        node("Squeeze", ["h", "axis"], ["q"], name="last"),
        node("Gemm", ["q", "out", "bias"], ["z"], transB=1, name="head"),
    ]
    arrays = {
        "table": floats(100, 16, seed=1),
        "kernel": floats(32, 16, 3, seed=2) * 0.2,
        "scale": np.linspace(-1.5, 2, 32, dtype=np.float32),
        "shift": floats(32, seed=3) * 0.1,
        "mean": floats(32, seed=4) * 0.1,
        "var": np.linspace(0.3, 3, 32, dtype=np.float32),
        "w": floats(1, 72, 32, seed=5) * 0.2,
        "u": floats(1, 72, 24, seed=6) * 0.2,
        "axis": np.array([0]),
        "out": floats(40, 24, seed=7) * 0.3,
        "bias": floats(40, seed=8) * 0.1,
    }
    ids = info("ids", ["n", 8], onnx.TensorProto.INT64)
    return model(graph(nodes, [ids], [info("z", ["n", 40])], tensors(**arrays)))


GIVEN = {"ids": np.random.default_rng(1).integers(0, 100, (64, 8))}
KEYS = {"table", "kernel", "w", "u", "out"}


def arrays_of(of: ir.Model) -> dict[str, np.ndarray]:
    """The layers' weights by key."""
    return {weight.key: np.array(weight.array()) for weight in weights(of) if weight.key in KEYS}


def filled(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> int:
    assert before.keys() == after.keys()
    return sum(int(np.count_nonzero(after[key][before[key] == 0])) for key in before)


@pytest.mark.parametrize("coded", [*CODES, None])
@pytest.mark.parametrize(("sparsity", "storage"), [(0.02, "masked"), (0.4, "masked"), (0.4, "sparse")])
def test_zeros_of_pruning_stay(coded: str | None, sparsity: float, storage: str, tmp_path: pathlib.Path) -> None:
    original, student = load(network()), load(network())
    run = Run(work=tmp_path, original=original, feeds=Calls(GIVEN))
    stages: list[Pass] = [MagnitudePruning(sparsity=sparsity, scope="layer", storage=storage)]  # type: ignore[arg-type]
    for stage in [*stages, *([CODES[coded]] if coded is not None else [])]:
        stage.apply(student, run)
    start = arrays_of(student)
    settings = Settings(epochs=2, lr=1e-2)
    done = distill(original, student, opened(student, GIVEN), settings=settings, reference=original)
    from_file = load(to_bytes(student))  # without what it was made from
    alone = distill(original, from_file, opened(from_file, GIVEN), settings=settings)
    write(student, done.parameters)
    write(from_file, alone.parameters)
    for trained in (student, from_file):
        found = arrays_of(trained)
        assert filled(start, found) == 0
        assert all(np.any(found[key] != start[key]) for key in KEYS)
        assert all(np.mean(array == 0) >= sparsity - 0.5 / array.size for array in found.values())
    again = load(to_bytes(from_file))
    more = distill(original, again, opened(again, GIVEN), settings=settings)
    write(again, more.parameters)
    assert filled(arrays_of(from_file), arrays_of(again)) == 0


@pytest.mark.parametrize("coded", ["static", "dynamic", "static, per tensor", "dynamic, per tensor"])
def test_zeros_of_rounding_are_numbers(coded: str, tmp_path: pathlib.Path) -> None:
    original, student = load(network()), load(network())
    CODES[coded].apply(student, Run(work=tmp_path, original=original, feeds=Calls(GIVEN)))
    before = arrays_of(student)
    zeros = sum(np.count_nonzero(array == 0) for array in before.values())
    assert zeros > 40
    done = distill(original, student, opened(student, GIVEN), settings=Settings(epochs=2, lr=1e-2))
    write(student, done.parameters)
    assert filled(before, arrays_of(student)) > 0.3 * zeros
