"""Models in half precision are trained in single, and stay what they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from onnxcompress.contract import Select
from onnxcompress.encodings import Codebook, Masked
from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.model.weights import weights
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.targets import Objective
from tests.training.small import arrays, half, mlp, normalized, opened, outputs, sequences, tagger


@pytest.mark.parametrize("made", [mlp, normalized, tagger])
def test_half_precision_follows_single(made: Callable[[], onnx.ModelProto]) -> None:
    settings = Settings(epochs=3, batch=16, lr=5e-3, batch_norm="trained" if made is normalized else None)
    losses, parameters = [], []
    for proto, kind in ((made(), np.float32), (half(made()), np.float16)):
        teacher, student = load(proto), load(proto)
        for weight in weights(student):
            if weight.role in ("gemm", "matmul"):
                array = weight.array()
                weight.replace(Masked.apply(array, np.abs(array) > np.quantile(np.abs(array), 0.4)))
        given = sequences() if made is tagger else {"x": arrays(64)["x"].astype(kind)}
        data = opened(student, given)
        done = distill(teacher, student, data, objective=Objective("values"), settings=settings)
        new = bridge.clone(student)
        write(new, done.parameters)
        for weight in weights(new):
            assert weight.dtype == kind
        assert np.isfinite(next(iter(outputs(new, {n: a[:4] for n, a in given.items()}).values()))).all()
        losses.append([epoch.loss for epoch in done.epochs])
        parameters.append(done.parameters)
    assert losses[0][-1] < 0.95 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert parameters[0].keys() == parameters[1].keys()
    for key, parts in parameters[1].items():
        assert parts["w"].dtype == np.float32, key


def test_an_encoded_weight_of_half_precision() -> None:
    teacher, student = load(half(mlp())), load(half(mlp()))
    first = next(weight for weight in weights(student) if weight.key == "w1")
    table = np.array([-0.5, -0.1, 0.2, 0.6], np.float16)
    codes = np.abs(first.array()[..., None] - table).argmin(-1).astype(np.uint8)
    first.replace(Codebook(codes, table))
    for include in ((), ("w1",), ("w2",)):  # trained, alone, or left half where it is
        settings = Settings(epochs=2, batch=16, select=Select(include=include))
        given = {"x": arrays(64)["x"].astype(np.float16)}
        done = distill(teacher, student, opened(student, given), settings=settings)
        assert done.epochs[1].loss < done.epochs[0].loss
        assert ("w1" in done.parameters) == (include != ("w2",))
