"""`onnxcompress doctor`."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import click

from onnxcompress.cli import options
from onnxcompress.cli.report import Report, size
from onnxcompress.doctor import Health, doctor


@click.command("doctor")
@options.common_options
def command(json_file: pathlib.Path | None, quiet: bool, verbose: bool, **_: Any) -> int:
    """What this machine can run: onnxruntime, its providers and whether they start, the CPU, and what mends what.

    Exit status 0 when the CPU provider works, else 1.
    """
    report = Report(json_file, quiet, verbose)
    report.check()
    found = doctor()
    report.write(found.to_json())
    for line in _lines(found, verbose):
        report.say(line)
    return 0 if found.works else 1


def _lines(found: Health, verbose: bool) -> Iterator[str]:
    builds = ", ".join(f"{name} {version}" for name, version in found.builds.items()) or "no package"
    made = f", made for CUDA {found.cuda}" if found.cuda else ""
    yield f"onnxruntime {found.version or 'cannot be used'} ({builds}{made}), Python {found.python}, {found.system}"
    if found.problem:
        yield f"  {found.problem}"
    if found.mend:
        yield f"  mend: {found.mend}"
    cpu = found.cpu
    classed = "int8 kernels can saturate" if cpu.saturates else "int8 kernels are exact" if "VNNI" in cpu.kind else ""
    told = f"{cpu.kind}: {classed}" if classed else cpu.kind
    memory = f", {size(cpu.memory)} of memory" if cpu.memory else ""
    free = f" ({size(cpu.memory_free)} free)" if cpu.memory_free else ""
    yield f"CPU {cpu.name}, {told}; {cpu.cores} core{'s' if cpu.cores > 1 else ''}{memory}{free}"
    gpu = ", ".join(found.gpu.devices) if found.gpu.reason is None else found.gpu.reason
    yield f"NVIDIA {gpu}" + (f"; driver runs CUDA {'.'.join(map(str, found.gpu.cuda))}" if found.gpu.cuda else "")
    yield "providers:" if found.providers else "providers: none"
    for state in found.providers:
        kind = " (plugin)" if state.plugin else ""
        yield f"  {state.name:12s} {'runs' if state.runs else f'does not run: {state.reason}'}{kind}"
        if state.mend:
            yield f"  {'':12s} mend: {state.mend}"
    if verbose:
        for name, step in found.absent.items():
            yield f"  {name:12s} not installed: {step}"
    elif found.absent:
        yield f"  not installed, -v says how: {', '.join(found.absent)}"
