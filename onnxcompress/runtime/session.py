"""The only place that opens an onnxruntime session.

ONNX Runtime falls back to the CPU silently when a provider cannot start, and may do so again in the middle of a run:
both are switched off here, and a session that did not get its provider is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcompress.errors import DataError, ModelError, OnnxCompressError, RuntimeUnavailable
from onnxcompress.model.limits import DEFAULT
from onnxcompress.runtime import obstacles, plugins, providers

if TYPE_CHECKING:
    import onnx_ir as ir

# Builds that all install the same module `onnxruntime`: with two of them, the files are a mixture of both.
_BUILDS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-silicon",
    "onnxruntime-training",
    "onnxruntime-training-cpu",
    "onnxruntime-webgpu",
    "onnxruntime-windowsml",
    "onnxruntime-trt-rtx",
    "onnxruntime-cann",
    "onnxruntime-coreml",
)
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_NUMPY = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool", "string": "object"}


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a session. `type`: as in ONNX Runtime, `tensor(float)`; `shape`: of int, name or None."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The numpy type of a tensor; None for sequences, maps and types numpy lacks."""
        match = re.fullmatch(r"tensor\((\w+)\)", self.type)
        if match is None:
            return None
        name = match.group(1)
        if name in _NUMPY or re.fullmatch(r"u?int(8|16|32|64)", name):
            return np.dtype(_NUMPY.get(name, name))
        return None


