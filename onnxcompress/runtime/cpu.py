"""The class of this machine's CPU, as far as int8 arithmetic cares."""

from __future__ import annotations

import pathlib
import platform

_CPUINFO = pathlib.Path("/proc/cpuinfo")


def cpu_class(cpuinfo: str | None = None) -> str:
    """One of "AVX-512 VNNI", "AVX VNNI", "AVX-512", "AVX2", or the architecture of another machine.

    Without VNNI, products of unsigned and signed bytes are added in pairs in 16 bits and can saturate. `cpuinfo`: text
    of /proc/cpuinfo, read from this machine when None.
    """
    if cpuinfo is None:
        cpuinfo = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.is_file() else ""
    line = next((text for text in cpuinfo.splitlines() if text.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    for flag, name in (
        ("avx512_vnni", "AVX-512 VNNI"),
        ("avx_vnni", "AVX VNNI"),
        ("avx512f", "AVX-512"),
        ("avx2", "AVX2"),
    ):
        if flag in flags:
            return name
    return platform.machine() or "unknown"
