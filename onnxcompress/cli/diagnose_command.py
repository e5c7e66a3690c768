"""`onnxcompress diagnose`."""

from __future__ import annotations

import pathlib

import click

from onnxcompress.cli import options, running
from onnxcompress.cli.progress import progress
from onnxcompress.cli.report import Report, many
from onnxcompress.diagnosis import Diagnosis, diagnose

SHOWN = 10  # layers that are told without --verbose


@click.command("diagnose")
@click.argument("original", type=options.MODEL)
@click.argument("compressed", type=options.MODEL)
@click.option("--data", metavar="DATA", help=".npz, folder, or file.py:function; without it inputs are made up")
@click.option("--calibration", metavar="DATA", help="what activations were quantized with: see verify")
@options.data_options
@options.common_options
def command(
    original: pathlib.Path,
    compressed: pathlib.Path,
    data: str | None,
    calibration: str | None,
    threads: int,
    seed: int | None,
    labels: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    batch: int | None,
    limit: int | None,
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
) -> int:
    """Which layer of COMPRESSED is to blame: the error each adds by itself, and what its encoding explains of that.

    Uses 64 samples unless --limit says otherwise. Exit status 0 if no layer stands out, else 1.
    """
    report = Report(json_file, quiet, verbose)
    report.check(original, compressed)
    running.keep_inputs(report, None, data, calibration, preprocess, models=[original, compressed])
    read = options.reading(labels, mapping, preprocess, limit, batch)
    found = diagnose(
        original,
        compressed,
        data=data,
        calibration=calibration,
        labels=read.labels,
        mapping=read.mapping,
        preprocess=read.preprocess,
        batch=read.batch,
        limit=read.limit or 64,
        seed=seed or 0,
        threads=threads,
        progress=progress(quiet),
    )
    report.write(found.to_json())
    for line in _lines(found, verbose):
        report.say(line)
    return 0 if found.healthy else 1


def _lines(found: Diagnosis, verbose: bool) -> list[str]:
    rows = found.layers if verbose else sorted(found.layers, key=lambda row: -row.own)[:SHOWN]
    samples = many(found.samples, "sample" if found.inputs == "data" else "made-up sample")
    lines = [f"{many(len(found.layers), 'layer')} on {samples}; relative errors of what comes out:"]
    lines += [
        f"  {row.layer} ({row.operator}): {row.error:.3g} in all, {row.own:.3g} by itself, {row.expected:.3g} explained"
        for row in rows
    ]
    lines += [f"{index}. {layer}: {reason}" for index, (layer, reason) in enumerate(found.blamed, 1)]
    lines += [f"note: {note}" for note in found.notes if not found.healthy]
    lines.append("no layer stands out" if found.healthy else f"look at {found.blamed[0][0]} first")
    return lines
