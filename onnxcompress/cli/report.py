"""Where a command's findings go: the terminal and `--json`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.errors import OnnxCompressError
from onnxcompress.model import durable
from onnxcompress.steps import StepReport

if TYPE_CHECKING:
    from onnxcompress.validation.result import Result


@dataclasses.dataclass
class Report:
    """Where a command's findings go: the terminal and `--json`."""

    json_file: pathlib.Path | None
    quiet: bool
    verbose: bool

    def say(self, text: str) -> None:
        """One line for people."""
        if self.quiet:
            return
        try:
            click.echo(text)
        except BrokenPipeError:  # a pager that was left, `head`: no reason to throw the work away
            self._mute()

    def table(self, result: Result) -> None:
        """The verdict of a validation for people."""
        if self.quiet:
            return
        import rich.console

        try:
            result.to_table(rich.console.Console())
        except (BrokenPipeError, SystemExit):  # rich ends the program where nobody reads
            self._mute()

    def _mute(self) -> None:
        """Say no more; what Python flushes at its end goes nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def write(self, content: dict[str, Any]) -> None:
        """The JSON report, if one was asked for."""
        if self.json_file is None:
            return
        text = json.dumps(plain(content), indent=1, allow_nan=False) + "\n"
        try:
            if durable.is_stream(self.json_file):
                with open(self.json_file, "a", encoding="utf-8") as stream:
                    stream.write(text)
                return
            with durable.temporary(self.json_file) as temporary:
                with durable.synced(temporary) as file:
                    file.write(text.encode())
                durable.replace(temporary, self.json_file)
        except OSError as error:
            raise OnnxCompressError(f"{self.json_file}: cannot be written: {error.strerror or error}") from error

    def check(self, *others: pathlib.Path) -> None:
        """Refuse a `--json` that cannot be written, or is one of the command's `others`, before the work."""
        if self.json_file is None:
            return
        if self.json_file.is_dir():
            raise OnnxCompressError(f"{self.json_file}: is a folder; name a file in it")
        if not self.json_file.parent.is_dir():
            raise OnnxCompressError(f"{self.json_file}: the folder {self.json_file.parent} does not exist; create it")
        if durable.is_stream(self.json_file):
            return
        if not os.access(self.json_file.parent, os.W_OK):
            raise OnnxCompressError(f"{self.json_file}: the folder {self.json_file.parent} cannot be written")
        if self.json_file.resolve() in [other.resolve() for other in others]:
            raise OnnxCompressError(f"{self.json_file}: is also a model of this command; name another file for --json")

    def step(self, step: StepReport) -> None:
        """What one pass did."""
        touched, left = step.coverage.touched, step.coverage.left
        sizes = f"{size(step.bytes_before)} -> {size(step.bytes_after)}"
        self.say(f"{step.name}{' (resumed)' if step.resumed else ''}: {sizes}, {step.seconds:.1f} s")
        if step.skipped:
            self.say(f"  undone: {step.skipped}")
            return
        if step.coverage.rewrites:
            done = ", ".join(f"{name} {count}" for name, count in step.coverage.rewrites.items() if count)
            self.say(f"  rewrites: {done or 'none'}")
        if touched:
            before, after = sum(t.bytes_before for t in touched), sum(t.bytes_after for t in touched)
            self.say(f"  touched {len(touched)} weights: {size(before)} -> {size(after)}")
        if left:
            self.say(f"  left {len(left)} weights, {size(sum(x.bytes for x in left))}: {_reasons(step)}")
        self.say(f"  {_proof(step)}") if step.proof else None
        for warning in step.coverage.warnings:
            self.say(f"  note: {warning}")
        if self.verbose:
            for t in touched:
                self.say(
                    f"    {t.key}: {size(t.bytes_before)} -> {size(t.bytes_after)}, error {t.error:.3f} {t.detail}"
                )
            for x in left:
                self.say(f"    {x.key}: left, {size(x.bytes)}: {x.reason.value} {x.detail}")


def _reasons(step: StepReport) -> str:
    counted: dict[str, int] = {}
    for entry in step.coverage.left:
        counted[entry.reason.value] = counted.get(entry.reason.value, 0) + 1
    return ", ".join(f"{name} {count}" for name, count in sorted(counted.items(), key=lambda item: -item[1]))


def _proof(step: StepReport) -> str:
    assert step.proof is not None
    words = []
    if step.score is not None:
        before = f"{step.score_before:.4f} -> " if step.score_before is not None else ""
        words.append(f"score {before}{step.score:.4f}")
    if step.proof.cosine is not None:
        words.append(f"cosine of the outputs {step.proof.cosine:.5f}")
    if step.proof.top1 is not None:
        words.append(f"same top-1 {step.proof.top1:.0%}")
    if step.proof.latency_ratio is not None:
        words.append(f"{step.proof.latency_ratio:.2f} x as fast")
    inputs = "on your data" if step.proof.inputs == "data" else "on made-up inputs"
    return f"checked, loaded and run {inputs}: " + ", ".join(words)


def many(count: int, thing: str) -> str:
    """A count and what is counted, in the plural where there is not one."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Bytes for people (kB = 1000 bytes)."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
