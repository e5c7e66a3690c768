"""Save a model so that a full disk or a kill at any moment leaves the old model whole or the new one whole.

External data goes first, under a name made of its content, so it never overwrites bytes that the model it replaces
still needs; the model file follows and is put in place by one rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError, SaveError
from onnxcompress.model import bridge, durable, valid
from onnxcompress.model.limits import DEFAULT, Limits
from onnxcompress.model.load import source_of

_LONGEST_NAME = 240  # of 255 bytes; temporary and data files beside it have names up to 14 longer


@dataclasses.dataclass(frozen=True)
class Saved:
    """What was written: the model file, the bytes of all files together, and the files (model first)."""

    path: pathlib.Path
    bytes: int
    files: tuple[pathlib.Path, ...]


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external: bool | None = None,
    check: bool = True,
    limits: Limits = DEFAULT,
) -> Saved:
    """Write `model` to `path`, atomically; read it back and compare before it replaces anything.

    Tensors are evaluated and written one at a time. `external`: keep tensors of 1 KiB and more in a data file beside
    the model (None: as the model was loaded, and always when it would not fit one protobuf message). `check`: run the
    checker of onnx on what was written. Same model, same file name: same bytes. A link at `path` is replaced, not
    followed. If the model's own tensors lie in data that this makes stale, they refer to the new data afterwards.

    Raises:
        SaveError: nothing could be written, or it did not read back; what stood at `path` is untouched.
    """
    target = pathlib.Path(path)
    refuse_bad_target(target, model)
    size = sum(slot.tensor.nbytes for slot in bridge.slots(model) if slot.tensor.dtype != ir.DataType.STRING)
    if external is None:
        source = source_of(model)
        external = (source is not None and source.external) or size > limits.inline_bytes
    if not external and size > limits.inline_bytes:
        raise SaveError(f"{target}: {size:,} bytes of tensors do not fit one file; save it with external data")
    try:
        old_data = _own_data(target)
        done = _save_external(model, target, check, limits) if external else _save_inline(model, target, check)
    except OSError as error:
        raise SaveError(
            f"{target}: cannot be written: {error.strerror or error}; what was there is untouched"
        ) from error
    _remove_stale(model, target, [name for name in old_data if name != done.data], done.references)
    return done.saved


def to_bytes(model: ir.Model, *, limits: Limits = DEFAULT) -> bytes:
    """The model as one protobuf message, external tensors read into it.

    Raises:
        ModelError: it does not fit (see `Limits.inline_bytes`).
    """
    size = sum(slot.tensor.nbytes for slot in bridge.slots(model) if slot.tensor.dtype != ir.DataType.STRING)
    if size > limits.inline_bytes:
        raise ModelError(f"{size:,} bytes of tensors do not fit one protobuf message; save the model to a file instead")
    return serialized(bridge.to_proto(model))


def serialized(proto: onnx.ModelProto) -> bytes:
    """The bytes of `proto`, the same in every process.

    Raises:
        ModelError: it does not fit one protobuf message.
    """
    try:
        data: bytes = proto.SerializeToString(deterministic=True)
        return data
    except Exception as error:  # protobuf's EncodeError: more than 2 GiB
        raise ModelError(
            f"the model cannot be serialized ({bridge.root_cause(error)}); save it with external data"
        ) from error


def refuse_bad_target(target: pathlib.Path, model: ir.Model) -> None:
    """Refuse, before any work, a place where `model` cannot be saved or must not be.

    Raises:
        SaveError: one line that says what is wrong with `target`.
    """
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise SaveError(f"{target.name[:40]}...: the name is too long; the longest is {_LONGEST_NAME} bytes")
    if valid.as_utf8(target) is None:
        raise SaveError(f"{os.fsencode(target)!r}: the name is not valid UTF-8, which onnx asks for")
    if target.is_dir():
        raise SaveError(f"{target}: is a folder; name a file in it")
    if not target.parent.is_dir():
        raise SaveError(f"{target}: the folder {target.parent} does not exist; create it")
    if durable.is_stream(target):
        raise SaveError(f"{target}: is not a regular file")
    source = source_of(model)
    for _, data in source.files if source is not None else ():
        if target.exists() and data.exists() and target.samefile(data):
            raise SaveError(f"{target}: holds the external data of {source.path if source else ''}; name another file")


@dataclasses.dataclass(frozen=True)
class _Written:
    saved: Saved
    data: str = ""
    references: Mapping[int, ir.ExternalTensor] = dataclasses.field(default_factory=dict)


def _save_inline(model: ir.Model, target: pathlib.Path, check: bool) -> _Written:
    data = serialized(bridge.to_proto(model))
    _write_model(data, target, check)
    return _Written(Saved(target, len(data), (target,)))


def _save_external(model: ir.Model, target: pathlib.Path, check: bool, limits: Limits) -> _Written:
    chosen = choose(model, limits)
    if not chosen:
        return _save_inline(model, target, check)
    with durable.temporary(target) as temporary:
        places, digest, length = _write_data(chosen, temporary, limits)
        if durable.file_digest(temporary) != digest:
            raise SaveError(f"{target}: the external data did not read back as written; check the disk")
        data = _data_name(target, digest)
        if data.exists():  # the same content, from an earlier save
            temporary.unlink()
        else:
            durable.replace(temporary, data)
    references = {
        id(slot.tensor): reference(slot, data.name, offset, target.parent)
        for slot, offset in zip(chosen, places, strict=True)
    }
    written = referring(model, references)
    _write_model(written, target, check)
    return _Written(Saved(target, len(written) + length, (target, data)), data.name, references)


def referring(model: ir.Model, references: Mapping[int, ir.ExternalTensor]) -> bytes:
    """The bytes of `model` with `references` in the place of tensors, by their id; all others lie in the message."""
    small = {
        id(slot.tensor): bridge.inlined(slot.tensor)
        for slot in bridge.slots(model)
        if isinstance(slot.tensor, ir.ExternalTensor) and id(slot.tensor) not in references
    }
    with bridge.swapped(model, {**references, **small}):
        return serialized(bridge.to_proto(model, keep_external=True))


def reference(slot: bridge.Slot, location: str, offset: int, folder: pathlib.Path) -> ir.ExternalTensor:
    """What stands for the tensor of `slot` when its bytes lie in `folder`/`location` from `offset` on."""
    tensor = slot.tensor
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or slot.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=os.fspath(folder),
    )


def choose(model: ir.Model, limits: Limits) -> list[bridge.Slot]:
    """Tensors for the data file, each once: large initializers, and large constants where they would not fit."""
    every = [slot for slot in bridge.slots(model) if slot.tensor.dtype != ir.DataType.STRING]
    large = [slot for slot in every if slot.tensor.nbytes >= limits.external_threshold]
    constants = sum(slot.tensor.nbytes for slot in large if not slot.initializer)
    if constants <= limits.inline_bytes // 2:
        large = [slot for slot in large if slot.initializer]
    # A sparse initializer keeps its own representation, which has no external form.
    large = [slot for slot in large if bridge.SPARSE_KEY not in slot.tensor.metadata_props]
    return list({id(slot.tensor): slot for slot in large}.values())


def _write_data(chosen: Sequence[bridge.Slot], path: pathlib.Path, limits: Limits) -> tuple[list[int], str, int]:
    offsets = []
    with durable.synced(path) as file:
        for slot in chosen:
            if slot.tensor.nbytes >= limits.align_threshold:
                file.write(b"\0" * (-file.length % limits.alignment))
            offsets.append(file.length)
            write_tensor(slot.tensor, file)
            wrote = file.length - offsets[-1]
            if wrote != slot.tensor.nbytes:
                raise ModelError(f"tensor {slot.name} declares {slot.tensor.nbytes:,} bytes and gave {wrote:,}")
    return offsets, file.hexdigest(), file.length


def write_tensor(tensor: ir.TensorProtocol, file: durable.HashingWriter) -> None:
    """Append the bytes of `tensor`, as external data has them."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.tofile(file)  # in pieces, never in memory as a whole
    elif tensor.dtype.bitwidth >= 8 and sys.byteorder == "little":
        # The array itself, evaluated here if it is lazy: `tobytes` would hold it twice.
        file.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    else:
        file.write(tensor.tobytes())


