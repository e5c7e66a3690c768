"""Run a model that is too large for memory: its tensors stay in files, and encoded weights are expanded into files.

ONNX Runtime (1.32) runs every node that depends on constants alone before all others, so that a model with encoded
weights, run as it stands, holds all of them expanded at the same time.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcompress.encodings import recognize
from onnxcompress.encodings.base import Encoding, Tape
from onnxcompress.encodings.dense import Dense
from onnxcompress.encodings.pieces import pieces
from onnxcompress.errors import ModelError
from onnxcompress.model import bridge, durable
from onnxcompress.model.limits import DEFAULT
from onnxcompress.model.save import choose, reference, referring, write_tensor
from onnxcompress.model.spill import file_of
from onnxcompress.model.weights import Weight, weights
from onnxcompress.runtime.session import Session, open_session

# Prepacking would copy every weight.
CONFIG = {"session.disable_prepacking": "1"}
LEAST_BYTES = 1 << 20  # an encoded weight smaller than this when expanded is left to the session
PIECE = 1 << 22  # elements expanded at once
_FROM_RUNTIME = ("float32", "float64", "float16")  # numpy arrays that a session puts out


@contextlib.contextmanager
def open_mapped(model: ir.Model, work: pathlib.Path, *, threads: int = 1) -> Iterator[Session]:
    """A session for `model`, without graph optimizations, weights memory-mapped from files in `work`.

    The model is first loaded as it stands. Then each encoded weight is expanded by ONNX Runtime, a piece at a time, and
    what runs has the expanded weights in their place. `work` needs free disk for all of them.

    Raises:
        ModelError: ONNX Runtime refuses the model.
        OSError: the disk is full.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mapped-", dir=work))
    try:
        session = _open(model, folder, threads)
        try:
            expanded = bridge.clone(model)
            if _expand(expanded, folder):
                session.close()
                session = _open(expanded, folder, threads)
            yield session
        finally:
            session.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open(model: ir.Model, folder: pathlib.Path, threads: int) -> Session:
    try:
        return _open_files(model, _Files(folder, link=True), threads)
    except ModelError as error:
        # ONNX Runtime 1.32 takes hard links in the main graph and refuses them as an attack in branches and loops.
        if "hard link" not in str(error.__cause__):
            raise
        return _open_files(model, _Files(folder, link=False), threads)


def _open_files(model: ir.Model, files: _Files, threads: int) -> Session:
    references = {id(slot.tensor): files.reference(slot) for slot in choose(model, DEFAULT)}
    path = files.folder / "model.onnx"
    path.write_bytes(referring(model, references))
    return open_session(path, threads=threads, optimize=False, config=CONFIG)


class _Files:
    """Data files in the folder of the model, outside of which ONNX Runtime reads none.

    `link`: hard links where possible, which cost neither time nor disk; else copies.
    """

    def __init__(self, folder: pathlib.Path, *, link: bool) -> None:
        self.folder = folder
        self._link = link
        self._linked: dict[str, str] = {}

    def reference(self, slot: bridge.Slot) -> ir.ExternalTensor:
        """What stands for the tensor of `slot`."""
        place = _file_of(slot.tensor)
        if place is not None and place[0].parent == self.folder:
            return reference(slot, place[0].name, place[1], self.folder)
        if place is not None and self._link:
            with contextlib.suppress(OSError):  # another file system, or one without links
                return reference(slot, self._linked_name(place[0]), place[1], self.folder)
        handle, name = tempfile.mkstemp(suffix=".data", dir=self.folder)
        with open(handle, "wb") as file:
            write_tensor(slot.tensor, durable.HashingWriter(file))
        return reference(slot, os.path.basename(name), 0, self.folder)

    def _linked_name(self, path: pathlib.Path) -> str:
        key = os.path.realpath(path)
        if key not in self._linked:
            name = f"{len(os.listdir(self.folder))}.link"
            os.link(key, self.folder / name)
            self._linked[key] = name
        return self._linked[key]


def _file_of(tensor: ir.TensorProtocol) -> tuple[pathlib.Path, int] | None:
    if isinstance(tensor, ir.ExternalTensor):
        return pathlib.Path(tensor.path), tensor.offset or 0
    held = tensor.raw if isinstance(tensor, ir.Tensor) and tensor.dtype.bitwidth >= 8 else None
    return file_of(held) if isinstance(held, np.ndarray) and sys.byteorder == "little" else None


def _expand(model: ir.Model, folder: pathlib.Path) -> bool:
    """Replace the encoded weights of `model` by dense ones in files of `folder`; False when there are none."""
    found = False
    for number, weight in enumerate(weights(model)):
        if not _is_expansion(weight):
            continue
        encoding = weight.encoding  # unpacked anew whenever it is asked for
        count = math.prod(encoding.shape) * encoding.dtype.itemsize
        if count < LEAST_BYTES:
            continue
        path = folder / f"{number}.expanded"
        with open(path, "wb") as file:
            for _, piece in pieces(encoding, PIECE):
                _run(model, piece).tofile(file)
        tensor = ir.ExternalTensor(
            path.name,
            0,
            count,
            ir.DataType.from_numpy(encoding.dtype),
            shape=ir.Shape(encoding.shape),
            name=weight.value.name or "",
            base_dir=os.fspath(folder),
        )
        weight.replace(Dense(tensor))
        found = True
    return found


def _is_expansion(weight: Weight) -> bool:
    """True for a weight that a node in a graph expands; a function has no initializers to put one into."""
    node = weight.value.producer()
    return (
        isinstance(weight.owner, ir.Graph)
        and weight.attribute is None
        and node is not None
        and recognize.parts(node) is not None
    )


def _run(model: ir.Model, piece: Encoding) -> np.ndarray:
    """What ONNX Runtime makes of the inference form of `piece` in the opset of `model`."""
    if piece.dtype.name not in _FROM_RUNTIME:
        return piece.decode()
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(model.opset_imports), name="piece")
    holder = ir.Model(graph, ir_version=model.ir_version)
    tape = Tape(holder, graph)
    value = piece.emit(tape, "w")
    tape.place()
    value.shape, value.type = ir.Shape(piece.shape), ir.TensorType(ir.DataType.from_numpy(piece.dtype))
    graph.outputs.append(value)
    with open_session(holder, optimize=False) as session:
        return np.ascontiguousarray(session.run({})["w"])
