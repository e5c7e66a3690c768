"""`onnxcompress inspect`."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli import options, running
from onnxcompress.cli.report import Report, size
from onnxcompress.inspection import Inspection, Port, inspect

if TYPE_CHECKING:
    from onnxcompress.trainable import Trainable

MOST_NAMED = 5  # weights in a line of advice


@click.command("inspect")
@click.argument("model", type=options.MODEL)
@click.option("--trainable", is_flag=True, help="list what distill and train would train, and what stands in the way")
@options.common_options
def command(
    model: pathlib.Path, trainable: bool, json_file: pathlib.Path | None, quiet: bool, verbose: bool, **_: Any
) -> int:
    """What MODEL is, where its bytes are, and what each pass could touch."""
    report = Report(json_file, quiet, verbose)
    report.check(model)
    running.keep_inputs(report, None, models=[model])
    found = inspect(model, trainable=trainable)
    report.write(found.to_json())
    for line in _lines(found, verbose):
        report.say(line)
    for line in _trainable(found.trainable, verbose) if found.trainable is not None else ():
        report.say(line)
    return 0


def _trainable(found: Trainable, verbose: bool) -> Iterator[str]:
    """What a training would do, and the words with which it can be made to."""
    learned = ", ".join(name if name == logits else f"{name} (by {logits})" for name, logits in found.outputs.items())
    yield f"what distill and train would train, for {learned or 'no output'}:"
    numbers = sum(size for parts in found.trained.values() for size in parts.values())
    yield f"  {len(found.trained)} weights, {numbers:,} numbers"
    if verbose:
        for key, parts in found.trained.items():
            yield f"    {key}: {', '.join(f'{size:,} of {part}' for part, size in parts.items())}"
    for reason, keys in _by_reason(found.left).items():
        yield f"  left, {len(keys)} weights: {reason}"
        if verbose:
            yield from (f"    {key}" for key in keys)
    for entry in found.blocked:
        lost = ", ".join(entry.weights) or "nothing"
        yield f"  node {entry.node!r} ({entry.operator}) {entry.reason}: cuts off {lost}"
    if found.cut_off:
        left_out = " ".join(f"--exclude {shlex.quote(key)}" for key in found.cut_off[:MOST_NAMED])
        more = f" and {len(found.cut_off) - MOST_NAMED} more" if len(found.cut_off) > MOST_NAMED else ""
        yield f"  until these are left out, both refuse the model: {left_out}{more}"


def _by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, reason in left.items():
        found.setdefault(reason, []).append(key)
    return found


def _lines(found: Inspection, verbose: bool) -> list[str]:
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in found.opsets.items())
    macs = f", {found.macs / 1e6:,.1f} M multiply-adds a call" if found.macs else ""
    lines = [f"{size(found.bytes)}, IR {found.ir_version}, opset {opsets}, by {found.producer or 'unknown'}{macs}"]
    lines += [f"input   {_port(port)}" for port in found.inputs] + [f"output  {_port(port)}" for port in found.outputs]
    operators = list(found.operators.items())
    told = ", ".join(f"{name} {count}" for name, count in (operators if verbose else operators[:12]))
    more = f" and {len(operators) - 12} more" if len(operators) > 12 and not verbose else ""
    lines.append(f"operators: {told}{more}")
    held = sum(row.bytes for row in found.weights)
    rest = size(max(0, found.bytes - held))
    lines.append(f"weights: {len(found.weights)}, {size(held)}; the other {rest} are graph and constants")
    lines += [f"  {role:10s} {count:4d}  {size(held)}" for role, (count, held) in found.by_role().items()]
    rows = sorted(found.weights, key=lambda row: -row.bytes)
    for row in rows if verbose else rows[:8]:
        shape = "x".join(map(str, row.shape))
        lines.append(f"    {row.key}: {row.encoding} {row.dtype} {shape}, {size(row.bytes)}, into {row.op}")
    lines.append("what each pass could touch:")
    for name, reach in found.touchable.items():
        left = ", ".join(f"{reason} {count}" for reason, count in reach.left.items())
        lines.append(f"  {name:22s} {reach.weights} weights, {size(reach.bytes)}; left: {left or 'none'}")
    if found.provenance:
        lines.append(f"made by onnxcompress from {found.provenance['parent'][:16]} with {found.provenance['recipe']}")
    return lines


def _port(port: Port) -> str:
    if port.shape is None:
        return f"{port.name}: {port.type} of unknown shape"
    return f"{port.name}: {port.type} [{', '.join('?' if d is None else str(d) for d in port.shape)}]"