def _data_name(target: pathlib.Path, digest: str) -> pathlib.Path:
    """`OUT.onnx.<start of the sha256>.data`: the same bytes have the same name, other bytes never do."""
    for length in (8, 64):
        data = target.with_name(f"{target.name}.{digest[:length]}.data")
        if not data.exists() or durable.file_digest(data) == digest:
            return data
    raise SaveError(f"{target}: {data.name} exists with other content than its name says; remove it")


def _write_model(data: bytes, target: pathlib.Path, check: bool) -> None:
    with durable.temporary(target) as temporary:
        with durable.synced(temporary) as file:
            file.write(data)
        if durable.file_digest(temporary) != file.hexdigest():
            raise SaveError(f"{target}: the model did not read back as written; check the disk")
        if check:
            try:
                valid.check_file(temporary, data)
            except onnx.checker.ValidationError as error:
                said = " ".join(str(error).split())[:300]
                raise SaveError(f"{target}: the model is not valid and was not written: {said}") from error
        durable.replace(temporary, target)


# Data files of the model that was replaced ---------------------------------------------------------------------------


def _own_data(target: pathlib.Path) -> list[str]:
    """Data files beside `target` that an earlier `save` to it named and that it refers to."""
    if not target.is_file() or target.is_symlink():
        return []
    pattern = re.compile(re.escape(target.name) + r"\.(?:[0-9a-f]{8}|[0-9a-f]{64})\.data")
    names = [entry.name for entry in target.parent.iterdir() if pattern.fullmatch(entry.name)]
    return [name for name in names if _mentions(target, name)]


def _mentions(path: pathlib.Path, name: str) -> bool:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return mapped.find(name.encode()) >= 0
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


def _remove_stale(
    model: ir.Model, target: pathlib.Path, names: Sequence[str], references: Mapping[int, ir.ExternalTensor]
) -> None:
    """Remove data that only the replaced model used; a model beside it may be a copy that still needs the file."""
    for name in names:
        stale = target.with_name(name)
        if any(_mentions(other, name) for other in _models_beside(target)):
            continue
        for slot in bridge.slots(model):
            tensor = slot.tensor
            if isinstance(tensor, ir.ExternalTensor) and os.path.abspath(tensor.path) == os.path.abspath(stale):
                # A memory map outlives the name of its file.
                slot.put(references.get(id(tensor)) or ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name))
        with contextlib.suppress(OSError):
            stale.unlink()


def _models_beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    for entry in target.parent.iterdir():
        if entry.suffix in (".onnx", ".ort", ".pb") and entry.is_file():
            yield entry
