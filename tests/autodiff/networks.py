"""Whole networks for the gradient tests: where they are, what they are fed, what stands for their gradients."""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.autodiff.checking import gradient_model, prepared, session

Arrays = Mapping[str, np.ndarray]
ROOT = pathlib.Path(__file__).parents[2]
FILE = pathlib.Path(__file__).with_name("networks.npz")
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
LENGTHS = {"char_gpt": 24, "minilm_l6_sts": 16, "sst2_minilm3": 16}  # tokens
PROJECTIONS = 4


def networks() -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """Name -> model and feeds, of models/ and of the folder ONNXCOMPRESS_ZOO."""
    found = {f.parent.name: (f, f.with_name("calib.npz")) for f in sorted((ROOT / "models").glob("*/model.onnx"))}
    zoo = os.environ.get("ONNXCOMPRESS_ZOO")
    for file in sorted(pathlib.Path(zoo).glob("*/model*.onnx")) if zoo else []:
        part = file.stem.removeprefix("model")
        found[file.parent.name + part] = (file, file.with_name(f"feeds{part}.npz"))
    return found


def loaded(file: pathlib.Path) -> onnx.ModelProto:
    """The network as it is differentiated: opset 13 or later, weights in float32 in the main graph."""
    model = onnx.load(file)
    if any(entry.version < 13 for entry in model.opset_import if not entry.domain):
        model = onnx.version_converter.convert_version(model, 15)
    model = prepared(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in names]
    del model.graph.input[:], model.graph.value_info[:]
    model.graph.input.extend(inputs)
    return model


def weights_of(model: onnx.ModelProto) -> list[str]:
    """Its float tensors."""
    return [t.name for t in model.graph.initializer if t.data_type == FLOAT and np.prod(t.dims) > 1]


def feeds_of(model: onnx.ModelProto, file: pathlib.Path, length: int | None, draw: int) -> dict[str, np.ndarray]:
    """One or two samples of what the file holds, others for every draw; random numbers where there is none."""
    stored = np.load(file, allow_pickle=False) if file.is_file() else {}
    feeds: dict[str, np.ndarray] = {}
    array: np.ndarray
    for info in model.graph.input:
        kind, dims = info.type.tensor_type.elem_type, info.type.tensor_type.shape.dim
        if info.name not in stored:
            array = np.random.default_rng(draw).standard_normal(tuple(dim.dim_value or 1 for dim in dims))
        elif stored[info.name].ndim > len(dims):  # a whole call a row
            array = stored[info.name][draw]
        else:
            count = dims[0].dim_value or 2
            array = stored[info.name][draw * count : (draw + 1) * count]
        array = array[:, :length] if length else array
        feeds[info.name] = np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(kind))
    return {name: np.asarray(array) for name, array in feeds.items()}


def seeds_of(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    """Random gradients of the float outputs."""
    rng = np.random.default_rng(0)
    names = [output.name for output in model.graph.output]
    plain = dict(zip(names, session(model).run(names, dict(feeds)), strict=True))
    arrays = {n: a for n, a in plain.items() if isinstance(a, np.ndarray) and a.dtype == np.float32}
    return {n: np.asarray(rng.uniform(0.2, 1, a.shape), np.float32) for n, a in arrays.items()}


def ours(model: onnx.ModelProto, feeds: Arrays, seeds: Arrays) -> dict[str, np.ndarray]:
    """The gradients of all weights that have one, by ONNX Runtime in float32."""
    built, names = gradient_model(model, seeds, weights_of(model))
    given = {**feeds, **{f"seed/{name}": seed for name, seed in seeds.items()}}
    return dict(zip(names, session(built).run(list(names.values()), given), strict=True))


def projections(gradients: Arrays, names: list[str]) -> np.ndarray:
    """[weights, 4]: inner products with random directions.

    Those of an error with standard normal directions have the error's norm as their root mean square.
    """
    return np.array([[float(np.vdot(gradients[n], d)) for d in _directions(n, gradients[n].shape)] for n in names])


def _directions(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(PROJECTIONS):
        yield rng.standard_normal(shape)
