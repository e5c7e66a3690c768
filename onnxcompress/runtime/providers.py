"""Execution providers by short name: what they are called in ONNX Runtime, and why one cannot run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from onnxcompress.errors import OnnxCompressError, RuntimeUnavailable

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "cann": "CANNExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "acl": "ACLExecutionProvider",
}

_WHEELS = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "openvino": "onnxruntime-openvino",
    "rocm": "onnxruntime-rocm",
    "migraphx": "onnxruntime-migraphx",
    "directml": "onnxruntime-directml",
    "cann": "onnxruntime-cann",
}

# Packages with a provider as a plugin (ONNX Runtime 1.23 on), which any build of onnxruntime takes.
_PLUGINS = {
    "qnn": "onnxruntime-qnn",
    "webgpu": "onnxruntime-ep-webgpu",
    "tensorrt-rtx": "onnxruntime-ep-nv-tensorrt-rtx",
}

_NEEDS = {
    "openvino": "the device that was asked for (device_type), with its driver",
    "cuda": "an NVIDIA GPU with its driver, and the CUDA and cuDNN libraries this wheel was built for",
    "tensorrt": "an NVIDIA GPU with its driver, and the TensorRT version this wheel was built for (libnvinfer)",
}


def provider_class(name: str) -> str:
    """The ONNX Runtime name of a provider, from its short name (`cuda`) or its ONNX Runtime name, in any case.

    Raises:
        OnnxCompressError: unknown name; the message offers the nearest one.
    """
    wanted = name.strip().lower()
    if wanted in PROVIDERS:
        return PROVIDERS[wanted]
    for known in PROVIDERS.values():
        if wanted == known.lower():
            return known
    for known in _others():
        if wanted in (known.lower(), short_name(known)):
            return known
    near = difflib.get_close_matches(wanted, PROVIDERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise OnnxCompressError(f"unknown execution provider {name!r}: {hint}known: {', '.join(PROVIDERS)}")


def short_name(provider: str) -> str:
    """The short name of an ONNX Runtime provider class (itself where there is none)."""
    own = provider.removesuffix("ExecutionProvider").lower()
    return next((name for name, known in PROVIDERS.items() if known == provider), own or provider)


def _others() -> list[str]:
    """Providers of the installed onnxruntime and of its plugins, which `PROVIDERS` may not know."""
    from onnxcompress.runtime import plugins
    from onnxcompress.runtime.session import onnxruntime

    try:
        ort = onnxruntime()
    except RuntimeUnavailable:
        return []
    return list(dict.fromkeys([*ort.get_available_providers(), *plugins.names(ort)]))


def missing(provider: str, available: Sequence[str], *, plugin: bool = False) -> str:
    """Why `provider` (an ONNX Runtime name) is not here, and what to install. `plugin`: only its device is not here."""
    name = short_name(provider)
    if plugin:
        return f"provider {name}: its plugin is installed, and finds no device on this machine"
    has = ", ".join(short_name(entry) for entry in available if entry != "AzureExecutionProvider")
    advice = install(name) or "install a build that has it"
    return f"provider {name} is not in the installed onnxruntime (it has: {has}): {advice}"


def install(name: str) -> str:
    """The step that brings provider `name` (short), empty where there is no wheel with it."""
    if name in _PLUGINS:
        return f"pip install {_PLUGINS[name]}, a plugin beside onnxruntime"
    return f"install {_WHEELS[name]} in the place of the installed onnxruntime" if name in _WHEELS else ""


def did_not_start(provider: str, running: Sequence[str], why: str = "") -> str:
    """What to say when a session came up without the provider it was asked for. `why`: what was found of the cause."""
    name = short_name(provider)
    why = why or f"it needs {_NEEDS.get(name, 'its device, driver and libraries')}"
    got = ", ".join(short_name(entry) for entry in running) or "nothing"
    return f"provider {name} is in the installed onnxruntime but did not start (running: {got}): {why}"
