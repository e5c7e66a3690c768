"""Plugin execution providers: libraries that ONNX Runtime (1.23 on) takes at run time, from packages of their own."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from typing import Any

from onnxcompress.errors import RuntimeUnavailable

_PREFIXES = ("onnxruntime_ep_", "onnxruntime_qnn")  # a package of plugins has get_library_path and get_ep_name(s)


@functools.cache
def packages() -> dict[str, str]:
    """Provider (ONNX Runtime's name) -> module of the installed package that brings it as a plugin."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        module = re.sub(r"[-.]+", "_", distribution.metadata["Name"] or "").lower()
        if not module.startswith(_PREFIXES):
            continue
        with contextlib.suppress(Exception):  # a broken package must not hide the others
            if importlib.util.find_spec(module) is not None:
                found.update(dict.fromkeys(_names(importlib.import_module(module)), module))
    return found


def devices(ort: Any, provider: str) -> list[Any]:
    """Devices (OrtEpDevice) of `provider` as a plugin, registered from its package if need be; empty: there are none.

    Raises:
        RuntimeUnavailable: its package is there, and ONNX Runtime cannot load its library.
    """
    found = registered(ort, provider)
    module = packages().get(provider) if not found and hasattr(ort, "register_execution_provider_library") else None
    if module is None:
        return found
    try:
        package = importlib.import_module(module)
        ort.register_execution_provider_library(provider, os.fspath(package.get_library_path()))
    except Exception as error:
        if "already registered" not in str(error):
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise RuntimeUnavailable(f"package {module} is installed, but its plugin does not load: {said}") from error
    return registered(ort, provider)


def defaults(provider: str) -> dict[str, str]:
    """Options without which the plugin `provider` takes no node."""
    if provider == "QNNExecutionProvider":
        with contextlib.suppress(Exception):
            path = str(importlib.import_module(packages()[provider]).get_qnn_htp_path())
            # The simulator on x86 has no device to read these off, and cannot finish a graph without (QNN plugin 2.7).
            simulated = {"htp_arch": "75", "soc_model": "57"} if _x86() else {}
            return {"backend_path": path, **simulated}
    return {}


def names(ort: Any) -> list[str]:
    """Providers that are registered as plugins, or can be."""
    listed = {device.ep_name for device in ort.get_ep_devices()} if hasattr(ort, "get_ep_devices") else set()
    return list(dict.fromkeys([*(name for name in sorted(listed) if registered(ort, name)), *packages()]))


def _x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def registered(ort: Any, provider: str) -> list[Any]:
    """Devices of `provider` as a plugin that is registered; one that is in the build comes from no library."""
    if not hasattr(ort, "get_ep_devices"):
        return []
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    return [device for device in devices if "library_path" in device.ep_metadata]


def _names(package: Any) -> list[str]:
    if hasattr(package, "get_ep_names"):
        return list(package.get_ep_names())
    return [package.get_ep_name()]
