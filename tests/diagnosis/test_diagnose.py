"""The layer that was broken is the one that is blamed, and a healthy model blames none."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

import onnxcompress as oc
from onnxcompress.diagnosis import diagnose
from onnxcompress.encodings import Affine
from onnxcompress.errors import DataError, ModelError
from tests.house import BUNDLED_QUICK, bundled, split

KEY = "residual2.first.weight"


@pytest.mark.parametrize("name", BUNDLED_QUICK)
@pytest.mark.parametrize("recipe", [[{"weight-sharing": {"bits": 4}}], ["simplify", "static-quantization"]])
def test_a_healthy_model_blames_no_layer(name: str, recipe: list[object], tmp_path: pathlib.Path) -> None:
    oc.compress(bundled(name), {"passes": recipe}, out=tmp_path / "o.onnx", calibration=split(name, "calib"))
    found = diagnose(bundled(name), tmp_path / "o.onnx", data=split(name, "eval"), limit=32)
    assert found.blamed == ()
    assert found.samples == 32
    assert 0.005 < max(row.error for row in found.layers) < 0.5
    assert max(row.excess for row in found.layers) < 1.5


def test_the_same_model_has_no_error() -> None:
    found = diagnose(bundled("gloss_transformer"), bundled("gloss_transformer"), limit=8)
    assert {row.error for row in found.layers} == {0.0}
    assert max(row.own for row in found.layers) < 1e-6


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """digits_cnn in int8."""
    out = tmp_path_factory.mktemp("static") / "out.onnx"
    data = split("digits_cnn", "calib")
    oc.compress(bundled("digits_cnn"), {"passes": ["static-quantization"]}, out=out, calibration=data)
    return out


@pytest.mark.parametrize("evidence", [True, False])
def test_a_wrong_scale_is_found(static: pathlib.Path, evidence: bool) -> None:
    model = oc.load(static)
    weight = next(w for w in oc.weights(model) if w.key == KEY)
    encoding, layer = weight.encoding, weight.uses[0].node.outputs[0].name
    assert isinstance(encoding, Affine)
    weight.replace(dataclasses.replace(encoding, scale=(encoding.scale * 1.2).astype(np.float32)))
    found = diagnose(bundled("digits_cnn"), model, data=split("digits_cnn", "eval"), limit=32, evidence=evidence)
    assert found.blamed[0][0] == layer
    row = next(row for row in found.layers if row.layer == layer)
    assert row.own == pytest.approx(0.2, rel=0.3)  # the bias does not grow along
    after = [r for r in found.layers[found.layers.index(row) + 1 :] if r.weights]
    assert max(r.own for r in after) < 0.03  # what enters them is the original's
    assert max(r.error for r in after) > 0.05


def test_one_code_is_found_by_its_evidence_alone(static: pathlib.Path) -> None:
    model = oc.load(static)
    weight = next(w for w in oc.weights(model) if w.key == KEY)
    encoding, layer = weight.encoding, weight.uses[0].node.outputs[0].name
    assert isinstance(encoding, Affine)
    q = encoding.q.copy()
    q.reshape(-1)[9] += 1
    weight.replace(dataclasses.replace(encoding, q=q))
    given = {"data": split("digits_cnn", "eval"), "limit": 16}
    assert diagnose(bundled("digits_cnn"), model, **given).blamed[0][0] == layer  # type: ignore[arg-type]
    assert diagnose(bundled("digits_cnn"), model, **given, evidence=False).blamed == ()  # type: ignore[arg-type]


def test_a_weight_in_a_branch_is_named_with_its_path() -> None:
    model = oc.load(bundled("digits_gru"))
    weight = next(w for w in oc.weights(model) if w.key == "logits/then/whole.0.weight")
    from onnxcompress.encodings import Dense

    weight.replace(Dense((weight.array() * 2).astype(np.float32)))
    found = diagnose(bundled("digits_gru"), model, data=split("digits_gru", "eval"), limit=16)
    assert found.blamed[0][0].startswith("logits/then/")


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="the compressed model has no input 'image' as the original has"):
        diagnose(bundled("digits_cnn"), bundled("gloss_transformer"))
    other = oc.load(bundled("digits_cnn"))
    other.graph.outputs[0].name = "scores"
    with pytest.raises(ModelError, match="the compressed model has no output 'logits' as the original has"):
        diagnose(bundled("digits_cnn"), other)


def test_data_without_a_finite_value_shows_nothing() -> None:
    data = {"image": np.full((4, 1, 8, 8), np.nan, np.float32)}
    with pytest.raises(DataError, match="no layer of the original computes a finite number"):
        diagnose(bundled("digits_cnn"), bundled("digits_cnn"), data=data)
