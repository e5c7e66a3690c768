"""What the tests of the top of the house share: bundled models, a small one, passes that misbehave, the command."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import time
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxcompress import cli
from onnxcompress.contract import Coverage, Left, Pass, Reason, Run, Touched, parameter
from onnxcompress.encodings import Dense
from onnxcompress.errors import PassError
from onnxcompress.model.weights import weights
from tests.builders import floats, graph, info, model, node, tensors

ROOT = pathlib.Path(__file__).parents[1]
MODELS = ROOT / "models"
BUNDLED = ("digits_cnn", "digits_gru", "gloss_transformer")
# The same for tests that repeat much work: the largest model takes its turn in `pytest -m slow`.
BUNDLED_QUICK = ("digits_cnn", "digits_gru", pytest.param("gloss_transformer", marks=pytest.mark.slow))


def bundled(name: str) -> pathlib.Path:
    """A bundled model's file."""
    return MODELS / name / "model.onnx"


def split(name: str, part: str) -> pathlib.Path:
    """A bundled model's data: train, calib or eval."""
    return MODELS / name / f"{part}.npz"


def accuracy(name: str, file: pathlib.Path | bytes, limit: int | None = None) -> float:
    """Accuracy of a file on a bundled model's evaluation data, by ONNX Runtime alone."""
    with np.load(split(name, "eval")) as loaded:
        data = {key: array[:limit] for key, array in loaded.items()}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {port.name: data[port.name].astype(types[port.type]) for port in session.get_inputs()}
    return float((session.run(None, feeds)[0].argmax(1) == data["y"]).mean())


def two_layers(opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """x [n, 16] -> MatMul first [16, 64] -> Relu -> MatMul second [64, 8] -> Add bias [8] -> y."""
    nodes = [
        node("MatMul", ["x", "first"], ["a"], name="one"),
        node("Relu", ["a"], ["b"], name="relu"),
        node("MatMul", ["b", "second"], ["c"], name="two"),
        node("Add", ["c", "bias"], ["y"], name="add"),
    ]
    held = tensors(first=floats(16, 64), second=floats(64, 8, seed=1), bias=floats(8, seed=2))
    return model(graph(nodes, [info("x", ["n", 16])], [info("y", ["n", 8])], held), opset, ir_version)


def initializers(data: bytes | pathlib.Path) -> dict[str, np.ndarray]:
    """The initializers of a file's main graph."""
    proto = onnx.load_from_string(data) if isinstance(data, bytes) else onnx.load(data)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


# Passes -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies the weights it may treat; counts its runs in the file that TEST_RUNS names."""

    name: ClassVar[str] = "scale"
    factor: float = parameter(0.5, "what to multiply by", gt=0)

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        if "TEST_RUNS" in os.environ:
            with open(os.environ["TEST_RUNS"], "a") as file:
                file.write(f"{self.name} {self.factor}\n")
        coverage = Coverage()
        for weight in weights(model, run.work):
            if self.select.allows(weight):
                new = Dense((weight.array() * np.float32(self.factor)).astype(weight.dtype))
                coverage.touched.append(Touched(weight.key, weight.nbytes, new.nbytes, abs(1 - self.factor)))
                weight.replace(new)
            else:
                coverage.left.append(Left(weight.key, weight.nbytes, Reason.EXCLUDED))
        return coverage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wait(Pass):
    """Touches nothing and sleeps for TEST_WAIT seconds."""

    name: ClassVar[str] = "wait"

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        time.sleep(float(os.environ.get("TEST_WAIT", "0")))
        return Coverage(left=untouched(model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bad(Pass):
    """Misbehaves in the way it is told."""

    name: ClassVar[str] = "bad"
    how: str = parameter("raises", "what goes wrong")

    def apply(self, model: ir.Model, run: Run) -> Coverage:
        found = {weight.key: weight for weight in weights(model, run.work)}
        coverage = Coverage(left=untouched(model))
        first, second = found["first"], found["second"]
        first.replace(Dense(first.array() * np.float32(3)))  # whatever goes wrong must be undone
        match self.how:
            case "raises":
                raise PassError("cannot treat this model")
            case "has a bug":
                raise KeyError("nowhere")
            case "runs out of memory":
                raise MemoryError
            case "forgets":
                coverage.left.pop()
            case "counts twice":
                coverage.touched.append(Touched("first", 1, 1))
            case "invents":
                coverage.left.append(Left("third", 1, Reason.ROLE))
            case "grows":
                model.graph.initializers.add(
                    ir.Value(name="ballast", const_value=ir.tensor(floats(4096), name="ballast"))
                )
                coverage.rewrites["ballast"] = 1
            case "not finite":
                first.replace(Dense(np.full((16, 64), np.nan, np.float32)))
                coverage.rewrites["nan"] = 1
            case "other shape":
                second.replace(Dense(floats(64, 1)))  # Add still broadcasts
                next(iter(model.graph.outputs)).producer().replace_input_with(1, second.value)  # type: ignore[union-attr]
                coverage.rewrites["shape"] = 1
            case "loses an output":
                model.graph.outputs.clear()
                coverage.rewrites["output"] = 1
            case "unknown operator":
                next(iter(model.graph)).op_type = "None"
                coverage.rewrites["operator"] = 1
        return coverage


def untouched(model: ir.Model) -> list[Left]:
    """Every weight as left."""
    return [Left(weight.key, weight.nbytes, Reason.UNTOUCHED) for weight in weights(model)]


# The command ------------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `onnxcompress ARGUMENTS`, in this process."""
    capsys.readouterr()
    before, sys.argv = sys.argv, ["onnxcompress", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


PROGRAM = [sys.executable, "-m", "onnxcompress"]


def filenames(folder: pathlib.Path) -> list[str]:
    """What lies in a folder."""
    return sorted(entry.name for entry in folder.iterdir())


def refused(folder: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """Assert that a command says `words` in one line, exits with 2, and leaves every file in `folder` as it was."""
    (folder / "o.onnx").write_bytes(b"what was there")
    (folder / "text.onnx").write_text("hello")
    before = {entry: entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()}
    code, _, err = command(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert words in err
    assert len(err) < 600
    left = {e: e.read_bytes() for e in folder.rglob("*") if e.is_file() and e.parent.name != "__pycache__"}
    assert left == before
