"""How much memory is this process's own: RssAnon, without the mapped file pages that ru_maxrss counts."""

from __future__ import annotations

import threading
import types


def rss_anon() -> int | None:
    """Anonymous resident memory of this process in bytes; None where the system does not tell (not Linux)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


class PeakRssAnon:
    """Samples `rss_anon` in a thread while its `with` block runs.

    `before`, `peak` and `after` in bytes (None off Linux); `growth`: from `before` to `peak`. Peaks shorter than
    `interval` seconds can be missed.
    """

    def __init__(self, interval: float = 0.01) -> None:
        self._interval = interval
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.before: int | None = None
        self.peak: int | None = None
        self.after: int | None = None

    @property
    def growth(self) -> int | None:
        """Bytes above the start."""
        if self.peak is None or self.before is None:
            return None
        return self.peak - self.before

    def _sample(self) -> int | None:
        now = rss_anon()
        if now is not None:
            self.peak = max(self.peak or 0, now)
        return now

    def _loop(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def __enter__(self) -> PeakRssAnon:
        self.before = self.peak = rss_anon()
        if self.before is not None:
            self._thread = threading.Thread(target=self._loop, name="peak-rss-anon", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.after = self._sample()
