"""Every model of the zoo against itself, and against a damaged copy; needs ONNXCOMPRESS_ZOO."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcompress.data.batch import Batch
from onnxcompress.validation.detection import MeanAveragePrecision50
from onnxcompress.validation.samples import Columns
from onnxcompress.validation.validate import validate
from onnxcompress.validation.verdict import Verdict

ZOO = pathlib.Path(os.environ.get("ONNXCOMPRESS_ZOO", "no-zoo"))
pytestmark = pytest.mark.skipif(not ZOO.is_dir(), reason="ONNXCOMPRESS_ZOO is not set")
MODELS = sorted(str(path.relative_to(ZOO)) for path in ZOO.glob("*/*.onnx")) if ZOO.is_dir() else []


@pytest.mark.parametrize("name", MODELS)
def test_itself_on_its_own_feeds(name: str) -> None:
    model = ZOO / name
    feeds = model.parent / ("feeds_2.npz" if name.endswith("_2.onnx") else "feeds.npz")
    found = validate(model, model, data=feeds if feeds.is_file() else None, limit=8, latency=False)
    assert found.verdict is Verdict.PASS
    assert found.same_bytes
    for output in found.agreement:
        assert output.bit_equal, output
        assert output.elements > 0
        assert output.max_abs in (0.0, None)
        assert output.cosine in (1.0, None)


def cifar(tmp_path: pathlib.Path, count: int) -> pathlib.Path:
    with np.load(ZOO / "cifar10_data" / "eval.npz") as raw:
        np.savez(tmp_path / "eval.npz", input=raw["x_input"][:count].astype(np.float32), y=raw["y"][:count])
    return tmp_path / "eval.npz"


def test_a_damaged_model_fails(tmp_path: pathlib.Path) -> None:
    good = ZOO / "mlperf_resnet8" / "model.onnx"
    model = onnx.load(good)
    weights = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    scaled = numpy_helper.to_array(weights).copy()
    scaled[0] *= 8
    weights.CopyFrom(numpy_helper.from_array(scaled, weights.name))
    found = validate(good, model, data=cifar(tmp_path, 500), metric="accuracy", max_drop=0.01, latency=False)
    assert found.verdict is Verdict.FAIL
    assert found.score is not None
    assert found.score.original > 0.7 > 0.55 > found.score.compressed


def test_scikit_learn_scores() -> None:
    for name, expected in (("sk_logreg_zipmap", 0.9816), ("sk_forest_digits", 0.9631), ("sk_mlp_digits", 0.9749)):
        with np.load(ZOO / name / "eval.npz") as raw:
            data = {"X": raw["x_X"], "y": raw["y"]}
        model = ZOO / name / "model.onnx"
        found = validate(model, model, data=data, metric="accuracy", latency=False)
        assert found.score is not None
        assert found.score.original == pytest.approx(expected, abs=1e-4)
        ranked = validate(model, model, data=data, metric="auc", latency=False)
        assert ranked.score is not None
        assert ranked.score.original > 0.99


class SureFaces(MeanAveragePrecision50):
    """AP50 of boxes of 12 of 320 pixels and more, above a score of 0.5."""

    def columns(self, outputs: Mapping[str, Any], batch: Batch) -> Columns:
        boxes, scores = outputs["boxes"], outputs["scores"]
        left_out = (boxes[:, :, 2] - boxes[:, :, 0] < 0.0375)[:, :, None] | (scores < 0.5)
        return super().columns({"boxes": boxes, "scores": np.where(left_out, np.nan, scores)}, batch)


def test_detector_scores() -> None:
    folder = ZOO / "ultraface_rfb320"
    with np.load(folder / "eval.npz") as raw:
        images = ((raw["images"].transpose(0, 3, 1, 2).astype(np.float32) - 127) / 128).astype(np.float32)
        labels = np.full((len(images), 30, 4), np.nan, np.float32)
        for image in range(len(images)):
            own = raw["boxes"][raw["box_img"] == image]
            labels[image, : len(own)] = own
    model = folder / "model.onnx"
    data = {"input": images, "y": labels}
    whole = validate(model, model, data=data, metric="map50", max_drop=0.01, latency=False)
    sure = validate(model, model, data=data, metric=SureFaces, max_drop=0.01, latency=False)
    assert whole.score is not None
    assert sure.score is not None
    # The entry's own figure looks for no others; it removes more overlaps and interpolates otherwise.
    assert sure.score.original == pytest.approx(0.968, abs=0.004)
    assert 0.85 < whole.score.original < 0.9
    assert (whole.score.n, whole.score.drop, whole.verdict) == (42, 0.0, Verdict.PASS)
