"""Real models in every encoding: same keys, same encodings, same outputs as with the decoded weights, after a save."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import onnxruntime as ort
import pytest

from onnxcompress.encodings import Dense
from onnxcompress.model.load import load
from onnxcompress.model.roles import WEIGHT_ROLES
from onnxcompress.model.save import save
from onnxcompress.model.weights import Weight, weights
from tests.builders import ENCODERS, FLOAT_ACTIVATIONS, same_bits

FOLDER = pathlib.Path(os.environ.get("ONNXCOMPRESS_ZOO", "/nonexistent"))
MODELS = sorted(FOLDER.glob("*/model*.onnx")) if FOLDER.is_dir() else []
LARGE = 10_000_000  # bytes from which one encoding of each kind is enough
FEW = ("masked", "sparse", "codebook-3", "channels-half", "folded-channels", "dequantize")
needs_zoo = pytest.mark.skipif(not MODELS, reason="ONNXCOMPRESS_ZOO names no folder of models")


def session(path: pathlib.Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in FLOAT_ACTIVATIONS.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(path: pathlib.Path) -> dict[str, np.ndarray]:
    """One call: the first samples, or the first recorded call of a stateful model."""
    made, found = session(path), {}
    stored = path.with_name("feeds_2.npz" if path.stem.endswith("2") else "feeds.npz")
    arrays = dict(np.load(stored)) if stored.exists() else {}
    for port in made.get_inputs():
        shape = [d if isinstance(d, int) else 1 for d in port.shape]
        if port.name not in arrays:
            found[port.name] = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        elif arrays[port.name].ndim > len(port.shape):
            found[port.name] = np.asarray(arrays[port.name][0])
        else:
            fixed = port.shape[0] if port.shape and isinstance(port.shape[0], int) else 2
            found[port.name] = arrays[port.name][:fixed]
    return found


def outputs(path: pathlib.Path, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    made = session(path)
    found = made.run(None, {port.name: given[port.name] for port in made.get_inputs()})
    return [np.asarray(value) for value in found if isinstance(value, np.ndarray)]


def of_a_layer(weight: Weight) -> bool:
    return weight.role in WEIGHT_ROLES and weight.attribute is None


@needs_zoo
@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_encoding(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    given = feeds(path)
    keys = [weight.key for weight in weights(load(path))]
    assert len(set(keys)) == len(keys)
    for kind in ENCODERS if path.stat().st_size < LARGE else FEW:
        ours, plain = load(path), load(path)
        changed = 0
        for weight, twin in zip(weights(ours, tmp_path), weights(plain, tmp_path), strict=True):
            opset = ours.opset_imports[""]
            encoding = ENCODERS[kind](np.asarray(weight.array()), weight.axis()) if of_a_layer(weight) else None
            if encoding is None or encoding.least_opset > opset:
                continue
            weight.replace(encoding)
            twin.replace(Dense(encoding.decode()))
            if kind != "dense" or weight.encoding.kind == "dense":  # a weight with zeros counts as masked
                assert weight.encoding.same(encoding), f"{kind}: {weight.key}"
            if twin.overridable and not weight.overridable:
                # ONNX Runtime folds constants, and what a caller may override it does not: other kernels, other bits.
                plain.graph.inputs.remove(twin.value)
            changed += 1
        save(ours, tmp_path / "ours.onnx")
        save(plain, tmp_path / "plain.onnx")
        mine = {weight.key: weight for weight in weights(ours)}
        again = {weight.key: weight for weight in weights(load(tmp_path / "ours.onnx"))}
        assert set(keys) == mine.keys() == again.keys(), kind
        for key, weight in mine.items():
            assert weight.encoding.same(again[key].encoding), f"{kind}: {key}"
        if not changed:
            continue
        for a, b in zip(outputs(tmp_path / "ours.onnx", given), outputs(tmp_path / "plain.onnx", given), strict=True):
            if kind.startswith("dequantize"):  # fused with its consumer, which then sums in another order
                finite = np.isfinite(b)
                assert np.array_equal(np.isfinite(a), finite), kind
                assert np.abs(a - b)[finite].max(initial=0) <= 1e-4 * np.abs(b)[finite].max(initial=1e-3), kind
            else:
                assert same_bits(a, b), kind
