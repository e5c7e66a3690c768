"""A model larger than protobuf allows goes through sharing and pruning: wall time, size and peak memory of the command.

    python benchmarks/large.py FOLDER [--gigabytes 3] [--jobs share prune-masked prune-sparse] [--keep]

FOLDER needs 3.5 times the model's size of free disk. The model is made there, tensor by tensor: an embedding, and a
chain of matrix products with LayerNormalization between them; Gaussian weights with outliers, as trained ones have
them. Exits with 1 when a job needs more than `--most-megabytes` of anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator

import numpy as np
import onnx
from measure import measure
from onnx import TensorProto, helper

JOBS: dict[str, list[str]] = {
    "share": ["share", "--bits", "4"],
    "prune-masked": ["prune", "--sparsity", "0.5"],
    "prune-sparse": ["prune", "--sparsity", "0.5", "--storage", "sparse"],
}
WIDTH, WIDE, VOCABULARY = 4096, 12288, 32000  # 67 MB, 201 MB and 524 MB of float32
OUTLIERS = 1e-4  # share of the elements that are ten times as large
ROWS = 1 << 20  # elements made at once


def shapes(total: float) -> Iterator[tuple[str, tuple[int, int]]]:
    """Weights of about `total` bytes: the embedding, then blocks of a square matrix, one up and one down."""
    yield "embedding", (VOCABULARY, WIDTH)
    held, block = 4 * VOCABULARY * WIDTH, 0
    while held < total:
        for name, shape in (
            ("square", (WIDTH, WIDTH)),
            ("up", (WIDTH, WIDE)),
            ("down", (WIDE, WIDTH)),
        ):
            yield f"block{block}.{name}", shape
            held += 4 * shape[0] * shape[1]
        block += 1


def make(path: pathlib.Path, total: float) -> int:
    """Write the model with its external data; returns the bytes of the data."""
    generator = np.random.default_rng(0)
    one = helper.make_tensor("one", TensorProto.FLOAT, [WIDTH], np.ones(WIDTH, np.float32))
    initializers, nodes, value, offset = [one], [], "ids", 0
    with open(path.with_suffix(".data"), "wb") as file:
        for name, shape in shapes(total):
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            length = 4 * shape[0] * shape[1]
            for key, entry in (("location", path.stem + ".data"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(entry))
            initializers.append(tensor)
            offset += length
            scale = np.float32(1.0 / np.sqrt(shape[0] if name != "embedding" else shape[1]))
            for start in range(0, shape[0] * shape[1], ROWS):
                part = generator.standard_normal(min(ROWS, shape[0] * shape[1] - start), np.float32) * scale
                part[generator.random(part.size, np.float32) < OUTLIERS] *= 10
                part.tofile(file)
            nodes += _layer(name, value)
            value = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", "length", WIDTH])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return offset


def _layer(name: str, value: str) -> list[onnx.NodeProto]:
    if name == "embedding":
        return [helper.make_node("Gather", [name, value], ["tokens"], "embed")]
    product = helper.make_node("MatMul", [value, name], [f"{name}.out"], name)
    if name.endswith("up"):
        return [product, helper.make_node("Relu", [f"{name}.out"], [f"{name}.act"], f"{name}.relu")]
    norm = helper.make_node("LayerNormalization", [f"{name}.out", "one"], [f"{name}.norm"], f"{name}.norm")
    return [product, norm]


def main() -> int:
    """Make the model, run the jobs, print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--most-megabytes", type=float, default=1000.0, help="of anonymous memory a job may take")
    parser.add_argument("--keep", action="store_true", help="leave the model and the results in FOLDER")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    needed, free = 3.5e9 * given.gigabytes, shutil.disk_usage(given.folder).free
    if free < needed:
        parser.error(f"{given.folder}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")
    source = given.folder / "large.onnx"
    start = time.perf_counter()
    if not source.exists():
        size = make(source, 1e9 * given.gigabytes)
        print(f"made {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")
    short = 0
    print("| job | wall s | cpu s | pass s | peak RssAnon MB | GB before -> after |\n|---|---|---|---|---|---|")
    for job in given.jobs:
        short += not _run(job, source, given.folder / f"{job}.onnx", given)
    if not given.keep:
        for path in (source, source.with_suffix(".data")):
            path.unlink()
    return 1 if short else 0


def _run(job: str, source: pathlib.Path, out: pathlib.Path, given: argparse.Namespace) -> bool:
    report = out.with_suffix(".json")
    name, *rest = JOBS[job]
    done = measure([sys.executable, "-m", "onnxcompress", name, source, "-o", out, "--json", report, "-q", *rest])
    if done.status:
        print(f"| {job} | {done.seconds:.1f} | exit {done.status}: {done.err.strip().splitlines()[-1:]} | | | |")
        return False
    found = json.loads(report.read_text(encoding="utf-8"))
    peak = (done.peak or 0) / 1e6
    sizes = f"{found['bytes_before'] / 1e9:.3f} -> {found['bytes_after'] / 1e9:.3f}"
    times = f"{done.seconds:.1f} | {done.cpu:.1f} | {found['passes'][0]['seconds']:.1f}"
    print(f"| {job} | {times} | {peak:,.0f} | {sizes} |", flush=True)
    if not given.keep:
        for path in (out, report, *out.parent.glob(f"{out.name}.*.data")):
            path.unlink()
    return bool(peak <= given.most_megabytes)


if __name__ == "__main__":
    sys.exit(main())
