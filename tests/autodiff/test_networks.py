"""Whole networks: the gradients of all weights along random directions, against differences in float64 and PyTorch's.

Networks have so many kinks that a step of 1e-6 often crosses one; 1e-8 hardly ever does, and float64 still resolves it.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.autodiff import networks
from tests.autodiff.checking import gradient_model, prepared, reference, session

STEP = 1e-8
ROOT = pathlib.Path(__file__).parents[2]
ZOO = pathlib.Path(os.environ.get("ONNXCOMPRESS_ZOO", "/nonexistent"))


def feeds_of(model: onnx.ModelProto, file: pathlib.Path, length: int | None) -> dict[str, np.ndarray]:
    """Two samples for every input that has a file's array, in the type and rank the model wants."""
    arrays = np.load(file, allow_pickle=False)
    feeds = {}
    for info in model.graph.input:
        if info.name in arrays.files:
            fixed = info.type.tensor_type.shape.dim[0].dim_value
            array = arrays[info.name][: fixed or 2].astype(
                helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            )
            array = array[0] if array.ndim > len(info.type.tensor_type.shape.dim) else array
            feeds[info.name] = array[:, :length] if length else array
    return feeds


def directional(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], directions: int = 2) -> tuple[float, int]:
    """The largest relative error of the derivative along random directions of all weights; how many weights.

    Twice: the gradient graph in float64 within 2e-5 (the step's own resolution), and ONNX Runtime's within `1e-4`.
    """
    rng = np.random.default_rng(0)
    model = prepared(model)  # weights come out of branches
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    weights = [t.name for t in model.graph.initializer if t.data_type in (1, 10) and arrays[t.name].size > 1]
    names = [output.name for output in model.graph.output]
    plain = dict(zip(names, session(model).run(names, dict(feeds)), strict=True))
    seeds = {
        n: (rng.uniform(0.2, 1, a.shape) / a.size).astype(np.float32) for n, a in plain.items() if a.dtype == np.float32
    }
    built, found = gradient_model(model, seeds, weights)
    onnx.checker.check_model(built, full_check=True)
    assert {node.domain for node in built.graph.node} == {""}  # nothing but standard operators
    given = {**feeds, **{f"seed/{name}": seed for name, seed in seeds.items()}}
    single = dict(zip(found, session(built).run(list(found.values()), given), strict=True))
    worst = 0.0
    for _ in range(directions):
        move = {n: rng.standard_normal(arrays[n].shape) * (np.abs(arrays[n]).mean() + 1e-8) for n in found}

        def loss(step: float, move: Mapping[str, np.ndarray] = move) -> float:
            shifted = onnx.ModelProto()
            shifted.CopyFrom(model)
            for tensor in shifted.graph.initializer:
                if tensor.name in move:
                    tensor.CopyFrom(
                        numpy_helper.from_array(arrays[tensor.name] + step * move[tensor.name], tensor.name)
                    )
            results = reference(shifted, feeds, list(seeds))
            return float(sum((r * seeds[n].astype(np.float64)).sum() for n, r in zip(seeds, results, strict=True)))

        slope = (loss(STEP) - loss(-STEP)) / (2 * STEP)
        parts = np.array([(single[n].astype(np.float64) * move[n]).sum() for n in found])
        worst = max(worst, abs(parts.sum() - slope) / max(abs(slope), float(np.linalg.norm(parts))))
    return worst, len(found)


@pytest.mark.parametrize(("name", "weights"), [("digits_cnn", 62), ("digits_gru", 14), ("gloss_transformer", 54)])
def test_bundled(name: str, weights: int) -> None:
    """Every weight is reached; ONNX Runtime's float32 gradient is within 1e-5 of the float64 differences."""
    folder = ROOT / "models" / name
    model = onnx.load(folder / "model.onnx")
    error, count = directional(model, feeds_of(model, folder / "calib.npz", None))
    assert count == weights
    assert error < 1e-5


NETWORKS = [
    ("mlperf_resnet8", 20, None),
    ("cifar_resdw_cnn", 38, None),
    ("char_gpt", 53, 10),
    ("fsdd_kws_gru", 13, None),
    ("mnist_cntk", 6, None),
    ("dtln_denoise", 8, None),
    ("minilm_l6_sts", 101, 8),
]


@pytest.mark.slow
@pytest.mark.skipif(not ZOO.is_dir(), reason="ONNXCOMPRESS_ZOO is not set")
@pytest.mark.parametrize(("name", "weights", "length"), NETWORKS)
def test_zoo(name: str, weights: int, length: int | None) -> None:
    model = onnx.load(ZOO / name / "model.onnx")
    if any(entry.version < 13 for entry in model.opset_import if not entry.domain):
        model = onnx.version_converter.convert_version(model, 15)
    error, count = directional(model, feeds_of(model, ZOO / name / "feeds.npz", length))
    assert count == weights
    assert error < 1e-4


WITNESSES = dict(np.load(networks.FILE, allow_pickle=False))
RECORDS = json.loads(WITNESSES.pop("index").tobytes())


def beside_pytorch(name: str) -> None:
    """Draw by draw of the inputs, our error is at most twice PyTorch's in the median.

    In the median, because in some draws float32 puts a Relu or a maximum on the other side, of ours or of PyTorch's.
    Stored are projections of the gradients PyTorch computed in float64, and how far its own float32 was off
    (`against_pytorch.py`).
    """
    record, (file, feeds_file) = RECORDS[name], networks.networks()[name]
    model = networks.loaded(file)
    ratios = []
    for draw, truth in enumerate(WITNESSES[name]):
        feeds = networks.feeds_of(model, feeds_file, networks.LENGTHS.get(name), draw)
        found = networks.ours(model, feeds, networks.seeds_of(model, feeds))
        assert not any(array.any() for key, array in found.items() if key not in record["weights"])
        off = networks.projections(found, record["weights"]) - truth
        error = float(np.sqrt((off * off).sum(0).mean())) / record["norms"][draw]
        ratios.append(error / record["float32"][draw])
    print(name, *(f"{ratio:.2f}" for ratio in ratios))
    assert len(ratios) >= 5
    assert np.median(ratios) <= 2


@pytest.mark.parametrize("name", ["digits_cnn", "digits_gru", "gloss_transformer"])
def test_bundled_networks_are_as_near_as_pytorch(name: str) -> None:
    beside_pytorch(name)


@pytest.mark.slow
@pytest.mark.skipif(not ZOO.is_dir(), reason="ONNXCOMPRESS_ZOO is not set")
@pytest.mark.parametrize("name", sorted(RECORDS.keys() - {"digits_cnn", "digits_gru", "gloss_transformer"}))
def test_zoo_is_as_near_as_pytorch(name: str) -> None:
    """Every network with weights there."""
    beside_pytorch(name)
