"""Is the memory of `validate` flat in the size of the data? 500 samples against 10,000 of a bundled model.

    python benchmarks/validation_memory.py

Prints the peak of anonymous memory (RssAnon) of a process that validates, with a proportion, a bootstrapped metric and
none; processes that it starts to measure what opening a model costs are not in it. Exit status 1 when 10,000 samples
take more than 1.1 times the memory of 500. About a minute; Linux alone.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

import onnxcompress
from onnxcompress.passes.dynamic_quantization import DynamicQuantization

MODEL = pathlib.Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
SIZES, MOST = (500, 10_000), 1.1


PROGRAM = """
import json, sys
from onnxcompress import validate
from onnxcompress.runtime.memory import PeakRssAnon
original, compressed, data, metric = sys.argv[1:]
with PeakRssAnon() as seen:
    found = validate(original, compressed, data=data, metric=metric or None, max_drop=0.05 if metric else None)
print(json.dumps([seen.peak, found.samples, found.score.method if found.score else "-"]))
"""


def peak(*words: str | pathlib.Path) -> tuple[int, str]:
    """Peak bytes of a process that runs `PROGRAM`, and what it says of the samples."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    found, samples, method = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        raise SystemExit("RssAnon is told on Linux alone")
    return int(found), f"{samples:,} samples ({method}) {found / 1e6:.1f} MB"


def main() -> int:
    """Run all cases."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, np.load(MODEL / "eval.npz") as found:
        arrays, data = dict(found), pathlib.Path(folder)
        for size in SIZES:
            np.savez(
                data / f"{size}.npz", **{name: array[np.arange(size) % len(array)] for name, array in arrays.items()}
            )
        model, small = MODEL / "model.onnx", data / "small.onnx"
        onnxcompress.compress(model, DynamicQuantization(), out=small)
        for metric in ("accuracy", "f1", ""):
            few, many = (peak(model, small, data / f"{size}.npz", metric) for size in SIZES)
            worst = max(worst, many[0] / few[0])
            print(f"{metric or 'no metric'}: {few[1]}, {many[1]}: x {many[0] / few[0]:.3f}", flush=True)
    print(f"worst x {worst:.3f}, allowed {MOST}")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
