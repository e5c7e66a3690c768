"""What a teacher costs: epochs of distillation, its answers cached, beside epochs on labels alone.

    python benchmarks/teacher.py [MODEL...] [--rounds N] [--limit N] [--threads N]

MODEL: names of bundled models (all three by default). Both learn the same samples with the same settings; trainings
take turns, and the ratio is the median over rounds of their epochs' median seconds. Filling the cache, once before the
first epoch, is told beside it.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import numpy as np

import onnxcompress as oc
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.training.distill import distill
from onnxcompress.training.settings import Conditions, Settings

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"
EPOCHS = 4


def seconds(name: str, limit: int, threads: int, *, taught: bool) -> tuple[float, float]:
    """Seconds of an epoch (median, without the first) and of all that comes before the first."""
    model = oc.load(MODELS / name / "model.onnx")
    stored = {key: array[:limit] for key, array in np.load(MODELS / name / "train.npz").items()}
    data = open_data(stored, input_specs(model), batch=32, trim=False, last="fill")
    began = time.perf_counter()
    settings, conditions = Settings(epochs=EPOCHS), Conditions(threads=threads)
    done = distill(model if taught else None, model, data, settings=settings, conditions=conditions)
    whole = time.perf_counter() - began
    each = [epoch.seconds for epoch in done.epochs]
    return statistics.median(each[1:]), whole - sum(each)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["digits_cnn", "digits_gru", "gloss_transformer"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=960)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for name in args.models:
        ratios, labels, before = [], [], []
        for _ in range(args.rounds):
            alone, first = seconds(name, args.limit, args.threads, taught=False)
            taught, second = seconds(name, args.limit, args.threads, taught=True)
            ratios.append(taught / alone)
            labels.append(alone)
            before.append(second - first)
        epoch, ratio = statistics.median(labels), statistics.median(ratios)
        told = f"{name}: an epoch on labels {epoch:.2f} s, with a teacher {ratio:.3f} times that"
        print(f"{told}; the cache, once: {statistics.median(before):.2f} s", flush=True)


if __name__ == "__main__":
    main()
