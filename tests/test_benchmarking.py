"""Models timed side by side: what is measured, on which feeds, and what is refused."""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
import onnx
import pytest

import onnxcompress as oc
from onnxcompress.errors import DataError, ModelError, OnnxCompressError, RuntimeUnavailable
from onnxcompress.runtime.memory import rss_anon
from tests.builders import floats, graph, info, model, node, tensors
from tests.house import command, two_layers


def stack(depth: int, batch: int | str = "n") -> onnx.ModelProto:
    """x [batch, 256] through `depth` products with one matrix, so that the work is known."""
    names = ["x", *(f"h{i}" for i in range(depth - 1)), "y"]
    nodes = [node("MatMul", [a, "w"], [b]) for a, b in itertools.pairwise(names)]
    held = tensors(w=floats(256, 256) / 16)
    return model(graph(nodes, [info("x", [batch, 256])], [info("y", [batch, 256])], held))


@pytest.fixture
def files(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    for name, depth in (("deep", 24), ("flat", 3)):
        (tmp_path / f"{name}.onnx").write_bytes(stack(depth).SerializeToString())
    return [tmp_path / "deep.onnx", tmp_path / "flat.onnx"]


def test_an_eighth_of_the_work_is_found_to_be_faster(files: list[pathlib.Path]) -> None:
    found = oc.bench(files, batches=(1, 64), seconds=0.2, starts=1)
    assert [(row.model, row.batch) for row in found.rows] == [(str(f), size) for size in (1, 64) for f in files]
    for first, second in zip(found.rows[::2], found.rows[1::2], strict=True):
        assert first.ratio is None
        assert second.ratio is not None
        assert second.ratio_low is not None
        assert second.ratio_high is not None
        assert second.ratio_low <= second.ratio <= second.ratio_high
        assert first.runs == second.runs >= 6
        assert first.p50 <= first.p90 <= first.p99
        assert first.throughput == pytest.approx(first.batch / first.p50)
    assert found.rows[3].ratio is not None
    assert found.rows[3].ratio > 3  # eight times less to compute
    assert [cost.bytes for cost in found.costs] == [file.stat().st_size for file in files]
    own = found.costs[0].footprint
    assert own is not None
    assert own.load > 0
    if rss_anon() is not None:
        assert own.peak is not None
        assert own.peak > 0
    assert found.machine.threads == 1
    assert found.inputs == "synthetic"
    assert json.loads(json.dumps(found.to_json()))["rows"][1]["ratio"] == found.rows[1].ratio


def test_batches_that_the_model_does_not_take_are_left_out() -> None:
    found = oc.bench([stack(1, 2)], batches=(1, 2), seconds=0.05, starts=0)
    assert [row.batch for row in found.rows] == [2]
    assert "calls of 2 samples" in found.skipped[1]
    with pytest.raises(DataError, match="calls of 2 samples"):
        oc.bench([stack(1, 2)], batches=(3,), seconds=0.05)


def test_the_given_data_is_used() -> None:
    data = {"x": np.zeros((5, 256), np.float32)}
    found = oc.bench([stack(1)], batches=(5, 8), data=data, seconds=0.05, starts=0)
    assert [row.batch for row in found.rows] == [5]
    assert list(found.skipped) == [8]
    assert found.inputs == "data"
    assert found.costs[0].footprint is None
    with pytest.raises(DataError, match="x"):
        oc.bench([stack(1)], data={"x": np.zeros((5, 3), np.float32)}, seconds=0.05)


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match=r"is \[.*\] in .*, \[.*\] in (?!the compressed)"):
        oc.bench([stack(1), two_layers()], seconds=0.05)
    with pytest.raises(OnnxCompressError, match="batch sizes"):
        oc.bench([stack(1)], batches=(0,))
    with pytest.raises(RuntimeUnavailable, match="qnn"):
        oc.bench([stack(1)], provider="qnn", seconds=0.05)


def test_the_command(files: list[pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--batch", "64", "--seconds", "0.1", "--starts", "1", "--json", str(tmp_path / "b.json")]
    code, out, _ = command(capsys, "bench", *map(str, files), *asked)
    assert code == 0
    lines = out.splitlines()
    assert "onnxruntime" in lines[0]
    assert "1 thread, on made-up inputs" in lines[0]
    assert lines[1].startswith(f"{files[0]}: ")
    assert "loads in" in lines[1]
    assert lines[3].startswith("batch 64")
    assert "x as fast (" in lines[5]
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["schema"] == 1
    assert written["rows"][1]["ratio"] > 2
    code, _, err = command(capsys, "bench", str(files[0]), "--provider", "tpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "tpu" in err
