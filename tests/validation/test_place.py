"""A place end to end, on the CPU in the guise of other providers: shapes, metric, latency, failures."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcompress.runtime.session import Session, open_session
from onnxcompress.validation.placement import Node
from onnxcompress.validation.samples import Samples
from onnxcompress.validation.validate import validate
from onnxcompress.validation.verdict import Verdict

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
classifier (float[{batch}, 6] x) => (float[{batch}, 3] logits) {{ h = MatMul(x, w) logits = Relu(h) }}
"""


def model(folder: pathlib.Path, batch: str = "N") -> pathlib.Path:
    made = onnx.parser.parse_model(MODEL.format(batch=batch))
    weight = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    made.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    made.graph.node[0].name, made.graph.node[1].name = "product", "rectify"
    onnx.save(made, folder / "m.onnx")
    return folder / "m.onnx"


class Guise:
    """Opens CPU sessions where `provider` is asked for, and places the nodes as told."""

    def __init__(self, patch: pytest.MonkeyPatch, provider: str, kernels: dict[str, int], **where: str) -> None:
        self.asked: list[dict[str, Any]] = []
        self.opened: list[Session] = []
        self._provider = provider
        patch.setattr("onnxcompress.validation.validate.open_session", self._open)
        nodes = [Node("product", "MatMul", where.get("product", provider)), Node("rectify", "Relu", provider)]
        patch.setattr("onnxcompress.validation.placement.placed", lambda session: nodes)
        patch.setattr("onnxcompress.validation.placement.executed", lambda profile: kernels)

    def _open(self, model: Any, provider: str, **rest: Any) -> Session:
        if provider == self._provider:
            self.asked.append({key: rest[key] for key in ("sizes", "provider_options") if key in rest})
        rest.pop("provider_options", None)
        session = open_session(model, provider="cpu", **rest)
        self.opened += [session] if provider == self._provider else []
        return session


@pytest.fixture
def data() -> dict[str, Any]:
    generator = np.random.default_rng(1)
    return {"x": generator.standard_normal((70, 6)).astype(np.float32), "y": generator.integers(0, 3, 70)}


def test_fixed_shapes_are_those_of_the_first_batch(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    guise = Guise(monkeypatch, "qnn", {"qnn": 2})
    path = model(tmp_path)
    found = validate(path, path, data=data, metric="accuracy", providers=["qnn"], batch=32)
    assert guise.asked == [{"sizes": {"N": 32}}]
    (row,) = found.providers
    assert (row.ran, row.nodes, row.macs, row.kernels) == (True, {"qnn": 2}, {"qnn": 1.0}, {"qnn": 2})
    assert row.score is not None
    assert found.score is not None
    # 70 samples in calls of 32, 32 and 6, of which the last was filled up and cut.
    assert (row.score.n, row.score.compressed) == (70, found.score.compressed)
    assert (row.agreement[0].elements, row.agreement[0].bit_equal) == (210, True)
    assert row.latency_p50 is not None
    assert 0 < row.latency_p50 < 1
    assert row.batch == 32
    assert row.memory is not None


def test_a_model_is_opened_again_where_shapes_change(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guise = Guise(monkeypatch, "qnn", {"qnn": 2})
    path = model(tmp_path)
    generator = np.random.default_rng(0)

    def batches(sizes: list[int]) -> Any:
        return lambda: ({"x": generator.standard_normal((n, 6)).astype(np.float32)} for n in sizes)

    found = validate(path, path, data=batches([2, 3, 1, 3]), providers=["qnn"], latency=False)
    assert [entry["sizes"] for entry in guise.asked] == [{"N": 2}, {"N": 3}]
    assert (found.providers[0].ran, found.providers[0].agreement[0].elements) == (True, 27)
    many = validate(path, path, data=batches(list(range(1, 20))), providers=["qnn"], latency=False)
    assert many.reasons[0] == (
        "provider qnn did not run: qnn takes fixed shapes alone, and the data comes in more than 16"
    )


def test_an_evaluator_that_owns_the_calls_is_run_there_too(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    Guise(monkeypatch, "cuda", {"cuda": 2})
    path = model(tmp_path)

    def right(run: Any, data: Any) -> Samples:
        rows = [run(batch.feeds)["logits"][: batch.count].argmax(axis=1) == batch.labels for batch in data]
        return Samples.of(np.concatenate(rows))

    found = validate(path, path, data=data, metric=right, providers=["cuda"], latency=False)
    (row,) = found.providers
    assert row.score is not None
    assert found.score is not None
    assert (row.score.n, row.score.compressed) == (70, found.score.compressed)
    assert row.latency_p50 is None


def test_a_provider_without_the_products_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    Guise(monkeypatch, "cuda", {"cuda": 1, "cpu": 1}, product="cpu")
    path = model(tmp_path)
    found = validate(path, path, data=data, providers=["cuda:device_id=0"], latency=False)
    assert found.verdict is Verdict.FAIL
    assert found.reasons[0] == (
        "provider cuda:device_id=0 ran 1 of 2 nodes and none of the multiply-accumulates; "
        "not taken: MatMul x 1 on cpu (product)"
    )


def test_a_drop_there_alone_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    path = model(tmp_path)
    with open_session(path) as session:
        data["y"] = session.run({"x": data["x"]})["logits"].argmax(axis=1)
    real, guise = Session.run, Guise(monkeypatch, "cuda", {"cuda": 2})

    def wrong(self: Session, feeds: Any, outputs: Any = None) -> Any:
        got = real(self, feeds, outputs)
        return {name: -value for name, value in got.items()} if self in guise.opened else got

    monkeypatch.setattr(Session, "run", wrong)
    found = validate(path, path, data=data, metric="accuracy", max_drop=0.05, providers=["cuda"], latency=False)
    assert found.score is not None
    assert found.score.compressed == 1.0
    assert found.verdict is Verdict.FAIL
    assert found.reasons[0].startswith("provider cuda: accuracy 1 -> ")


def test_tensorrt_gets_its_engine_cache_by_the_hash_of_the_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    guise = Guise(monkeypatch, "tensorrt", {"tensorrt": 1})
    path = model(tmp_path)
    validate(path, path, data=data, providers=["tensorrt:fp16", "tensorrt"], latency=False)
    half, full = (entry["provider_options"] for entry in guise.asked)
    assert half["trt_fp16_enable"] == "1"
    assert "trt_fp16_enable" not in full
    assert half["trt_engine_cache_path"] != full["trt_engine_cache_path"]
    assert pathlib.Path(full["trt_engine_cache_path"]).parent == tmp_path / "cache" / "onnxcompress" / "tensorrt"
