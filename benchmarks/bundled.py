"""The README's table: what each pass does to each bundled model.

    python benchmarks/bundled.py [MODEL ...]

Prints one row a model and pass: file size, accuracy before and after on the model's eval.npz, latency ratio (one
thread, interleaved, median; above 1 is faster than the original), and the class of this CPU. Needs
`pip install -e '.[cpu]'`; takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile

import onnxcompress as oc
from onnxcompress.runtime.cpu import cpu_class

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"
JOBS: list[tuple[str, list[object]]] = [
    ("simplify", ["simplify"]),
    ("magnitude-pruning 50 %, sparse", [{"magnitude-pruning": {"sparsity": 0.5, "storage": "sparse"}}]),
    ("weight-sharing 4 bit", [{"weight-sharing": {"bits": 4}}]),
    ("dynamic-quantization", ["dynamic-quantization"]),
    ("static-quantization", ["static-quantization"]),
    (
        "prune 30 % + share 4 bit",
        ["simplify", {"magnitude-pruning": {"sparsity": 0.3}}, {"weight-sharing": {"bits": 4}}],
    ),
]


def row(folder: pathlib.Path, name: str, passes: list[object], out: pathlib.Path) -> str:
    """One line of the table."""
    stated = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    done = oc.compress(
        folder / "model.onnx",
        {"passes": passes},
        out=out,
        calibration=folder / "calib.npz" if name.startswith("static") else None,
        evaluate=folder / "eval.npz",
        metric=stated["metric"],
    )
    assert done.result is not None
    assert done.result.score is not None
    assert done.result.latency is not None
    score, latency = done.result.score, done.result.latency
    size = f"{done.bytes_before / 1e3:,.0f} -> {done.bytes_after / 1e3:,.0f} ({done.ratio:.3f})"
    return f"| {folder.name} | {name} | {size} | {score.original:.4f} -> {score.compressed:.4f} | {latency.ratio:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.parent.name for path in MODELS.glob("*/model.onnx"))
    parser.add_argument("models", nargs="*", metavar="MODEL", default=names, help=f"of {', '.join(names)}")
    chosen = parser.parse_args().models
    print(f"CPU class: {cpu_class()}\n")
    print("| model | pass | kB (ratio) | accuracy | latency ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for model in chosen:
            for name, passes in JOBS:
                print(row(MODELS / model, name, passes, pathlib.Path(folder) / "out.onnx"), flush=True)


if __name__ == "__main__":
    main()
