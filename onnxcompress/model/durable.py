"""Replace a file as a whole or not at all: a temporary beside it, fsync, verify, `os.replace`, fsync the folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator
from typing import IO

_CHUNK = 8 << 20


class HashingWriter:
    """A file that hashes what is written. It has no `fileno`: no tensor can copy past the hash inside the kernel."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, in pieces."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            self._file.write(piece)
            self._digest.update(piece)
        self.length += len(view)
        return len(view)

    def hexdigest(self) -> str:
        """The sha256 of everything written so far."""
        return self._digest.hexdigest()


@contextlib.contextmanager
def temporary(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new empty file beside `target`, removed at the end unless it was renamed away.

    The name is hidden and does not end in .onnx: nothing takes what a killed process leaves behind for a model.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    path = pathlib.Path(name)
    try:
        os.chmod(path, _mode(target))
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


@contextlib.contextmanager
def synced(path: pathlib.Path) -> Iterator[HashingWriter]:
    """Write `path`; it is on the disk when the block ends."""
    with open(path, "wb") as file:
        writer = HashingWriter(file)
        yield writer
        file.flush()
        os.fsync(file.fileno())


def file_digest(path: pathlib.Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def content_digest(path: pathlib.Path) -> str:
    """The sha256 of a file, or of a folder's files and their names; of `file.py:function`, of the file.

    A path where nothing is counts by its name.
    """
    if not path.exists() and ":" in path.name:
        path = path.with_name(path.name.rpartition(":")[0])
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        found = file.stat() if file.is_file() else None
        content = _digest_of(file, found.st_size, found.st_mtime_ns) if found is not None else str(file)
        digest.update(f"{file.relative_to(path)}\0{content}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _digest_of(path: pathlib.Path, size: int, changed: int) -> str:
    return file_digest(path)


def is_stream(path: pathlib.Path) -> bool:
    """True for a pipe or a device, or a link to whatever a process has open there, as /dev/stdout is.

    Nothing may be renamed to such a path: it would take the place of /dev/null for every program on the machine.
    """
    if path.is_symlink() and os.readlink(path).startswith(("/proc/", "/dev/")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def replace(temporary_file: pathlib.Path, target: pathlib.Path) -> None:
    """Put a finished temporary in the place of `target`, durably."""
    os.replace(temporary_file, target)
    sync_folder(target.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Make a rename in `folder` survive a power cut (not possible, and not needed, on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot sync a folder
        pass
    finally:
        os.close(handle)


def _mode(target: pathlib.Path) -> int:
    """The permissions of the file that is replaced, else what a new file would get (mkstemp's are private)."""
    try:
        return stat.S_IMODE(os.stat(target).st_mode)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