class Session:
    """An open session. Use `open_session`; close it, or use it in a `with` block."""

    def __init__(self, inner: Any, label: str, folder: pathlib.Path | None, profile: pathlib.Path | None) -> None:
        self._inner = inner
        self._label = label
        self._folder = folder
        self._profile = profile
        self.inputs = tuple(Port(port.name, port.type, tuple(port.shape or ())) for port in inner.get_inputs())
        self.outputs = tuple(Port(port.name, port.type, tuple(port.shape or ())) for port in inner.get_outputs())
        self._overridable = {port.name for port in inner.get_overridable_initializers()}
        self.providers: tuple[str, ...] = tuple(inner.get_providers())

    @property
    def raw(self) -> Any:
        """The onnxruntime.InferenceSession, for io-binding and placement records."""
        if self._inner is None:
            raise RuntimeUnavailable(f"{self._label}: the session is closed")
        return self._inner

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once. `feeds`: input name -> array; returns output name -> array (or list, for sequences and maps).

        Raises:
            DataError: the feeds do not fit the inputs.
            ModelError: an output is unknown, or a node fails.
        """
        names = [port.name for port in self.outputs] if outputs is None else list(outputs)
        unknown = [name for name in names if all(name != port.name for port in self.outputs)]
        if unknown:
            raise ModelError(f"{self._label}: has no output {unknown[0]!r}; it has {_listed(self.outputs)}")
        known = {port.name for port in self.inputs} | self._overridable
        extra = [name for name in feeds if name not in known]
        if extra:
            raise DataError(f"{self._label}: has no input {extra[0]!r}; it has {_listed(self.inputs)}")
        absent = [port.name for port in self.inputs if port.name not in feeds and not self._optional(port)]
        if absent:
            raise DataError(f"{self._label}: no data for input {absent[0]!r}; needed: {_listed(self.inputs)}")
        runner = self.raw
        try:
            values = runner.run(names, {name: _array(value) for name, value in feeds.items()})
        except Exception as error:
            said = first_line(error)
            if type(error).__name__ == "InvalidArgument":
                raise DataError(f"{self._label}: the feeds do not fit: {said}") from error
            raise ModelError(f"{self._label}: running it failed: {said}") from error
        return dict(zip(names, values, strict=True))

    @staticmethod
    def _optional(port: Port) -> bool:
        return port.type.startswith("optional(")

    def end_profile(self) -> pathlib.Path | None:
        """End the profile and go on without one; returns its file, None where none was asked for or it has ended."""
        path, self._profile = self._profile, None
        if self._inner is not None and path is not None:
            # ONNX Runtime appends a time stamp to the prefix it is given.
            shutil.move(self._inner.end_profiling(), path)
        return path

    def close(self) -> None:
        """End the profile, release the session and its temporary files. Safe to call twice."""
        if self._inner is not None:
            self.end_profile()
        self._inner = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A temporary folder of gigabytes must not outlive a session someone forgot to close.
        with contextlib.suppress(Exception):
            self.close()


def open_session(
    model: ir.Model | str | os.PathLike[str] | bytes,
    *,
    provider: str = "cpu",
    threads: int = 1,
    optimize: bool = True,
    config: Mapping[str, str] | None = None,
    profile: str | os.PathLike[str] | None = None,
    provider_options: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Session:
    """Open `model` (in memory, a path, or bytes) on `provider`, with the CPU behind it for nodes it does not take.

    `threads`: of the one pool used; 1 gives the same bits on every machine of a class. `optimize`: all graph
    optimizations of ONNX Runtime, or none. `config`: session config entries. `sizes`: of free dimensions, by name.
    `profile`: file for the profile, which `end_profile` or `close` writes.
    External data of an in-memory model is read where it lies; a large model that is not on disk goes through a private
    temporary folder.

    Raises:
        RuntimeUnavailable: onnxruntime is missing, or the provider is not in it or did not start.
        ModelError: ONNX Runtime refuses the model.
        OnnxCompressError: no such provider.
    """
    wanted = providers.provider_class(provider)
    ort = onnxruntime()
    devices = _devices(ort, wanted)
    options = _options(ort, threads, optimize, {**(config or {})})
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    profile_path = pathlib.Path(profile) if profile is not None else None
    if profile_path is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile_path)
    source, label, folder = _source(model, options)
    given = {**(plugins.defaults(wanted) if devices else {}), **(provider_options or {})}
    try:
        inner = _inner(ort, source, options, wanted, given, devices)
        inner.disable_fallback()  # or `run` would re-create the session on the CPU when the provider fails
        if wanted not in inner.get_providers():
            raise RuntimeUnavailable(providers.did_not_start(wanted, inner.get_providers(), _obstacle(ort, wanted)))
        return Session(inner, label, folder, profile_path)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OnnxCompressError) or not isinstance(error, Exception):
            raise
        said = first_line(error)
        if wanted != "CPUExecutionProvider" and type(error).__name__ in ("EPFail", "RuntimeError", "RuntimeException"):
            raise RuntimeUnavailable(providers.did_not_start(wanted, [], _obstacle(ort, wanted) or said)) from error
        raise ModelError(f"{label}: ONNX Runtime refuses it: {said}") from error


def _devices(ort: Any, wanted: str) -> list[Any]:
    """The devices of a provider that is a plugin; empty for one that is in the build."""
    available = ort.get_available_providers()
    built_in = wanted in available and wanted not in plugins.packages() and not plugins.registered(ort, wanted)
    devices = [] if built_in else plugins.devices(ort, wanted)
    if not devices and wanted not in available:
        raise RuntimeUnavailable(providers.missing(wanted, available, plugin=wanted in plugins.packages()))
    return devices


def _inner(ort: Any, source: Any, options: Any, wanted: str, given: dict[str, str], devices: list[Any]) -> Any:
    """The session of ONNX Runtime on `wanted`, or on what it falls back to; the caller looks which."""
    if wanted == "CPUExecutionProvider":
        return ort.InferenceSession(
            source, options, providers=[(wanted, given) if given else wanted], enable_fallback=0
        )
    # A provider that cannot load writes to the log of the process, whatever the log level of the session.
    ort.set_default_logger_severity(4)
    try:
        if devices:
            options.add_provider_for_devices(devices[:1], given)
            return ort.InferenceSession(source, options, enable_fallback=0)
        obstacles.prepare(ort, wanted)
        chosen: list[Any] = [(wanted, given) if given else wanted, "CPUExecutionProvider"]
        return ort.InferenceSession(source, options, providers=chosen, enable_fallback=0)
    finally:
        ort.set_default_logger_severity(2)  # ONNX Runtime's default, which it does not let one ask for


def _obstacle(ort: Any, wanted: str) -> str:
    """What stands in the way of a provider, with the mend, in one line; empty when nothing is found."""
    found = obstacles.obstacle(ort, wanted)
    return "" if found is None else f"{found.reason}: {found.mend}" if found.mend else found.reason


def installed() -> list[str]:
    """Installed builds of onnxruntime, which all bring the module of that name: more than one is a mixture."""
    import importlib.metadata

    found = []
    for name in _BUILDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.distribution(name)
            found.append(name)
    return found


@functools.cache
def onnxruntime() -> Any:
    """The onnxruntime module, imported when it is first needed.

    Raises:
        RuntimeUnavailable: it is not installed, two builds are mixed, or it cannot be imported.
    """
    import importlib

    builds = installed()
    if len(builds) > 1:
        raise RuntimeUnavailable(mixed(builds))
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        if builds:
            raise RuntimeUnavailable(f"{builds[0]} is installed but cannot be imported: {first_line(error)}") from error
        raise RuntimeUnavailable(
            "onnxruntime is not installed: pip install 'onnxcompress[cpu]', or 'onnxcompress[gpu]' for an NVIDIA GPU"
        ) from error


def mixed(builds: Sequence[str]) -> str:
    """What to say of several builds of onnxruntime in one environment."""
    return (
        f"{' and '.join(builds)} are both installed and overwrite each other: "
        f"pip uninstall -y {' '.join(builds)}, then install one of them"
    )


def first_line(error: BaseException) -> str:
    """The first line of an ONNX Runtime error, without its prefix of codes."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])[:300]


