"""The work folder of a run: spilled tensors while it runs, and the model after a pass, from which it can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

from onnxcompress.errors import ModelError, SaveError
from onnxcompress.model import provenance
from onnxcompress.model.load import SOURCE_KEY, load, source_of
from onnxcompress.model.save import save
from onnxcompress.steps import StepReport

if TYPE_CHECKING:
    from onnxcompress.recipe import Recipe

_MODEL, _STATE = "after.onnx", "after.json"
_OWN = "state."  # what begins with it is a folder of one pass
_PASSING = (".spill", ".tmp")  # files without meaning once the process that wrote them is gone


class Workplace:
    """A folder `.<name of the output>.work` beside the output, or a temporary one.

    It holds spilled tensors, after a pass the model and what the passes so far reported, and what a long pass keeps of
    its own (`state`). A kill leaves it; `--resume` goes on from it if parent, recipe up to there, data, seed, target
    and versions are the same; any other run clears it.
    """

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any], temporary: bool = False) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self._temporary = temporary

    @staticmethod
    def folder_for(out: pathlib.Path) -> pathlib.Path:
        """Where the work folder of output `out` lies."""
        return out.parent / f".{out.name}.work"

    @property
    def resumable(self) -> bool:
        """True when there is something to resume from."""
        kept = (file for folder in self.folder.glob(f"{_OWN}*") for file in folder.iterdir())
        return (self.folder / _STATE).is_file() or any(file.suffix not in _PASSING for file in kept)

    def state_of(self, recipe: Recipe, index: int) -> pathlib.Path | None:
        """The folder that step `index` may keep its own state in, as an interrupted run of the same work left it."""
        key, *later = (self._key(recipe, count) for count in range(index + 1, len(recipe.steps) + 1))
        return self.state(key, later)

    def state(self, key: str, later: Sequence[str] = ()) -> pathlib.Path | None:
        """The folder for state of the work that `key` stands for; None where none stays.

        State of any other work goes, but for work that comes `later`: a run that kept no model on the way to it starts
        over, and will come there again.

        Raises:
            SaveError: it cannot be made.
        """
        if self._temporary:
            return None
        own, *waiting = (self.folder / f"{_OWN}{each[:16]}" for each in (key, *later))
        for other in self.folder.glob(f"{_OWN}*"):
            if other != own and other not in waiting:
                shutil.rmtree(other, ignore_errors=True)
        try:
            own.mkdir(exist_ok=True)
        except OSError as error:
            raise SaveError(f"{self.folder}: the work folder cannot be written: {error.strerror or error}") from error
        return own

    def keep(self, model: ir.Model, recipe: Recipe, steps: list[StepReport]) -> None:
        """Store the model after the last of `steps`, replacing what was stored before.

        Raises:
            SaveError: the folder cannot be written.
        """
        if self._temporary:
            return
        source = model.meta.get(SOURCE_KEY)
        try:
            (self.folder / _STATE).unlink(missing_ok=True)  # never a state beside another state's model
            save(model, self.folder / _MODEL, check=False)
            state = {
                "key": self._key(recipe, len(steps)),
                "model": self._model()[1],
                "steps": [step.to_json() for step in steps],
            }
            fresh = self.folder / f"{_STATE}.new"
            fresh.write_text(json.dumps(state), encoding="utf-8")
            os.replace(fresh, self.folder / _STATE)
        except OSError as error:
            raise SaveError(f"{self.folder}: the work folder cannot be written: {error.strerror or error}") from error
        finally:
            if source is not None:
                model.meta[SOURCE_KEY] = source

    def resume(self, recipe: Recipe) -> tuple[ir.Model, list[StepReport]] | None:
        """The stored model and reports, or None when nothing fits this run."""
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            steps = [StepReport.from_json(step) for step in state["steps"]]
            if state["key"] != self._key(recipe, len(steps)) or len(steps) > len(recipe.steps):
                return None
            model, digest = self._model()
            return (model, steps) if digest == state["model"] else None
        except (OSError, ValueError, KeyError, TypeError, ModelError):
            return None  # an unreadable state is no state: the run starts over

    def remove(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _model(self) -> tuple[ir.Model, str]:
        """The stored model and the digest of its files."""
        model = load(self.folder / _MODEL)
        source = source_of(model)
        assert source is not None
        return model, source.sha256

    def _key(self, recipe: Recipe, count: int) -> str:
        what = {
            **self.identity,
            "recipe": recipe.prefix_digest(count),
            "on_error": [step.on_error for step in recipe.steps[:count]],
            "versions": provenance.versions(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def workplace(out: pathlib.Path | None, identity: Mapping[str, Any], *, resume: bool = False) -> Iterator[Workplace]:
    """A `Workplace` for the duration of a `with` block; without `resume` it starts empty.

    It is removed when the block ends well, or when nothing in it could be resumed.

    Raises:
        SaveError: the folder cannot be made, or the output could never be written.
    """
    if out is not None and out.is_dir():
        raise SaveError(f"{out}: is a folder; name a file in it")
    if out is not None and not out.parent.is_dir():
        raise SaveError(f"{out}: the folder {out.parent} does not exist; create it")
    if out is None:
        place = Workplace(pathlib.Path(tempfile.mkdtemp(prefix="onnxcompress-")), identity, temporary=True)
    else:
        place = Workplace(Workplace.folder_for(out), identity)
    with contextlib.ExitStack() as held:
        if out is not None:
            held.callback(os.close, _hold(place.folder, out))
            found = list(place.folder.rglob("*") if resume else place.folder.iterdir())
            for stale in (path for path in found if not resume or path.suffix in _PASSING):
                if stale.is_dir() and not stale.is_symlink():
                    shutil.rmtree(stale, ignore_errors=True)
                else:
                    stale.unlink(missing_ok=True)
        try:
            yield place
        except BaseException:
            if not place.resumable:
                place.remove()
            raise
        place.remove()


def _hold(folder: pathlib.Path, out: pathlib.Path) -> int:
    """Make `folder` and lock it for this run; the open handle, with whose end, or the process's, the lock goes.

    Raises:
        SaveError: the folder cannot be made, or another run is at work in it.
    """
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise SaveError(f"{out.parent}: cannot be written: {error.strerror or error}") from error
        try:
            handle = os.open(folder if os.name == "posix" else os.devnull, os.O_RDONLY)
        except FileNotFoundError:  # a run that ended took it away in between
            continue
        if os.name != "posix":
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise SaveError(f"{out}: another run is writing it; wait for its end, or name another file") from None
        except FileNotFoundError:
            pass
        except OSError:  # a network file system without locks
            return handle
        os.close(handle)
