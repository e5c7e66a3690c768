"""Real models that nobody here made hold in every form, and one wrong code in them does not."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

import onnxcompress as oc
from onnxcompress.encodings import Affine


@pytest.mark.parametrize("name", ["mlperf_resnet8", "mnist_cntk", "fsdd_kws_gru"])
def test_real_models(name: str, zoo: pathlib.Path, tmp_path: pathlib.Path) -> None:
    original, data, out = zoo / name / "model.onnx", zoo / name / "feeds.npz", tmp_path / "o.onnx"
    for recipe in (["simplify", {"weight-sharing": {"bits": 4}}], ["static-quantization"]):
        oc.compress(original, {"passes": recipe}, out=out, calibration=data)
        assert oc.verify(out, original, calibration=data).problems == ()
        assert oc.diagnose(original, out, data=data, limit=16).blamed == ()
    model = oc.load(out)
    weight = next(w for w in oc.weights(model) if isinstance(w.encoding, Affine) and w.encoding.form != "integer")
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    q = encoding.q.copy()
    q.reshape(-1)[0] += 1 if q.reshape(-1)[0] < 100 else -1
    weight.replace(dataclasses.replace(encoding, q=q))
    assert [problem.where for problem in oc.verify(model, original).problems] == [weight.key]
