"""How far a command is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from onnxcompress.contract import Progress, Silent


def progress(quiet: bool) -> Progress:
    """A bar with an ETA on a terminal, plain lines in a log, nothing when quiet."""
    if quiet or sys.stderr is None:  # closed by the caller
        return Silent()
    return _Bar() if sys.stderr.isatty() else _Lines()


class _Lines:
    """A line every ten seconds, so that a log shows that work goes on."""

    EVERY = 10.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._done, self._before = what, total, done, done
        self._began = self._said = time.monotonic()

    def step(self, count: int = 1, now: str = "") -> None:
        self._done += count
        at = time.monotonic()
        if at - self._said >= self.EVERY and self._total:
            self._said = at
            left = (at - self._began) / max(1, self._done - self._before) * (self._total - self._done)
            figures = f"{now}, " if now else ""
            click.echo(f"{self._what}: {self._done} of {self._total}, {figures}about {left:.0f} s left", err=True)

    def done(self) -> None: ...


class _Bar:
    """A rich progress bar on stderr."""

    _bar: Any = None

    def start(self, what: str, total: int, done: int = 0) -> None:
        import rich.console
        import rich.progress

        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[now]}"),
        )
        self.done()
        self._bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True)
        self._task = self._bar.add_task(what, total=total, completed=done, now="")
        self._bar.start()

    def step(self, count: int = 1, now: str = "") -> None:
        self._bar.update(self._task, advance=count, now=now)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()
