"""Shared libraries a provider needs: which of them the system cannot find, which of another version lie there instead.

ONNX Runtime names the first one that is missing, in a log line; this reads the list off the file (ELF, System V ABI
chapter 5: the DT_NEEDED entries of the dynamic section).
"""

from __future__ import annotations

import ctypes
import glob
import os
import pathlib
import re
import struct
import sys
from collections.abc import Iterator, Sequence

_PT_LOAD, _PT_DYNAMIC, _DT_NULL, _DT_NEEDED, _DT_STRTAB = 1, 2, 0, 1, 5
_SYSTEM = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib", "/usr/lib")
# Where Python packages of NVIDIA and others put theirs, below site-packages.
_PACKAGED = ("tensorrt_libs", "tensorrt_rtx_libs", "nvidia/*/lib", "onnxruntime/capi", "openvino/libs")


def needed(path: str | os.PathLike[str]) -> list[str]:
    """Names of the libraries that the 64-bit ELF file `path` is linked against; empty for any other file."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if head[:6] != b"\x7fELF\x02\x01":
                return []
            offset, size, count = (*struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54))
            file.seek(offset)
            table = file.read(size * count)
            parts = [struct.unpack_from("<IIQQQQ", table, at * size) for at in range(count)]
            loads = [(address, length, start) for kind, _, start, address, _, length in parts if kind == _PT_LOAD]
            dynamic = next(((start, length) for kind, _, start, _, _, length in parts if kind == _PT_DYNAMIC), None)
            if dynamic is None:
                return []
            file.seek(dynamic[0])
            raw = file.read(dynamic[1])
            entries = [struct.unpack_from("<QQ", raw, at) for at in range(0, len(raw) - 15, 16)]
            names = []
            strings = next(value for tag, value in entries if tag == _DT_STRTAB)
            base = next(
                start + strings - address for address, length, start in loads if 0 <= strings - address < length
            )
            for tag, value in entries:
                if tag == _DT_NULL:
                    break
                if tag == _DT_NEEDED:
                    file.seek(base + value)
                    names.append(file.read(256).split(b"\0", 1)[0].decode("utf-8", "replace"))
            return names
    except (OSError, struct.error, StopIteration):
        return []


def missing(path: str | os.PathLike[str]) -> list[str]:
    """Libraries that `path` needs and that neither the loader nor the folders of Python packages have.

    The others are loaded into this process on the way, so that the loader finds those of Python packages when ONNX
    Runtime opens `path`.
    """
    beside = pathlib.Path(path).parent
    return [name for name in needed(path) if not (beside / name).exists() and not available(name)]


def others(name: str) -> list[str]:
    """Files on this machine that are `name` (libnvinfer.so.10) in another major version (libnvinfer.so.11)."""
    stem = re.sub(r"\.so[.\d]*$", ".so.", name)
    found = {pathlib.Path(path).name for folder in _folders() for path in glob.glob(f"{glob.escape(folder)}/{stem}*")}
    majors = {match.group(0) for entry in found if (match := re.match(re.escape(stem) + r"\d+", entry))}
    return sorted(majors - {name})


def available(name: str) -> bool:
    """True when the library `name` could be loaded into this process, by the loader or from a Python package."""
    try:
        ctypes.CDLL(name)
        return True
    except OSError:
        pass
    for folder in _folders():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            try:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
                return True
            except OSError:  # it needs a library that is missing itself
                continue
    return False


def _folders() -> Iterator[str]:
    yield from (entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry)
    for place in dict.fromkeys(entry for entry in sys.path if entry.endswith("-packages")):
        for pattern in _PACKAGED:
            yield from sorted(glob.glob(os.path.join(glob.escape(place), pattern)))
    yield from sorted(glob.glob("/usr/local/cuda*/lib64"))
    yield from _SYSTEM


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1] if names else "") if part)
