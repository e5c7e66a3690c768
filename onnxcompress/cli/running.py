"""Running what a command asks for: refusals before the work, progress, the report, the exit status."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from onnxcompress.api import Compressed, compress
from onnxcompress.cli import options
from onnxcompress.cli.progress import progress
from onnxcompress.cli.report import Report, size
from onnxcompress.contract import Pass
from onnxcompress.errors import OnnxCompressError
from onnxcompress.model.load import load, source_of
from onnxcompress.resume import Workplace

_TABLES = (".npy", ".npz")
_CONDITIONS = ("data", "evaluate", "metric", "provider", "threads", "resume", "init")  # of a training


def single_pass(model: pathlib.Path, out: pathlib.Path, chosen: Pass, report: Report, **given: Any) -> int:
    """Run one pass; when it can touch nothing, nothing is written and the reason is the error."""
    return finish(run_compress(model, [chosen], report, out=out, refuse_nothing=True, **given), report)


def run_compress(model: pathlib.Path, recipe: Any, report: Report, *, out: pathlib.Path, **given: Any) -> Compressed:
    """`compress` with progress and one report a step; says how to go on when it is interrupted."""
    report.check(model, out)
    keep_inputs(report, out, given.get("calibration"), given.get("evaluate"), models=[model])
    shown = progress(report.quiet)
    try:
        with _ended_like_an_interrupt():
            return compress(model, recipe, out=out, progress=shown, on_step=report.step, **given)
    except KeyboardInterrupt:
        shown.done()
        interrupted(out, "from the last pass, or within a training from its last epoch")
    finally:
        shown.done()


def run_training(
    teacher: pathlib.Path | None,
    student: pathlib.Path,
    out: pathlib.Path,
    *,
    json_file: pathlib.Path | None,
    quiet: bool,
    verbose: bool,
    labels: str | None,
    mapping: tuple[str, ...],
    preprocess: pathlib.Path | None,
    limit: int | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    **given: Any,
) -> int:
    """The options of `training_options` as one training, from file to file; the exit status."""
    from onnxcompress.healing import train
    from onnxcompress.training.words import chosen

    report = Report(json_file, quiet, verbose)
    models = [student] if teacher is None else [student, teacher]
    report.check(*models, out)
    keep_inputs(report, out, given["data"], given["evaluate"], preprocess, models=models)
    if teacher is not None and out.exists() and teacher.exists() and out.samefile(teacher) and teacher != student:
        raise OnnxCompressError(f"{out}: is the teacher; name another file for --out")
    select = options.select_of(include, exclude)
    settings, objective = chosen({**given, "seed": given["seed"] or 0, "select": select})
    shown = progress(quiet)
    try:
        with _ended_like_an_interrupt():
            done = train(
                teacher,
                student,
                out,
                reading=options.reading(labels, mapping, preprocess, limit),
                settings=settings,
                objective=objective,
                progress=shown,
                say=report.say,
                **{name: given[name] for name in _CONDITIONS if name in given},
            )
    except KeyboardInterrupt:
        shown.done()
        interrupted(out, "from the last epoch")
    finally:
        shown.done()
    if verbose:
        for entry in done["touched"]:
            report.say(f"    {entry['weight']}: changed by {entry['change']:.3f}")
        for entry in done["left"]:
            report.say(f"    {entry['weight']}: left: {entry['reason']}")
    report.write(done)
    return 0


@contextlib.contextmanager
def _ended_like_an_interrupt() -> Iterator[None]:
    """Within it SIGTERM, which a scheduler sends, ends the work as Ctrl-C does: tidily, and with a word on resuming."""
    if threading.current_thread() is not threading.main_thread():  # the handler is another's to set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(out: pathlib.Path, whence: str) -> NoReturn:
    """Say what is left after an interrupt, and end with status 130."""
    state = Workplace(Workplace.folder_for(out), {})
    hint = f"; the same command with --resume goes on {whence}" if state.resumable else ""
    click.echo(f"interrupted, nothing was written{hint}", err=True)
    sys.exit(130)


def keep_inputs(
    report: Report,
    out: pathlib.Path | None,
    *given: str | pathlib.Path | None,
    models: list[pathlib.Path] | None = None,
) -> None:
    """Refuse to write over a recipe, data or external data that the command reads. `given`: recipes and data."""
    for option, written in (("--out", out), ("--json", report.json_file)):
        if written is None or not written.is_file():
            continue
        for path in (pathlib.Path(path) for path in given if path is not None):
            inside = written.suffix in _TABLES and path.is_dir() and written.resolve().parent == path.resolve()
            if inside or (os.path.isfile(path) and written.samefile(path)):
                raise OnnxCompressError(
                    f"{written}: is also the recipe or data of this command; name another for {option}"
                )
    if report.json_file is None or not report.json_file.is_file():
        return
    for model in models or []:
        source = source_of(load(model))
        for _, data in source.files if source is not None else ():
            if report.json_file.samefile(data):
                raise OnnxCompressError(f"{report.json_file}: holds weights of {model}; name another for --json")


def finish(done: Compressed, report: Report) -> int:
    """Print and write what came out; the exit status."""
    if done.saved is not None:
        report.say(f"{done.saved.path}: {size(done.bytes_before)} -> {size(done.bytes_after)} (x{done.ratio:.3f})")
    report.write(done.to_json())
    if done.result is None:
        return 0
    report.table(done.result)
    return 0 if done.result.passed else 1
