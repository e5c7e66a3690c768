"""The steps that the tests of both quantization passes share."""

from __future__ import annotations

import collections
import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnxcompress.contract import Coverage, Pass, Run
from tests.builders import by_key, checked, opened


class Calls:
    """Calibration data: the same calls at each iteration."""

    def __init__(self, *calls: dict[str, np.ndarray]) -> None:
        self.calls = calls

    def __iter__(self) -> Any:
        return iter(self.calls)

    def digest(self) -> str:
        return str(len(self.calls))


def quantized(
    proto: onnx.ModelProto,
    the_pass: Pass,
    work: pathlib.Path,
    *,
    feeds: Calls | None = None,
    target: str = "cpu",
    threads: int = 1,
) -> tuple[bytes, Coverage, ir.Model]:
    """The compressed file, its account (every weight exactly once), and the model. The file must not grow."""
    model = opened(proto)
    before = {key: weight.nbytes for key, weight in by_key(model).items()}
    coverage = the_pass.apply(model, Run(work=work, target=target, feeds=feeds, threads=threads))
    counted = [entry.key for entry in coverage.touched] + [entry.key for entry in coverage.left]
    assert sorted(counted) == sorted(before)
    data = checked(model)
    assert len(data) <= len(proto.SerializeToString()) + (0 if coverage.touched else 64)
    return data, coverage, model


def executed(data: bytes, folder: pathlib.Path) -> collections.Counter[str]:
    """Operators of the main graph as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def decibel(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise ratio in dB."""
    signal, noise = (float(np.square(x.astype(np.float64)).sum()) for x in (reference, reference - other))
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise))


def details(coverage: Coverage) -> dict[str, str]:
    """Key -> what became of the weights touched."""
    return {entry.key: entry.detail for entry in coverage.touched}


def reasons(coverage: Coverage) -> dict[str, str]:
    """Key -> reason of the weights left."""
    return {entry.key: entry.reason.value for entry in coverage.left}


def operators(model: ir.Model) -> collections.Counter[str]:
    """Operators of the file, in all scopes."""
    return collections.Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
