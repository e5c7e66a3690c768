"""What older exporters leave in a model is trained, too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcompress.model import bridge
from onnxcompress.model.load import load
from onnxcompress.training.distill import Settings, distill, write
from onnxcompress.training.initial import randomize
from tests.builders import info
from tests.training.small import arrays, normalized, opened, outputs


def listed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Initializers that are graph inputs, too, as PyTorch exported them up to version 1.2 and on demand since."""
    for tensor in proto.graph.initializer:
        proto.graph.input.append(info(tensor.name, list(tensor.dims)))
    return proto


@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_initializers_that_are_inputs_train_and_stay_inputs(batch_norm: str) -> None:
    settings = Settings(epochs=2, batch=16, lr=1e-2, batch_norm=batch_norm)  # type: ignore[arg-type]
    plain, of = load(normalized()), load(listed(normalized()))
    wanted = distill(None, plain, opened(plain, arrays(64)), settings=settings)
    done = distill(None, of, opened(of, arrays(64)), settings=settings)
    assert done.left == wanted.left
    assert done.parameters.keys() == wanted.parameters.keys() >= {"w1", "scale", "w2"}
    for key, parts in wanted.parameters.items():
        np.testing.assert_array_equal(done.parameters[key]["w"], parts["w"])
    new = bridge.clone(of)
    write(new, done.parameters)
    assert [value.name for value in new.graph.inputs] == [value.name for value in of.graph.inputs]
    write(plain, wanted.parameters)
    x = {"x": arrays(8)["x"]}
    np.testing.assert_allclose(outputs(new, x)["z"], outputs(plain, x)["z"], atol=1e-5)  # not folded alike


def test_they_are_drawn_anew_like_others() -> None:
    plain, of = load(normalized()), load(listed(normalized()))
    assert randomize(of, 0) == randomize(plain, 0) == 7
    x = {"x": arrays(8)["x"]}
    np.testing.assert_allclose(outputs(of, x)["z"], outputs(plain, x)["z"], atol=1e-5)
