"""Where an interrupted training goes on: everything a step depends on, in one file that is replaced as a whole."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcompress.errors import SaveError
from onnxcompress.model import durable

_HEADER = "header"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
FILE = "training.npz"


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one epoch of `planned` did, counted from 1. `loss`: the mean over its updates.

    `score`: of the model after it, where there is something to evaluate it on.
    """

    number: int
    loss: float
    seconds: float
    score: float | None = None
    planned: int = 0


@dataclasses.dataclass
class Checkpoint:
    """`step`: updates done. `state`: parameters and optimizer state by input name. `history`: the finished epochs.
    `best`: the parameters of the best of them, `kept` its number (0: none is kept). `sums`: loss, updates and seconds
    of the epoch begun."""

    step: int
    state: dict[str, np.ndarray]
    best: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    kept: int = 0
    history: list[Epoch] = dataclasses.field(default_factory=list)
    sums: tuple[float, int, float] = (0.0, 0, 0.0)


class Checkpoints:
    """The checkpoint in `folder` of the training that `identity` describes; without a folder nothing is kept.

    `pace`: settings that may differ from those it was kept with.
    """

    def __init__(
        self, folder: pathlib.Path | None, identity: str, pace: Mapping[str, float | None] | None = None
    ) -> None:
        self._folder, self._identity, self._pace = folder, identity, dict(pace or {})

    @property
    def path(self) -> pathlib.Path | None:
        """Where it lies."""
        return None if self._folder is None else self._folder / FILE

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace what was kept. Arrays go to the file one after the other, none is held a second time.

        Raises:
            SaveError: the folder cannot be written.
        """
        if self.path is None:
            return
        header = {
            "identity": self._identity,
            "pace": self._pace,
            "step": checkpoint.step,
            "kept": checkpoint.kept,
            "history": [dataclasses.asdict(epoch) for epoch in checkpoint.history],
            "sums": checkpoint.sums,
        }
        arrays = {_HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8)}
        arrays |= {f"state:{name}": array for name, array in checkpoint.state.items()}
        arrays |= {f"best:{name}": array for name, array in checkpoint.best.items()}
        try:
            with durable.temporary(self.path) as temporary:
                with open(temporary, "wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]  # its options have other names
                    file.flush()
                    os.fsync(file.fileno())
                durable.replace(temporary, self.path)
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    @property
    def foreign(self) -> bool:
        """True when there is a checkpoint, but one that this training cannot go on from."""
        header = self._header()
        return self.path is not None and self.path.exists() and (header is None or header["identity"] != self._identity)

    @property
    def changed(self) -> dict[str, tuple[float | None, float | None]]:
        """Of the pace what differs: name -> (as it was kept, as it is now)."""
        kept = (self._header() or {}).get("pace", {})
        return {name: (kept[name], now) for name, now in self._pace.items() if name in kept and kept[name] != now}

    def load(self) -> Checkpoint | None:
        """The checkpoint of this very training, or None."""
        header = self._header()
        if header is None or self.path is None or header["identity"] != self._identity:
            return None
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files if name != _HEADER}
            loss, updates, seconds = header["sums"]
            return Checkpoint(
                step=header["step"],
                state={n.removeprefix("state:"): a for n, a in arrays.items() if n.startswith("state:")},
                best={n.removeprefix("best:"): a for n, a in arrays.items() if n.startswith("best:")},
                kept=header["kept"],
                history=[Epoch(**epoch) for epoch in header["history"]],
                sums=(loss, updates, seconds),
            )
        except _UNREADABLE:
            return None

    def _header(self) -> dict[str, Any] | None:
        """All but the arrays; None where there is no checkpoint, or an unreadable one: the training starts over."""
        if self.path is None:
            return None
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                header = json.loads(stored[_HEADER].tobytes())
            return header if isinstance(header, dict) and "identity" in header else None
        except _UNREADABLE:
            return None

    def remove(self) -> None:
        """Take it away."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
