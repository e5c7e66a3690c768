"""Why a provider that is in the build does not start on this machine, and the command that mends it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
from typing import Any

from onnxcompress.runtime import libraries, nvidia

# Files of the providers that come as libraries of their own, beside ONNX Runtime's.
_FILES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "tensorrt",
    "NvTensorRTRTXExecutionProvider": "nv_tensorrt_rtx",
    "ROCMExecutionProvider": "rocm",
    "MIGraphXExecutionProvider": "migraphx",
    "OpenVINOExecutionProvider": "openvino",
    "DnnlExecutionProvider": "dnnl",
    "CANNExecutionProvider": "cann",
    "VitisAIExecutionProvider": "vitisai",
}
NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_CUDA = ("libcublas", "libcudart", "libcurand", "libcufft", "libnvrtc", "libnvJitLink")
_DRIVER = "install the NVIDIA driver so that nvidia-smi runs; in a container, start it with --gpus all"


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """`reason`: one line. `mend`: the command (or the step) that removes it; empty where none is known."""

    reason: str
    mend: str = ""


def prepare(ort: Any, provider: str) -> None:
    """Load the libraries of `provider` that came as Python packages, which ONNX Runtime does not look for by itself."""
    if provider in NVIDIA:
        _preload(ort)
        _missing(ort, provider)


@functools.cache
def _preload(ort: Any) -> None:
    """Also those that are opened at run time only (cuFFT, NVRTC); what fails to load is seen when it is missed."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()


def obstacle(ort: Any, provider: str) -> Obstacle | None:
    """What stands in the way of `provider` (ONNX Runtime's name); None when nothing is found."""
    lacking = _missing(ort, provider)
    if lacking:
        return _lacking(ort, lacking)
    if provider not in NVIDIA:
        return None
    found = nvidia.driver()
    if found.reason is not None:
        return Obstacle(found.reason, _DRIVER if "missing" in found.reason else "")
    built = str(getattr(ort, "cuda_version", "") or "").partition(".")[0]
    if built.isdigit() and found.cuda is not None and found.cuda[0] < int(built):
        runs = ".".join(map(str, found.cuda))
        return Obstacle(
            f"the driver runs CUDA up to {runs}, this build was made for CUDA {ort.cuda_version}",
            "update the NVIDIA driver, or install an older onnxruntime-gpu",
        )
    return None


def _missing(ort: Any, provider: str) -> list[str]:
    """Libraries that the provider needs and the machine lacks."""
    name = _FILES.get(provider)
    if name is None:
        return []
    file = pathlib.Path(os.path.dirname(ort.__file__), "capi", f"libonnxruntime_providers_{name}.so")
    lacking = libraries.missing(file)
    # Opened at run time, so that they are in no list of the file (seen in onnxruntime-gpu 1.31).
    late = ("libcudnn.so.9", "libcuda.so.1") if provider in NVIDIA[:2] and file.exists() else ()
    lacking += [each for each in late if each not in lacking and not libraries.available(each)]
    return lacking


def _lacking(ort: Any, lacking: list[str]) -> Obstacle:
    parts, mends = [], []
    cuda = [name for name in lacking if name.startswith(_CUDA)]
    cudnn = [name for name in lacking if name.startswith("libcudnn")]
    trt = [name for name in lacking if name.startswith(("libnvinfer", "libnvonnxparser"))]
    version, built = getattr(ort, "__version__", ""), str(getattr(ort, "cuda_version", "") or "")
    if cuda or cudnn:
        makers = " and ".join(name for name, there in ((f"CUDA {built}".strip(), cuda), ("cuDNN", cudnn)) if there)
        parts.append(f"{libraries.listed([*cuda, *cudnn])} ({makers})")
        mends.append(f"pip install 'onnxruntime-gpu[cuda,cudnn]=={version}'")
    if trt:
        parts.append(f"{libraries.listed(trt)} ({_tensorrt(trt[0])})")
        major = trt[0].rpartition(".")[2]
        suffix = f"-cu{built.partition('.')[0]}" if built else ""
        mends.append(f"pip install 'tensorrt{suffix}=={major}.*'")
    driver = [name for name in lacking if name.startswith("libcuda.so")]
    if driver:
        parts.append("libcuda.so.1 (the NVIDIA driver)")
        mends.append(_DRIVER)
    rest = [name for name in lacking if name not in (*cuda, *cudnn, *trt, *driver)]
    if rest:
        parts.append(libraries.listed(rest))
    verb = "is" if len(lacking) == 1 else "are"
    return Obstacle(f"{libraries.listed(parts)} {verb} missing", "; ".join(mends))


def _tensorrt(name: str) -> str:
    """The TensorRT that `name` is of, and another one that is here instead."""
    wanted = f"TensorRT {name.rpartition('.')[2]}"
    here = libraries.others(name)
    return f"{wanted}; this machine has {libraries.listed(here)}, which is another version" if here else wanted
