"""A command as its user meets it: wall time and peak anonymous memory of a child process and all it starts."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence

INTERVAL = 0.01  # seconds between two looks at the memory; shorter peaks are missed


@dataclasses.dataclass(frozen=True)
class Measured:
    """`seconds`: wall time. `cpu`: user and system seconds, which a busy machine changes little (0 on Windows).

    `peak`: largest sum of RssAnon over the process tree, bytes; None off Linux.
    """

    seconds: float
    cpu: float
    peak: int | None
    status: int
    out: str
    err: str


def measure(command: Sequence[str | os.PathLike[str]]) -> Measured:
    """Run `command` and watch it.

    RssAnon counts the memory a process has of its own; pages of mapped files, which the system takes back when it
    needs room, are not in it (they are in ru_maxrss).
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start, before = time.perf_counter(), os.times()
        child = subprocess.Popen([os.fspath(word) for word in command], stdout=out, stderr=err)
        peaks, stop = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(child.pid, peaks, stop), daemon=True)
        watcher.start()
        status = child.wait()
        seconds, after = time.perf_counter() - start, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        stop.set()
        watcher.join()
        out.seek(0)
        err.seek(0)
        return Measured(seconds, cpu, peaks[0] or None, status, out.read(), err.read())


def _watch(pid: int, peaks: list[int], stop: threading.Event) -> None:
    while not stop.wait(INTERVAL):
        peaks[0] = max(peaks[0], sum(_rss_anon(each) for each in _tree(pid)))


def _tree(pid: int) -> list[int]:
    found, queue = [], [pid]
    while queue:
        each = queue.pop()
        found.append(each)
        for task in pathlib.Path(f"/proc/{each}/task").glob("*/children"):
            try:
                queue.extend(int(word) for word in task.read_text(encoding="ascii").split())
            except OSError:  # it ended between two looks
                continue
    return found


def _rss_anon(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
