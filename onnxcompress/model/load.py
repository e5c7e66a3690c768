"""Load a model safely: everything that is wrong with a file is said in one line before anything is allocated for it.

Loading never changes a model. Tensors in external data stay on disk, memory-mapped when they are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import os
import pathlib
import stat
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.model import bridge
from onnxcompress.model.check import External, check
from onnxcompress.model.limits import DEFAULT, Limits

SOURCE_KEY = "onnxcompress.source"
_CHUNK = 8 << 20
_HASH_AT_ONCE = 256 << 20  # a file this small is hashed while it is in memory anyway

Loadable = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model


@dataclasses.dataclass
class Source:
    """Where a model came from.

    `path`: its file, or None for bytes and protos. `bytes`: the file and its external data together. `files`: external
    data files by location, in the order of their names.
    """

    path: pathlib.Path | None
    bytes: int
    files: tuple[tuple[str, pathlib.Path], ...] = ()
    _seen: tuple[tuple[int, int, int], ...] = ()
    _digest: str = ""

    @property
    def external(self) -> bool:
        """True when the model keeps tensors outside its file."""
        return bool(self.files)

    @property
    def sha256(self) -> str:
        """Digest of the file and its external data, in hexadecimal; large files are read when it is first asked for.

        Without external data it is the sha256 of the file; with it, of the digests of the file and of each data file in
        the order of their names.

        Raises:
            ModelError: a file changed since the model was loaded.
        """
        if not self._digest:
            self._digest = self._compute()
        return self._digest

    def _compute(self) -> str:
        assert self.path is not None
        if _identity(self._paths()) != self._seen:
            raise ModelError(f"{self.path}: the file changed after it was loaded; load it again")
        digests = [_file_digest(path) for path in self._paths()]
        if len(digests) == 1:
            return digests[0].hex()
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def _paths(self) -> list[pathlib.Path]:
        assert self.path is not None
        return [self.path, *(path for _, path in self.files)]


def load(source: Loadable, *, limits: Limits = DEFAULT) -> ir.Model:
    """Load a model from a path, bytes, a ModelProto (which is left as it is) or an onnx-ir model (returned as it is).

    `model.meta["onnxcompress.source"]` holds its `Source`.

    Raises:
        ModelError: the file is missing, broken, hostile, or newer than the installed onnx.
    """
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return _from_message(source, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise ModelError("the model is empty (0 bytes)")
        proto = _parse(memoryview(source), "the model given as bytes", limits)
        found = Source(None, len(source), _digest=hashlib.sha256(source).hexdigest())
        return _build(proto, "the model given as bytes", None, found, limits)
    return _from_path(pathlib.Path(source), limits)


def source_of(model: ir.Model) -> Source | None:
    """The `Source` recorded by `load`, or None for a model made in memory."""
    found = model.meta.get(SOURCE_KEY)
    return found if isinstance(found, Source) else None


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The tensors of `model` that lie in external data."""
    for slot in bridge.slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            yield slot.tensor


def release(model: ir.Model) -> None:
    """Close the memory maps of `model`'s external tensors (they are mapped again when next read).

    Windows cannot replace a file that is mapped. Arrays taken from the tensors before keep the map open.
    """
    for tensor in external_tensors(model):
        with contextlib.suppress(BufferError):  # an array is still in use; on POSIX that does no harm
            tensor.release()


def _from_message(message: onnx.ModelProto, limits: Limits) -> ir.Model:
    label = "the model given as a ModelProto"
    proto = onnx.ModelProto()
    proto.CopyFrom(message)
    size = proto.ByteSize()
    if size > limits.proto_bytes:
        raise ModelError(
            f"{label}: {size:,} bytes do not fit a protobuf message; save it with external data, load it by path"
        )
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    return _build(proto, label, None, Source(None, size, _digest=digest), limits)


def _from_path(path: pathlib.Path, limits: Limits) -> ir.Model:
    size = _regular_size(path)
    if size > limits.proto_bytes:
        raise ModelError(
            f"{path}: {size:,} bytes in one file, more than protobuf reads ({limits.proto_bytes:,}): "
            "export it with external data"
        )
    digest = ""
    try:
        # Mapped, so that the file's bytes never count as this process's own memory beside the parsed message.
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            proto = _parse(view, str(path), limits)
            if size <= _HASH_AT_ONCE:
                digest = hashlib.sha256(view).hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = Source(path, size, _digest=digest)
    return _build(proto, str(path), path.parent, found, limits)


def _regular_size(path: pathlib.Path) -> int:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(found.st_mode):
        raise ModelError(f"{path}: is a folder; name the .onnx file in it")
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path}: is not a regular file")
    if not found.st_size:
        raise ModelError(f"{path}: is empty (0 bytes); copy or export it again")
    return found.st_size


def _parse(data: memoryview, label: str, limits: Limits) -> onnx.ModelProto:
    if len(data) > limits.proto_bytes:
        raise ModelError(f"{label}: {len(data):,} bytes are more than protobuf reads ({limits.proto_bytes:,})")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)  # any contiguous buffer will do
        return proto
    except Exception as error:  # google.protobuf.message.DecodeError, or its C++ twin
        head = bytes(data[:64])
        if head.startswith(b"version https://git-lfs"):
            raise ModelError(f"{label}: is a Git LFS pointer, not the model; run `git lfs pull`") from error
        text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
        what = "is text, not an ONNX model" if text else "is not an ONNX model, is cut off, or nests too deeply"
        raise ModelError(f"{label}: {what}; copy or export it again") from error


def _build(proto: onnx.ModelProto, label: str, folder: pathlib.Path | None, found: Source, limits: Limits) -> ir.Model:
    external = check(proto, label, folder, limits)
    _complete(found, external)
    model = bridge.from_proto(proto, label, folder if folder is not None else "")
    model.meta[SOURCE_KEY] = found
    return model


def _complete(found: Source, external: External) -> None:
    """Enter the external data, and what tells later that a file changed."""
    if external.files:
        found.files = tuple(sorted(external.files.items()))
        found.bytes += sum(external.sizes[location] for location in _distinct(external))
        found._digest = ""
    if found.path is not None:
        found._seen = _identity(found._paths())


def _distinct(external: External) -> list[str]:
    """One location for each file: './w.bin' and 'w.bin' are the same bytes."""
    seen: dict[str, str] = {}
    for location, path in sorted(external.files.items()):
        seen.setdefault(os.path.normpath(path), location)
    return list(seen.values())


def _identity(paths: list[pathlib.Path]) -> tuple[tuple[int, int, int], ...]:
    try:
        return tuple((found.st_ino, found.st_size, found.st_mtime_ns) for found in map(os.stat, paths))
    except OSError as error:
        raise ModelError(
            f"{error.filename}: {error.strerror}; the model's files must stay while it is in use"
        ) from error


def _file_digest(path: pathlib.Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()
