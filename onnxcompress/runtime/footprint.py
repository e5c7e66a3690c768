"""What opening a model costs: seconds until it can run, and memory, each in a process of its own.

This process has imported, loaded and freed much before; only a fresh one shows what a deployment will see.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcompress.errors import DataError, ModelError, OnnxCompressError
from onnxcompress.runtime.memory import PeakRssAnon
from onnxcompress.runtime.session import open_session


@dataclasses.dataclass(frozen=True)
class Footprint:
    """One model in a fresh process.

    `load`: seconds from the file, which the system may hold in its cache, to a session; median of `starts` processes.
    `first`: seconds of the first run, the same way. `peak`: bytes of anonymous memory (RssAnon) above what the process
    had before it opened the model, at most at any moment from then to the end of the second run; mapped files are not
    in it. `held`: the same after the second run. None where the system does not tell (not Linux).
    """

    load: float
    first: float
    peak: int | None
    held: int | None
    starts: int


def footprint(
    model: str | os.PathLike[str],
    feeds: Mapping[str, Any],
    *,
    provider: str = "cpu",
    threads: int = 1,
    starts: int = 1,
    provider_options: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> Footprint:
    """Open the file `model` and run it twice on `feeds` (arrays), in each of `starts` new processes.

    Raises:
        ModelError: it cannot be opened or run there, or took longer than `timeout` seconds.
        DataError: a feed is no array.
    """
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        data = pathlib.Path(folder) / "feeds.npz"
        arrays: dict[str, Any] = {f"i{i}": _plain(name, value) for i, (name, value) in enumerate(feeds.items())}
        np.savez(data, **arrays)
        job = {
            "model": os.fspath(model),
            "feeds": os.fspath(data),
            "names": list(feeds),
            "provider": provider,
            "threads": threads,
            "options": dict(provider_options or {}),
        }
        found = [_child(job, timeout) for _ in range(starts)]
    peaks = [entry["peak"] for entry in found if entry["peak"] is not None]
    held = [entry["held"] for entry in found if entry["held"] is not None]
    return Footprint(
        load=float(np.median([entry["load"] for entry in found])),
        first=float(np.median([entry["first"] for entry in found])),
        peak=max(peaks, default=None),
        held=max(held, default=None),
        starts=starts,
    )


def _plain(name: str, value: Any) -> np.ndarray:
    """An array that a file takes without pickle: strings in numpy's own type."""
    if not isinstance(value, np.ndarray):
        raise DataError(f"input {name!r}: its feed is a {type(value).__name__} and no array")
    return value.astype(str) if value.dtype.kind == "O" else value


def _child(job: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "onnxcompress.runtime.footprint"]
    text = json.dumps(job)
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{job['model']}: opening and running it twice took more than {timeout:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"{job['model']}: opening and running it in a new process failed: {said}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise ModelError(f"in a process of its own: {found['error']}")
    return found


def _measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the child does."""
    with np.load(job["feeds"], allow_pickle=False) as loaded:
        arrays = [loaded[f"i{index}"] for index in range(len(job["names"]))]
    feeds = {
        name: array.astype(object) if array.dtype.kind == "U" else array
        for name, array in zip(job["names"], arrays, strict=True)
    }
    _import_runtime()
    with PeakRssAnon(interval=0.002) as memory:
        start = time.perf_counter()
        session = open_session(
            job["model"],
            provider=job["provider"],
            threads=job["threads"],
            provider_options=job["options"] or None,
        )
        opened = time.perf_counter()
        session.run(feeds)
        first = time.perf_counter()
        session.run(feeds)
    held = None if memory.after is None or memory.before is None else memory.after - memory.before
    return {"load": opened - start, "first": first - opened, "peak": memory.growth, "held": held}


def _import_runtime() -> None:
    """So that neither the time nor the memory of the import counts."""
    from onnxcompress.runtime.session import onnxruntime

    onnxruntime()


if __name__ == "__main__":
    try:
        result = _measure(json.loads(sys.stdin.read()))
    except OnnxCompressError as refusal:
        result = {"error": str(refusal)}
    print(json.dumps(result))
