"""Every model that the onnx package tests backends with, through a pass: no crash, no larger file, no silent change."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.contract import Run
from onnxcompress.errors import OnnxCompressError
from onnxcompress.model.load import load
from onnxcompress.model.save import to_bytes
from onnxcompress.model.weights import weights
from onnxcompress.runtime.session import open_session

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with the inputs stored beside it."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, Any]


@dataclasses.dataclass
class Tally:
    """What came of a sweep. `counts`: models, unrunnable, random, refused, changed, equal, close (outputs)."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    crashed: list[str] = dataclasses.field(default_factory=list)


def cases() -> Iterator[Case]:
    """The 1,884 node models and the 149 models with stored tensors that come with onnx 1.23."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the test data overflows on purpose
        nodes = load_model_tests(kind="node")
    for case in nodes:
        assert case.model is not None
        assert case.data_sets is not None
        yield Case(case.name, case.model, _feeds(case.model, list(case.data_sets[0][0])))
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for case in sorted(load_model_tests(kind=kind), key=lambda case: str(case.name)):
            folder = pathlib.Path(str(case.model_dir))
            model = onnx.load(folder / "model.onnx")
            files = sorted((folder / "test_data_set_0").glob("input_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
            yield Case(case.name, model, _feeds(model, [_read(p, i) for p, i in zip(files, _inputs(model))]))  # noqa: B905
    for file in sorted((pathlib.Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx")):
        model = onnx.load(file)
        (info,) = _inputs(model)
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        yield Case(file.stem, model, {info.name: np.random.default_rng(0).random(shape, np.float32)})


def frozen(case: Case) -> Case | None:
    """The same model with its inputs as initializers, so that everything in it is constant; None for sequences."""
    arrays = {name: value for name, value in case.feeds.items() if isinstance(value, np.ndarray)}
    if len(arrays) < len(case.feeds) or any(a.dtype.kind not in "fiub" for a in arrays.values()):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    kept = [info for info in model.graph.input if info.name not in arrays]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)
    return Case(case.name, model, {})


def sweep(pass_name: str, work: pathlib.Path, *, freeze: bool = False) -> Tally:
    """Run a pass with its defaults over every model and compare what ONNX Runtime puts out before and after."""
    (entry,) = importlib.metadata.entry_points(group="onnxcompress.passes", name=pass_name)
    tally = Tally()
    for case in cases():
        used = frozen(case) if freeze else case
        if used is None:
            continue
        tally.counts["models"] += 1
        _one(used, entry.load()(), work, tally)
    return tally


def _one(case: Case, graph_pass: Any, work: pathlib.Path, tally: Tally) -> None:
    try:
        model = load(case.model)
        # As the project itself writes it: another serializer's bytes are not what the pass is measured against.
        source = to_bytes(model)
        keys = {weight.key for weight in weights(model)}
        coverage = graph_pass.apply(model, Run(work=work))
        result = to_bytes(model)
    except OnnxCompressError as error:
        tally.counts["refused"] += 1
        tally.counts[f"refused: {type(error).__name__}"] += 1
        return
    except Exception as error:
        tally.crashed.append(f"{case.name}: {type(error).__name__}: {error}")
        return
    if coverage.keys() != keys:
        tally.wrong.append(f"{case.name}: coverage differs by {coverage.keys() ^ keys}")
    if len(result) > len(source):
        tally.wrong.append(f"{case.name}: grew from {len(source)} to {len(result)} bytes")
    tally.counts["changed"] += coverage.changed
    before, again = _outputs(source, case.feeds), _outputs(source, case.feeds)
    if before is None or again is None:
        tally.counts["unrunnable"] += 1
        return
    if any(not _equal(before[name], again[name]) for name in before):
        tally.counts["random"] += 1
        return
    after = _outputs(result, case.feeds)
    if after is None or list(after) != list(before):
        tally.wrong.append(f"{case.name}: does not run any more")
        return
    for name, value in before.items():
        if _equal(value, after[name]):
            tally.counts["equal"] += 1
        elif _close(value, after[name]):
            tally.counts["close"] += 1
        else:
            tally.wrong.append(f"{case.name}: output {name} differs")


def _outputs(model: bytes, feeds: dict[str, Any]) -> dict[str, Any] | None:
    try:
        with open_session(model) as session:
            return session.run({name: value for name, value in feeds.items() if name in _names(session)})
    except OnnxCompressError:
        return None


def _names(session: Any) -> set[str]:
    return {port.name for port in session.inputs} | set(session._overridable)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        if not isinstance(b, np.ndarray) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool(np.array_equal(a, b)) if a.dtype.kind == "O" else a.tobytes() == b.tobytes()
    return bool(a == b)


def _close(a: Any, b: Any) -> bool:
    if not (isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.shape == b.shape and a.dtype == b.dtype):
        return False
    return bool(np.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1e-6, float(np.nanmax(np.abs(a)))), equal_nan=True))


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in constants]


def _feeds(model: onnx.ModelProto, stored: list[Any]) -> dict[str, Any]:
    names = [info.name for info in (_inputs(model) if len(_inputs(model)) == len(stored) else model.graph.input)]
    return {name: _plain(value) for name, value in zip(names, stored, strict=False)}


def _plain(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return onnx.numpy_helper.to_list(value)
    if isinstance(value, onnx.OptionalProto):
        return onnx.numpy_helper.to_optional(value)
    return value


def _read(path: pathlib.Path, info: onnx.ValueInfoProto) -> Any:
    kinds = {"tensor_type": onnx.TensorProto, "sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
    proto = kinds[info.type.WhichOneof("value")]()
    proto.ParseFromString(path.read_bytes())
    return proto


@pytest.mark.parametrize("freeze", [False, True], ids=["as-they-are", "inputs-frozen"])
@pytest.mark.parametrize("name", ["simplify"])
def test_no_model_crashes_grows_or_changes(
    name: str, freeze: bool, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes a minute: pytest -m slow")
    tally = sweep(name, tmp_path, freeze=freeze)
    print(f"\n{name}{', inputs frozen' if freeze else ''}: {dict(sorted(tally.counts.items()))}")
    assert not tally.crashed, tally.crashed
    assert not tally.wrong, tally.wrong
    assert tally.counts["models"] >= (1500 if freeze else 2033)
