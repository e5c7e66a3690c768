"""`onnxcompress lint`."""

from __future__ import annotations

import pathlib
from collections import Counter
from typing import Any

import click

from onnxcompress.cli import options, running
from onnxcompress.cli.report import Report, many
from onnxcompress.linting import Finding, lint

MOST = 3  # findings of one rule that are told without --verbose


@click.command("lint")
@click.argument("model", type=options.MODEL)
@click.option("--target", type=options.TARGETS, default="cpu", show_default=True, help="where the model is to run")
@options.common_options
def command(
    model: pathlib.Path, target: str, json_file: pathlib.Path | None, quiet: bool, verbose: bool, **_: Any
) -> int:
    """What TARGET would refuse, run slowly or compute differently in MODEL: the node, the rule, the mend.

    Nothing is run. Exit status 0 without errors (warnings may stand), else 1.
    """
    report = Report(json_file, quiet, verbose)
    report.check(model)
    running.keep_inputs(report, None, models=[model])
    found = lint(model, target)
    report.write(found.to_json())
    for line in lines(found.findings, verbose):
        report.say(line)
    errors, warnings = len(found.errors), len(found.findings) - len(found.errors)
    report.say(f"{target}: {many(errors, 'error')}, {many(warnings, 'warning')} in {many(found.nodes, 'node')}")
    return 0 if found.passed else 1


def lines(findings: tuple[Finding, ...], verbose: bool) -> list[str]:
    """One line a finding; of a rule found often the first few, and how many more."""
    counts, told, found = Counter(finding.rule for finding in findings), Counter[str](), []
    for finding in findings:
        told[finding.rule] += 1
        if verbose or told[finding.rule] <= MOST:
            where = f"{finding.node!r} ({finding.operator}) " if finding.node else ""
            found.append(f"{finding.level}  {finding.rule}: {where}{finding.message}; {finding.mend}")
        elif told[finding.rule] == counts[finding.rule]:
            found.append(f"  ... {finding.rule}: {counts[finding.rule] - MOST} more (--verbose)")
    return found
