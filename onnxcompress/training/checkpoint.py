"""Where an interrupted training goes on: everything a step depends on, in one file that is replaced as a whole."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from onnxcompress.errors import SaveError
from onnxcompress.model import durable

_HEADER = "header"
FILE = "training.npz"


@dataclasses.dataclass
class Checkpoint:
    """`step`: updates done. `state`: parameters and optimizer state by input name. `best`: the parameters of the best
    epoch so far, with its `score`. `history`: one entry a finished epoch. `sums`: loss and count of the epoch begun."""

    step: int
    state: dict[str, np.ndarray]
    best: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    score: float | None = None
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    sums: tuple[float, int] = (0.0, 0)


class Checkpoints:
    """The checkpoint in `folder` of the training that `identity` describes; without a folder nothing is kept."""

    def __init__(self, folder: pathlib.Path | None, identity: str) -> None:
        self._folder, self._identity = folder, identity

    @property
    def path(self) -> pathlib.Path | None:
        """Where it lies."""
        return None if self._folder is None else self._folder / FILE

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace what was kept.

        Raises:
            SaveError: the folder cannot be written.
        """
        if self.path is None:
            return
        header = {
            "identity": self._identity,
            "step": checkpoint.step,
            "score": checkpoint.score,
            "history": checkpoint.history,
            "sums": checkpoint.sums,
        }
        arrays = {f"state:{name}": array for name, array in checkpoint.state.items()}
        arrays |= {f"best:{name}": array for name, array in checkpoint.best.items()}
        try:
            with durable.temporary(self.path) as temporary:
                with durable.synced(temporary) as file:
                    _write(file, {_HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays})
                durable.replace(temporary, self.path)
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    @property
    def foreign(self) -> bool:
        """True when there is a checkpoint, but one that this training cannot go on from."""
        return self.path is not None and self.path.exists() and self.load() is None

    def load(self) -> Checkpoint | None:
        """The checkpoint of this very training, or None."""
        if self.path is None:
            return None
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                header = json.loads(stored[_HEADER].tobytes())
                if header["identity"] != self._identity:
                    return None
                arrays = {name: stored[name] for name in stored.files if name != _HEADER}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # none, or an unreadable one: the training starts over
        return Checkpoint(
            step=header["step"],
            state={n.removeprefix("state:"): a for n, a in arrays.items() if n.startswith("state:")},
            best={n.removeprefix("best:"): a for n, a in arrays.items() if n.startswith("best:")},
            score=header["score"],
            history=header["history"],
            sums=(header["sums"][0], header["sums"][1]),
        )

    def remove(self) -> None:
        """Take it away."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _write(file: durable.HashingWriter, arrays: Mapping[str, np.ndarray]) -> None:
    """An uncompressed .npz, one member after the other (numpy's own wants a file it can seek in)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array, order="C"), allow_pickle=False)
    file.write(buffer.getbuffer())
