"""Provenance: what goes in comes back, and never takes more than 2 KiB."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from onnxcompress.model.load import load
from onnxcompress.model.provenance import PREFIX, Provenance, read, versions, write
from onnxcompress.model.save import to_bytes


def make() -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_round_trip() -> None:
    model = load(make())
    assert read(model) is None
    model.metadata_props["author"] = "someone"
    said = Provenance("ab" * 32, "passes:\n- simplify\n", "cd" * 32, versions(), 7, {"top-1": 0.5, "drop": -1e-9})
    write(model, said)
    assert read(load(to_bytes(model))) == said
    write(model, Provenance(parent="ef" * 32))
    assert read(model) == Provenance(parent="ef" * 32)
    assert model.metadata_props["author"] == "someone"


def test_versions_say_what_decides_the_bytes() -> None:
    found = versions()
    assert found["onnx"] == onnx.__version__
    assert {"onnxcompress", "onnx", "numpy"} <= set(found)


@pytest.mark.parametrize("recipe", [10, 1000, 5000, 10**6])
@pytest.mark.parametrize("metrics", [0, 20, 400])
def test_stays_under_two_kilobytes(recipe: int, metrics: int) -> None:
    model = load(make())
    before = len(to_bytes(model))
    model.metadata_props[PREFIX + "other"] = "o" * 300
    write(
        model,
        Provenance("ab" * 32, "r" * recipe, "cd" * 32, versions(), 0, {f"metric {i}": i / 7 for i in range(metrics)}),
    )
    assert len(to_bytes(model)) - before < 2048
    found = read(model)
    assert found is not None
    assert found.parent == "ab" * 32
    assert found.recipe == "r" * recipe or found.recipe.startswith("sha256:")
    # A shortened recipe still tells itself from another one.
    if recipe == 5000:
        other = load(make())
        write(other, Provenance(recipe="s" * recipe))
        again = read(other)
        assert again is not None
        assert again.recipe != found.recipe


def test_broken_entries_are_ignored() -> None:
    model = load(make())
    model.metadata_props.update({PREFIX + "metrics": "{", PREFIX + "seed": "x", PREFIX + "versions": "[]"})
    assert read(model) == Provenance()
