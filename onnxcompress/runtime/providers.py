"""Execution providers by short name: what they are called in ONNX Runtime, and why one cannot run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from onnxcompress.errors import OnnxCompressError

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
    "migraphx": "onnxruntime-rocm",
    "directml": "onnxruntime-directml",
    "qnn": "onnxruntime-qnn",
}

_NEEDS = {
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
    near = difflib.get_close_matches(wanted, PROVIDERS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise OnnxCompressError(f"unknown execution provider {name!r}: {hint}known: {', '.join(PROVIDERS)}")


def short_name(provider: str) -> str:
    """The short name of an ONNX Runtime provider class (itself where there is none)."""
    return next((name for name, known in PROVIDERS.items() if known == provider), provider)


def missing(provider: str, available: Sequence[str]) -> str:
    """Why `provider` (an ONNX Runtime name) is not in this build, and what to install."""
    name = short_name(provider)
    has = ", ".join(short_name(entry) for entry in available if entry != "AzureExecutionProvider")
    wheel = _WHEELS.get(name)
    advice = f"install {wheel} in the place of the installed onnxruntime" if wheel else "install a build that has it"
    return f"provider {name} is not in the installed onnxruntime (it has: {has}): {advice}"


def did_not_start(provider: str, running: Sequence[str]) -> str:
    """What to say when a session came up without the provider it was asked for."""
    name = short_name(provider)
    needs = _NEEDS.get(name, "its device, driver and libraries")
    got = ", ".join(short_name(entry) for entry in running) or "nothing"
    return f"provider {name} is in the installed onnxruntime but did not start (running: {got}): it needs {needs}"
