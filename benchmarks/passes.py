"""What each first pass costs on a model: wall time and peak memory of the command, beside plain reading and writing.

    python benchmarks/passes.py MODEL [--calibration DATA] [--limit N] [--passes NAME...] [--runs N] [--threads N]

Every job is a process of its own, as its user starts it, imports and the proof of the result included; the jobs take
turns, so that a busy machine is busy for all of them, and `cpu s` hardly sees it. `pass s` is what the command itself
reports for the pass. Peak is the largest RssAnon of the process tree (memory mapped from files is not in it). Without
--calibration the calib.npz beside MODEL serves, or 16 made-up samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from measure import Measured, measure

import onnxcompress as oc
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.data.synthetic import synthetic_feeds
from onnxcompress.runtime.cpu import cpu_class

FLOORS = {
    "read + write, onnx": "import sys, onnx; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])",
    "read + write, onnxcompress": "import sys, onnxcompress as oc; oc.save(oc.load(sys.argv[1]), sys.argv[2])",
}
PASSES = {
    "simplify": ["compress", "--recipe", "simplify.yaml"],
    "prune-masked": ["prune", "--sparsity", "0.5"],
    "prune-sparse": ["prune", "--sparsity", "0.5", "--storage", "sparse"],
    "share": ["share", "--bits", "4"],
    "dynamic": ["quantize", "--mode", "dynamic"],
    "static": ["quantize", "--mode", "static"],
}
INFERENCE = "plain inference"
MADE_UP = 16


@dataclasses.dataclass
class Row:
    """What one job came to in all rounds."""

    runs: list[Measured] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # of the pass alone
    megabytes: float | None = None
    refused: str = ""

    @property
    def wall(self) -> float:
        """Median seconds."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def cpu(self) -> float:
        """Median seconds of processor time."""
        return statistics.median(run.cpu for run in self.runs)

    @property
    def peak(self) -> float:
        """Largest MB."""
        return max((run.peak or 0) / 1e6 for run in self.runs)


def calibration(model: pathlib.Path, given: str | None, folder: pathlib.Path, limit: int | None) -> tuple[str, str]:
    """Calibration data and what to call it."""
    if given is None and (model.parent / "calib.npz").is_file():
        given = str(model.parent / "calib.npz")
    if given is not None:
        data = open_data(given, input_specs(oc.load(model)), limit=limit)
        return given, f"{sum(batch.count for batch in data)} samples of {pathlib.Path(given).name}"
    made = [batch.feeds for batch in synthetic_feeds(oc.load(model), samples=limit or MADE_UP, batch=1)]
    arrays: dict[str, Any] = {name: np.concatenate([feeds[name] for feeds in made]) for name in made[0]}
    np.savez(folder / "made-up.npz", **arrays)
    return str(folder / "made-up.npz"), f"{len(made)} made-up samples"


def infer(model: str, data: str, limit: str) -> None:
    """Run the model over the calibration data once: what measuring activations cannot be faster than."""
    from onnxcompress.runtime.session import open_session

    loaded = oc.load(model)
    with open_session(loaded) as session:
        for batch in open_data(data, input_specs(loaded), limit=int(limit) or None):
            session.run(batch.feeds)


def commands(
    model: pathlib.Path, chosen: Sequence[str], data: str, folder: pathlib.Path, given: argparse.Namespace
) -> dict[str, list[str]]:
    """What each job runs; the last two words before the options are input and output."""
    (folder / "simplify.yaml").write_text("passes: [simplify]\n", encoding="utf-8")
    out, report = str(folder / "out.onnx"), str(folder / "out.json")
    found = {name: [sys.executable, "-c", code, str(model), out] for name, code in FLOORS.items()}
    if "static" in chosen:
        found[INFERENCE] = [sys.executable, __file__, "--infer", str(model), data, str(given.limit or 0)]
    for name in chosen:
        first, *rest = (str(folder / word) if word.endswith(".yaml") else word for word in PASSES[name])
        command = [sys.executable, "-m", "onnxcompress", first, str(model), "-o", out, "--json", report, "-q", *rest]
        command += ["--threads", str(given.threads)]
        if name == "static":
            command += ["--calibration", data, *(["--limit", str(given.limit)] if given.limit else [])]
        found[name] = command
    return found


def once(row: Row, command: Sequence[str], folder: pathlib.Path) -> None:
    """One run of one job."""
    done = measure(command)
    row.runs.append(done)
    if done.status:
        row.refused = (done.err.strip().splitlines() or ["failed"])[-1]
        return
    report, out = folder / "out.json", folder / "out.onnx"
    if report.exists():
        found = json.loads(report.read_text(encoding="utf-8"))
        row.seconds.append(sum(step["seconds"] for step in found["passes"]))
    written = [path for path in (out, *folder.glob("out.onnx.*.data")) if path.exists()]
    if written:
        row.megabytes = sum(path.stat().st_size for path in written) / 1e6
    for path in (*written, report):
        path.unlink(missing_ok=True)


def table(rows: dict[str, Row]) -> str:
    """The rows as Markdown, with ratios to plain reading and writing by onnx."""
    floor = rows[next(iter(FLOORS))]
    lines = [
        "| job | wall s | x | cpu s | peak RssAnon MB | x | pass s | file MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if row.refused:
            lines.append(f"| {name} | {row.wall:.2f} | {row.refused} | | | | | |")
            continue
        inside = f"{statistics.median(row.seconds):.2f}" if row.seconds else ""
        size = f"{row.megabytes:,.2f}" if row.megabytes is not None else ""
        ratios = row.wall / floor.wall, row.peak / floor.peak
        lines.append(
            f"| {name} | {row.wall:.2f} | {ratios[0]:.1f} | {row.cpu:.2f} "
            f"| {row.peak:,.0f} | {ratios[1]:.2f} | {inside} | {size} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all jobs `--runs` times in turns and print the table."""
    if sys.argv[1:2] == ["--infer"]:
        infer(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--calibration", metavar="DATA")
    parser.add_argument("--limit", type=int, help="calibration samples to use at most")
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data, called = "", ""
        if "static" in given.passes:
            data, called = calibration(given.model, given.calibration, folder, given.limit)
        jobs = commands(given.model, given.passes, data, folder, given)
        rows = {job: Row() for job in jobs}
        for _ in range(given.runs):
            for job, command in jobs.items():
                once(rows[job], command, folder)
        size = given.model.stat().st_size / 1e6
        print(f"{given.model}: {size:,.1f} MB, {given.runs} runs, {given.threads} thread(s), CPU class {cpu_class()}")
        print(f"calibration: {called}\n\n{table(rows)}" if called else f"\n{table(rows)}")


if __name__ == "__main__":
    main()
