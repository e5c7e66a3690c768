"""What `inspect` says of a model adds up to the file."""

from __future__ import annotations

import json
import pathlib
from collections import Counter

import onnx
import pytest

import onnxcompress as oc
from onnxcompress.contract import Reason
from onnxcompress.errors import ModelError
from onnxcompress.passes.dynamic_quantization import DynamicQuantization
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.passes.weight_sharing import WeightSharing
from tests.builders import floats, graph, info, model, node, tensors
from tests.house import BUNDLED, MODELS, bundled, command, two_layers


@pytest.mark.parametrize("name", BUNDLED)
def test_numbers_add_up(name: str) -> None:
    found = oc.inspect(bundled(name))
    proto = onnx.load(bundled(name))
    size = bundled(name).stat().st_size
    assert found.bytes == size
    held = sum(row.bytes for row in found.weights)
    assert held == sum(count for _, count in found.by_role().values())
    assert len(found.weights) == sum(count for count, _ in found.by_role().values())
    assert 0 < size - held < 0.03 * size
    parameters = json.loads((MODELS / name / "model.json").read_text())["parameters"]
    elements = sum(row.bytes // 4 for row in found.weights)
    assert abs(elements - parameters) <= 0.01 * parameters
    assert len({row.key for row in found.weights}) == len(found.weights)
    assert list(found.opsets) == [entry.domain for entry in proto.opset_import]
    assert [port.name for port in found.inputs] == [value.name for value in proto.graph.input]
    assert [port.name for port in found.outputs] == ["logits"]


def test_operators_are_counted_in_branches_too() -> None:
    proto = onnx.load(bundled("digits_gru"))
    counted: Counter[str] = Counter()

    def count(body: onnx.GraphProto) -> None:
        for each in body.node:
            counted[each.op_type] += 1
            for attribute in each.attribute:
                if attribute.HasField("g"):
                    count(attribute.g)

    count(proto.graph)
    assert oc.inspect(bundled("digits_gru")).operators == dict(counted)
    assert counted["Gemm"] == 4


@pytest.mark.parametrize("name", BUNDLED)
def test_what_passes_could_touch_is_what_they_do_not_refuse(name: str) -> None:
    could = oc.inspect(bundled(name)).touchable
    assert "simplify" not in could  # it gives no weight another encoding, and does not say which it would try
    for the_pass in (WeightSharing(), MagnitudePruning(), DynamicQuantization()):
        coverage = oc.compress(bundled(name), the_pass).steps[0].coverage
        tried = {w.key: w.nbytes for w in oc.weights(oc.load(bundled(name))) if the_pass.refuses(w) is None}
        assert (could[the_pass.name].weights, could[the_pass.name].bytes) == (len(tried), sum(tried.values()))
        touched = {t.key for t in coverage.touched}
        assert touched
        assert touched <= tried.keys()
        decided = {x.key for x in coverage.left if x.reason in (Reason.TOO_SMALL, Reason.BUDGET, Reason.WORSE)}
        assert tried.keys() - touched <= decided
        refused = Counter(x.reason.value for x in coverage.left if x.key not in tried)
        assert could[the_pass.name].left == dict(refused)


def test_a_compressed_model_says_how_it_is_stored_and_from_what(tmp_path: pathlib.Path) -> None:
    oc.compress(bundled("digits_cnn"), "small", out=tmp_path / "o.onnx", seed=3)
    found = oc.inspect(tmp_path / "o.onnx")
    assert Counter(row.encoding for row in found.weights) == {"codebook": 13, "dense": 13}
    assert found.touchable["weight-sharing"].weights == 0
    assert found.provenance is not None
    assert found.provenance["seed"] == 3
    assert not any(name.startswith("Depalettize") for name in found.operators)
    before = {row.key: (row.role, row.shape) for row in oc.inspect(bundled("digits_cnn")).weights}
    assert all(before[row.key] == (row.role, row.shape) for row in found.weights if row.encoding == "codebook")


def test_looking_changes_nothing_and_needs_no_runnable_model() -> None:
    proto = two_layers()
    before = proto.SerializeToString(deterministic=True)
    found = oc.inspect(proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert (found.macs, len(found.weights)) == (16 * 64 + 64 * 8, 3)
    custom = model(
        graph([node("Nobody", ["x", "w"], ["y"], domain="nowhere")], [info("x", [1])], [info("y", [1])]),
        domains={"nowhere": 1},
    )
    custom.graph.initializer.extend(tensors(w=floats(8, 8)))
    found = oc.inspect(custom)
    assert found.operators == {"nowhere::Nobody": 1}
    assert [(row.key, row.role, row.bytes) for row in found.weights] == [("w", "other", 256)]


def test_weights_in_attributes_are_counted() -> None:
    body = graph(
        [node("LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[1.0, 2.0, 3.0], intercepts=[0.0])],
        [info("x", [1, 3])],
        [info("y", [1, 1])],
    )
    found = oc.inspect(model(body, domains={"ai.onnx.ml": 3}))
    assert [(row.op, row.bytes) for row in found.weights] == [("ai.onnx.ml::LinearRegressor", 12)]


def test_external_data_counts(tmp_path: pathlib.Path) -> None:
    onnx.save(two_layers(), tmp_path / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    both = (tmp_path / "e.onnx").stat().st_size + (tmp_path / "e.bin").stat().st_size
    assert oc.inspect(tmp_path / "e.onnx").bytes == both
    with pytest.raises(ModelError, match=r"nowhere\.onnx"):
        oc.inspect(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("name", BUNDLED)
def test_the_command_says_it(name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "inspect", bundled(name), "--json", tmp_path / "i.json", "-v")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "i.json").read_text())
    assert report["schema"] == 1
    assert report["bytes"] == bundled(name).stat().st_size
    assert sum(row["bytes"] for row in report["weights"]) <= report["bytes"]
    assert all(f"    {row['key']}: {row['encoding']} " in out for row in report["weights"])
    assert set(report["touchable"]) >= {"magnitude-pruning", "weight-sharing", "dynamic-quantization"}