def _options(ort: Any, threads: int, optimize: bool, config: dict[str, str]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors arrive as exceptions; the log would say them a second time, on stderr
    for key, value in {
        "session.intra_op.allow_spinning": "0",
        "session.inter_op.allow_spinning": "0",
        **config,
    }.items():
        options.add_session_config_entry(key, value)
    return options


def _source(
    model: ir.Model | str | os.PathLike[str] | bytes, options: Any
) -> tuple[str | bytes, str, pathlib.Path | None]:
    """What to hand to ONNX Runtime, what to call it, and a folder to remove afterwards."""
    if isinstance(model, bytes):
        return model, "the model given as bytes", None
    if isinstance(model, str | os.PathLike):
        path = os.fspath(model)
        if not os.path.isfile(path):
            raise ModelError(f"{path}: no such file")
        return path, path, None

    import onnx_ir as ir

    from onnxcompress.model import bridge
    from onnxcompress.model.load import source_of
    from onnxcompress.model.save import save, serialized, to_bytes

    origin = source_of(model)
    label = str(origin.path) if origin is not None and origin.path is not None else model.graph.name or "the model"
    tensors = [slot.tensor for slot in bridge.slots(model) if slot.tensor.dtype != ir.DataType.STRING]
    folders = {os.path.abspath(tensor.base_dir) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    inline = sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, ir.ExternalTensor))
    if inline <= DEFAULT.session_bytes and not folders:
        return to_bytes(model), label, None
    if inline <= DEFAULT.session_bytes and len(folders) == 1:
        options.add_session_config_entry(_FOLDER_KEY, folders.pop())
        return serialized(bridge.to_proto(model, keep_external=True)), label, None
    folder = pathlib.Path(tempfile.mkdtemp(prefix="onnxcompress-"))
    try:
        save(model, folder / "model.onnx", external=True, check=False)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return os.fspath(folder / "model.onnx"), label, folder


def _array(value: Any) -> Any:
    """ONNX Runtime takes arrays, and not the scalars that indexing an array gives."""
    return np.asarray(value) if isinstance(value, np.generic | bool | int | float) else value


def _listed(ports: Sequence[Port]) -> str:
    return ", ".join(port.name for port in ports) or "none"
