"""A model whose integer sums some CPUs cut off fails on every machine, and the reason names node and mend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.errors import DataError, ModelError
from onnxcompress.runtime.session import Session, open_session
from onnxcompress.validation import portable
from onnxcompress.validation.integers import PairBound
from onnxcompress.validation.portable import Integers, judge_integers
from onnxcompress.validation.saturation import Saturation
from onnxcompress.validation.validate import validate
from onnxcompress.validation.verdict import Verdict
from tests.builders import floats, graph, info, model, node, tensors

SIZE, CLASSES = 32, 4


def quantized(most: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """logits = x w in float, and with u8 activations and weight codes up to `most`; x lies in 0..1."""
    weight = np.abs(floats(SIZE, CLASSES)) / 4
    scale = np.float32(weight.max() / most)
    codes = np.rint(weight / scale).astype(np.int8)
    plain = graph(
        [node("MatMul", ["x", "w"], ["logits"])],
        [info("x", ["n", SIZE])],
        [info("logits", ["n", CLASSES])],
        tensors(w=weight),
    )
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"]),
        node("MatMul", ["xd", "wd"], ["logits"], name="product"),
    ]
    held = tensors(w=codes, ws=np.array(scale), s=np.array(1 / 255, np.float32), z=np.array(0, np.uint8))
    integer = graph(nodes, [info("x", ["n", SIZE])], [info("logits", ["n", CLASSES])], held)
    return model(plain), model(integer)


@pytest.fixture
def data() -> dict[str, np.ndarray]:
    x = np.random.default_rng(1).uniform(0.7, 1, (200, SIZE)).astype(np.float32)
    return {"x": x, "y": np.random.default_rng(2).integers(0, CLASSES, 200)}


def test_full_range_weights_fail_wherever_this_runs(data: dict[str, np.ndarray]) -> None:
    found = validate(*quantized(127), data=data, latency=False)
    assert found.verdict is Verdict.FAIL
    assert "CPUs without VNNI" in found.reasons[0]
    assert "'product' by" in found.reasons[0]
    assert "--target portable" in found.reasons[0]
    assert found.integers is not None
    assert [entry.node for entry in found.integers.at_risk] == ["product"]
    assert 0.01 < found.integers.computed < 1
    assert found.to_json()["integers"]["saturations"][0]["rows"] == 200


def test_reduced_weights_pass_and_say_so(data: dict[str, np.ndarray]) -> None:
    found = validate(*quantized(64), data=data, metric="accuracy", latency=False)
    assert found.verdict is Verdict.PASS
    assert any("none of 1 integer products can overflow" in reason for reason in found.reasons)
    assert found.integers is not None
    assert found.integers.observed == found.integers.computed == 0
    assert found.integers.metric_default == found.integers.metric_exact
    assert found.integers.samples == 200


def test_what_is_allowed_can_be_raised(data: dict[str, np.ndarray]) -> None:
    found = validate(*quantized(127), data=data, latency=False, saturation=math.inf)
    assert found.passed
    assert any("1 of 1 integer products can overflow" in reason for reason in found.reasons)
    with pytest.raises(DataError, match="--saturation"):
        validate(*quantized(127), data=data, latency=False, saturation=-1)


def test_float_models_have_nothing_to_say(data: dict[str, np.ndarray]) -> None:
    plain, _ = quantized(127)
    assert validate(plain, plain, data=data, latency=False).integers is None


def test_a_cpu_that_cuts_off_is_seen(data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """The session with exact sums stands in for the model before something was cut off."""
    plain, integer = quantized(64)
    asked: list[Mapping[str, str]] = []

    def opened(given: Any, **rest: Any) -> Session:
        if rest.get("config") == portable.PORTABLE:
            asked.append(rest["config"])
            exact = onnx.ModelProto.FromString(integer.SerializeToString())
            exact.graph.initializer[1].CopyFrom(tensors(ws=np.array(0.01, np.float32))[0])
            return open_session(exact.SerializeToString(), **rest)
        return open_session(given, **rest)

    monkeypatch.setattr("onnxcompress.validation.validate.open_session", opened)
    found = validate(plain, integer, data=data, metric="accuracy", latency=False)
    assert len(asked) == 1
    assert found.verdict is Verdict.FAIL
    assert "cuts off integer sums" in found.reasons[0]
    assert "accuracy 0." in found.reasons[0]
    assert found.integers is not None
    weight = np.abs(floats(SIZE, CLASSES)) / 4
    expected = abs(float(weight.max()) / 64 / 0.01 - 1)  # all outputs are off by the ratio of the scales
    assert found.integers.observed == pytest.approx(expected, rel=1e-3)


def test_a_model_that_onnxruntime_cannot_run_with_exact_sums(
    data: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in onnxruntime 1.32 with the per-channel weight of a Gemm."""
    plain, integer = quantized(127)

    def opened(given: Any, **rest: Any) -> Session:
        session = open_session(given, **rest)
        if rest.get("config") == portable.PORTABLE:
            monkeypatch.setattr(session, "run", refuse)
        return session

    def refuse(*_: Any) -> None:
        raise ModelError("running it failed: DequantizeLinear")

    monkeypatch.setattr("onnxcompress.validation.validate.open_session", opened)
    monkeypatch.setattr(portable, "cpu_class", lambda: "AVX2")
    found = validate(plain, integer, data=data, latency=False, saturation=math.inf)
    assert found.integers is not None
    assert (found.integers.samples, found.integers.agreement) == (0, ())
    assert found.integers.not_run == "running it failed: DequantizeLinear"
    assert any("cannot run the model with exact sums" in reason for reason in found.reasons)
    assert validate(plain, integer, data=data, latency=False).verdict is Verdict.FAIL  # computed all the same


def test_what_cannot_be_computed_is_said() -> None:
    bound = PairBound("lstm", "DynamicQuantizeLSTM", "w", "x", (0, 255), 40_000, 60_000, 0, 1, 8)
    unseen = Saturation("lstm", 0.0, 0.0, 0)
    found = Integers((bound,), (unseen,), None, (), 0, None, None, None, None, "AVX2", 0.01)
    said = judge_integers(found)
    assert said is not None
    assert said.verdict is Verdict.PASS
    assert said.reasons[0].endswith("('lstm'); how much is not known of 1")
