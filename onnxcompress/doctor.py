"""What this machine can run: the installed onnxruntime, which of its providers start, the CPU, and what mends what."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

from onnxcompress.errors import ModelError, OnnxCompressError, RuntimeUnavailable
from onnxcompress.runtime import nvidia, obstacles, plugins
from onnxcompress.runtime.cpu import cpu_class
from onnxcompress.runtime.providers import PROVIDERS, install, short_name
from onnxcompress.runtime.session import first_line, installed, mixed, onnxruntime, open_session

SCHEMA = 1
_REMOTE = "AzureExecutionProvider"  # runs nothing on this machine
_CPUINFO = pathlib.Path("/proc/cpuinfo")
_MODEL = """
<ir_version: 8, opset_import: ["" : 13]>
tiny (float[1, 4] x) => (float[1, 4] y) <float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> { y = MatMul(x, w) }
"""


@dataclasses.dataclass(frozen=True)
class ProviderState:
    """A provider of the installed onnxruntime: does it run one MatMul? `reason` and `mend`: why not, and what helps."""

    name: str
    runs: bool
    reason: str | None = None
    mend: str | None = None
    plugin: bool = False


@dataclasses.dataclass(frozen=True)
class Processor:
    """`kind`: see `cpu_class`; `saturates`: int8 kernels can overflow. `cores`: of this process. Memory in bytes."""

    name: str
    kind: str
    saturates: bool
    cores: int
    memory: int | None
    memory_free: int | None


@dataclasses.dataclass(frozen=True)
class Health:
    """What `doctor` found. `builds`: installed builds of onnxruntime with their versions; more than one is a mixture.

    `problem`, `mend`: what keeps onnxruntime itself from working. `absent`: providers that other packages bring, each
    with the step. `cuda`: the CUDA that the build was made for.
    """

    builds: dict[str, str]
    version: str | None
    problem: str | None
    mend: str | None
    cpu: Processor
    gpu: nvidia.Driver
    cuda: str | None = None
    providers: tuple[ProviderState, ...] = ()
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    python: str = platform.python_version()
    system: str = f"{platform.system()} {platform.machine()}"
    schema: int = SCHEMA

    @property
    def works(self) -> bool:
        """True when the CPU provider runs: exit code 0, else 1."""
        return any(state.name == "cpu" and state.runs for state in self.providers)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = dataclasses.asdict(self)
        return {"schema": found.pop("schema"), "works": self.works, **found}


def doctor() -> Health:
    """Look at the installed onnxruntime, start each of its providers on one MatMul, and look at the machine.

    Nothing is raised for what does not work: that is what is reported.
    """
    builds = {name: importlib.metadata.version(name) for name in installed()}
    common: dict[str, Any] = {"builds": builds, "cpu": _processor(), "gpu": nvidia.driver()}
    try:
        ort = onnxruntime()
        if not hasattr(ort, "InferenceSession"):
            raise RuntimeUnavailable("onnxruntime is a folder without its files, left by a build that was removed")
    except OnnxCompressError as error:
        return Health(**common, version=None, problem=str(error), mend=_repair(list(builds), str(error)))
    version = str(getattr(ort, "__version__", "")) or None
    problem = mend = None
    if len(builds) == 1 and version not in (None, next(iter(builds.values())).partition("+")[0]):
        name, stated = next(iter(builds.items()))
        problem = f"onnxruntime says it is {version}, its package {name} {stated}: files of two builds are mixed"
        mend = f"pip install --force-reinstall --no-deps {name}=={stated}"
    elif not builds:
        problem = f"onnxruntime {version} comes from no package that this environment knows of"
    listed = [name for name in ort.get_available_providers() if name != _REMOTE]
    names = list(dict.fromkeys([*listed, *plugins.names(ort)]))
    states = tuple(_state(ort, name) for name in sorted(names, key=lambda name: (name != PROVIDERS["cpu"], name)))
    have = {state.name for state in states}
    return Health(
        **common,
        version=version,
        problem=problem,
        mend=mend,
        cuda=str(getattr(ort, "cuda_version", "") or "") or None,
        providers=states,
        absent={name: step for name in PROVIDERS if name not in have and (step := install(name))},
    )


def _state(ort: Any, provider: str) -> ProviderState:
    """Start `provider` on one MatMul, with no way back to the CPU, and run it."""
    import numpy as np
    import onnx.parser

    from onnxcompress.validation.placement import RECORD, placed

    name, plugin = short_name(provider), provider in plugins.packages()
    model = onnx.parser.parse_model(_MODEL).SerializeToString()
    try:
        with open_session(model, provider=provider, config=RECORD) as session:
            nodes = placed(session)
            got = session.run({"x": np.arange(4, dtype=np.float32)[None]})["y"]
    except (RuntimeUnavailable, ModelError) as error:
        found = obstacles.obstacle(ort, provider)
        reason = found.reason if found is not None else str(error)
        return ProviderState(name, False, reason, (found.mend if found is not None else "") or None, plugin)
    except Exception as error:  # a provider may raise what it likes
        return ProviderState(name, False, first_line(error), None, plugin)
    if nodes is not None and not any(node.provider == name for node in nodes):
        return ProviderState(name, False, "starts, but does not take a float MatMul", None, plugin)
    if np.abs(got - np.arange(4)).max() > 0.01:  # some compute in float16
        return ProviderState(name, False, f"runs, and computes a wrong product: {got.tolist()}", None, plugin)
    note = None if nodes is not None else "ran; this onnxruntime does not tell which nodes a provider takes"
    return ProviderState(name, True, note, None, plugin)


def _repair(builds: list[str], said: str) -> str | None:
    """The command that mends an onnxruntime that cannot be used."""
    wanted = "gpu" if any("gpu" in name for name in builds) else "cpu"
    if len(builds) > 1 and said == mixed(builds):
        return f"pip uninstall -y {' '.join(builds)} && pip install 'onnxcompress[{wanted}]'"
    if builds:
        return f"pip install --force-reinstall --no-deps {builds[0]}"
    return "pip install 'onnxcompress[cpu]'"


def _processor() -> Processor:
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.is_file() else ""
    line = next((line for line in text.splitlines() if line.startswith("model name")), "")
    kind = cpu_class(text or None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processor(
        name=line.partition(":")[2].strip() or platform.processor() or platform.machine(),
        kind=kind,
        saturates=kind in ("AVX2", "AVX-512"),
        cores=cores,
        memory=_meminfo("MemTotal"),
        memory_free=_meminfo("MemAvailable"),
    )


def _meminfo(key: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:")), None)
    except (OSError, ValueError):
        return None
