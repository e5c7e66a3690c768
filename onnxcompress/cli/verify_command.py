"""`onnxcompress verify`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from onnxcompress.cli import options, running
from onnxcompress.cli.report import Report, many
from onnxcompress.verification import Verification, verify

MOST = 20  # problems that are told without --verbose
SHOWN = 5  # weights of greatest error that are told without --verbose


@click.command("verify")
@click.argument("out", type=options.MODEL)
@click.option("--parent", type=options.MODEL, required=True, metavar="IN", help="what OUT was made from")
@click.option("--target", type=options.TARGETS, default="cpu", show_default=True, help="where OUT is to run; see lint")
@click.option("--calibration", metavar="DATA", help="what activations were quantized with: compare their scales, too")
@options.data_options
@options.common_options
def command(
    out: pathlib.Path,
    parent: pathlib.Path,
    target: str,
    calibration: str | None,
    threads: int,
    labels: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    batch: int | None,
    limit: int | None,
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    **_: Any,
) -> int:
    """Prove from the file that OUT is what its encodings say of IN: every weight's exact error, the graph, the origin.

    Nothing is run, unless --calibration is given. Exit status 0 if all of it holds, else 1.
    """
    report = Report(json_file, quiet, verbose)
    report.check(out, parent)
    running.keep_inputs(report, None, calibration, preprocess, models=[out, parent])
    data = options.reading(labels, mapping, preprocess, limit, batch)
    found = verify(
        out,
        parent,
        target=target,
        calibration=calibration,
        labels=data.labels,
        mapping=data.mapping,
        preprocess=data.preprocess,
        batch=data.batch,
        limit=data.limit,
        threads=threads,
    )
    report.write(found.to_json())
    for line in _lines(found, verbose):
        report.say(line)
    return 0 if found.holds else 1


def _lines(found: Verification, verbose: bool) -> list[str]:
    rows = sorted(found.weights, key=lambda row: -row.error)
    kinds = ", ".join(f"{sum(r.encoding == kind for r in rows)} {kind}" for kind in sorted({r.encoding for r in rows}))
    lines = [f"{many(len(rows), 'weight')} ({kinds}), each decoded and compared with the parent's"]
    lines += [
        f"  {row.key}: {row.encoding}, relative error {row.error:.3g}, of which its encoding explains "
        f"{row.expected:.3g}; largest {row.largest:.3g}"
        for row in (rows if verbose else rows[:SHOWN])
        if verbose or row.error
    ]
    lines += [
        f"{problem.kind}: {problem.where + ': ' if problem.where else ''}{problem.message}"
        for problem in (found.problems if verbose else found.problems[:MOST])
    ]
    if len(found.problems) > MOST and not verbose:
        lines.append(f"... and {len(found.problems) - MOST} more (--verbose)")
    lines += [f"note: {note}" for note in found.notes]
    lines.append("HOLDS" if found.holds else f"DOES NOT HOLD: {many(len(found.problems), 'problem')}")
    return lines
