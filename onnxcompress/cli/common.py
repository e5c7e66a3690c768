"""What the commands share: options, data, reports, progress."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from onnxcompress.api import Compressed, DataOptions, compress
from onnxcompress.contract import Pass, Progress, Select, Silent
from onnxcompress.errors import DataError, OnnxCompressError
from onnxcompress.model import durable
from onnxcompress.steps import StepReport

F = TypeVar("F", bound=Callable[..., Any])

MODEL = click.Path(path_type=pathlib.Path)
TARGETS = click.Choice(["cpu", "cuda", "tensorrt", "portable"])


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, listed in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


common_options = stack(
    click.option("--json", "json_file", type=MODEL, metavar="FILE", help="write the full report here"),
    click.option("--seed", type=click.IntRange(min=0), help="for everything random  [default: 0]"),
    click.option(
        "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="the result does not depend on it"
    ),
    click.option("-q", "--quiet", is_flag=True, help="print errors alone"),
    click.option("-v", "--verbose", is_flag=True, help="print every weight that was touched or left"),
)

data_options = stack(
    click.option("--labels", metavar="KEY", help="array that holds the labels  [default: y]"),
    click.option("--map", "mapping", multiple=True, metavar="KEY=INPUT", help="array KEY feeds INPUT; may be repeated"),
    click.option("--preprocess", type=MODEL, metavar="FILE", help="YAML with transpose, scale, mean, std, dtype"),
    click.option("--batch", type=click.IntRange(min=1), help="samples a call"),
    click.option("--limit", type=click.IntRange(min=1), help="use at most so many samples"),
)

select_options = stack(
    click.option(
        "--include", multiple=True, metavar="PATTERN", help="only weights whose name, node or operator matches"
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="no weights whose name, node or operator matches"),
)

out_option = click.option("-o", "--out", type=MODEL, required=True, metavar="OUT", help="where to save the result")


def reading(
    labels: str | None, mapping: Sequence[str], preprocess: pathlib.Path | None, batch: int | None, limit: int | None
) -> DataOptions:
    """The options of `data_options` as one value.

    Raises:
        DataError: a `--map` is not KEY=INPUT.
    """
    from onnxcompress.data.preprocess import Preprocess

    pairs: dict[str, str] = {}
    for entry in mapping:
        key, sign, name = entry.partition("=")
        if not (sign and key and name):
            raise DataError(f"--map {entry}: write KEY=INPUT")
        pairs[key] = name
    loaded = Preprocess.load(preprocess) if preprocess is not None else None
    return DataOptions(labels, pairs or None, loaded, batch, limit)


def select_of(include: Sequence[str], exclude: Sequence[str]) -> Select:
    """`--include` and `--exclude` as the recipe's `select`."""
    return Select(tuple(include), tuple(exclude))


@dataclasses.dataclass
class Report:
    """Where a command's findings go: the terminal and `--json`."""

    json_file: pathlib.Path | None
    quiet: bool
    verbose: bool

    def say(self, text: str) -> None:
        """One line for people."""
        if not self.quiet:
            click.echo(text)

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


def size(count: int) -> str:
    """Bytes for people (kB = 1000 bytes)."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def single_pass(model: pathlib.Path, out: pathlib.Path, chosen: Pass, report: Report, **options: Any) -> int:
    """Run one pass; when it can touch nothing, nothing is written and the reason is the error."""
    return finish(run_compress(model, [chosen], report, out=out, refuse_nothing=True, **options), report)


def run_compress(model: pathlib.Path, recipe: Any, report: Report, *, out: pathlib.Path, **options: Any) -> Compressed:
    """`compress` with progress and one report a step; says how to go on when it is interrupted."""
    from onnxcompress.resume import Workplace

    report.check(model, out)
    keep_inputs(report, out, options.get("calibration"), options.get("evaluate"))
    shown = progress(report.quiet)
    try:
        return compress(model, recipe, out=out, progress=shown, on_step=report.step, **options)
    except KeyboardInterrupt:
        state = Workplace(Workplace.folder_for(out), {})
        hint = "; the same command with --resume goes on from the last pass" if state.resumable else ""
        click.echo(f"interrupted, nothing was written{hint}", err=True)
        sys.exit(130)
    finally:
        shown.done()


def keep_inputs(report: Report, out: pathlib.Path | None, *given: str | pathlib.Path | None) -> None:
    """Refuse to write over a recipe or data that the command reads."""
    read = [pathlib.Path(path) for path in given if path is not None and os.path.isfile(path)]
    for option, written in (("--out", out), ("--json", report.json_file)):
        if written is not None and written.exists() and any(written.samefile(path) for path in read):
            raise OnnxCompressError(f"{written}: is also the recipe or data of this command; name another for {option}")


def finish(done: Compressed, report: Report) -> int:
    """Print and write what came out; the exit status."""
    if done.saved is not None:
        report.say(f"{done.saved.path}: {size(done.bytes_before)} -> {size(done.bytes_after)} (x{done.ratio:.3f})")
    report.write(done.to_json())
    if done.result is None:
        return 0
    if not report.quiet:
        import rich.console

        done.result.to_table(rich.console.Console())
    return 0 if done.result.passed else 1


def progress(quiet: bool) -> Progress:
    """A bar with an ETA on a terminal, plain lines in a log, nothing when quiet."""
    if quiet:
        return Silent()
    return _Bar() if sys.stderr.isatty() else _Lines()


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Lines:
    """A line every ten seconds, so that a log shows that work goes on."""

    EVERY = 10.0

    def start(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()

    def step(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= self.EVERY and self._total:
            self._said = now
            left = (now - self._began) / max(1, self._done) * (self._total - self._done)
            click.echo(f"{self._what}: {self._done} of {self._total}, about {left:.0f} s left", err=True)

    def done(self) -> None: ...


class _Bar:
    """A rich progress bar on stderr."""

    _bar: Any = None

    def start(self, what: str, total: int) -> None:
        import rich.console
        import rich.progress

        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self.done()
        self._bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True)
        self._task = self._bar.add_task(what, total=total)
        self._bar.start()

    def step(self, count: int = 1) -> None:
        self._bar.advance(self._task, count)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()
