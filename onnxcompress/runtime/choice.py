"""A provider as it is asked for: `cuda`, `tensorrt:fp16,sparsity`, `openvino:device_type=CPU`."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping

from onnxcompress.errors import OnnxCompressError
from onnxcompress.runtime.providers import provider_class, short_name

# Our words for the options of the TensorRT provider (onnxruntime, docs/execution-providers/TensorRT-ExecutionProvider).
_TENSORRT = {
    "fp16": "trt_fp16_enable",
    "bf16": "trt_bf16_enable",
    "int8": "trt_int8_enable",
    "sparsity": "trt_sparsity_enable",
    "workspace": "trt_max_workspace_size",
    "level": "trt_builder_optimization_level",
}
_ON = {"": "1", "on": "1", "true": "1", "off": "0", "false": "0"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A requested provider. `provider`: ONNX Runtime's name; `options`: of the provider, in ONNX Runtime's words."""

    provider: str
    options: tuple[tuple[str, str], ...] = ()
    text: str = ""

    @property
    def name(self) -> str:
        """The short name, with the options as they were given."""
        return self.text or short_name(self.provider)

    @staticmethod
    def of(text: str) -> Choice:
        """Read `NAME[:OPTION[=VALUE],...]`; an option without a value is switched on.

        Raises:
            OnnxCompressError: unknown provider, an option without a name, or one that the provider does not have.
        """
        name, _, rest = text.partition(":")
        provider = provider_class(name)
        options = {}
        for part in (part.strip() for part in rest.split(",") if part.strip()):
            key, _, value = part.partition("=")
            if not key:
                raise OnnxCompressError(f"provider {text}: write {name}:OPTION=VALUE,...")
            if provider == "CPUExecutionProvider":  # ONNX Runtime would take any, and heed none
                raise OnnxCompressError(f"provider {text}: cpu has no options; threads are set by --threads")
            if provider == "TensorrtExecutionProvider":
                if key not in _TENSORRT and not key.startswith("trt_"):
                    words = ", ".join(_TENSORRT)
                    raise OnnxCompressError(
                        f"provider {text}: no option {key!r}; it has {words}, and ONNX Runtime's own"
                    )
                key = _TENSORRT.get(key, key)
            options[key] = _ON.get(value.lower(), value)
        shown = f"{short_name(provider)}:{rest}" if options else ""
        return Choice(provider, tuple(options.items()), shown)

    def provider_options(self, model: str = "", *, quantized: bool = False) -> dict[str, str]:
        """The options to open a session with.

        TensorRT keeps its engines and timings in a folder of the user's cache keyed by `model` (the sha256 of the
        file), the options and the version of ONNX Runtime, so that no engine of another model is ever taken; without
        `model` nothing is kept. `quantized`: the model holds Q/DQ, which TensorRT runs in integers with int8 alone.
        """
        options = dict(self.options)
        if self.provider != "TensorrtExecutionProvider":
            return options
        if quantized:
            options.setdefault("trt_int8_enable", "1")
        if model and options.get("trt_engine_cache_enable", "1") == "1":
            folder = options.get("trt_engine_cache_path") or os.fspath(_folder(model, options))
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
            options.setdefault("trt_timing_cache_enable", "1")
            options.setdefault("trt_timing_cache_path", folder)
        return options


def _folder(model: str, options: Mapping[str, str]) -> pathlib.Path:
    from onnxcompress.runtime.session import onnxruntime

    parts = [model, onnxruntime().__version__, *(f"{key}={value}" for key, value in sorted(options.items()))]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(pathlib.Path.home(), ".cache")
    return pathlib.Path(home, "onnxcompress", "tensorrt", key)
