"""The CPU class, read off /proc/cpuinfo."""

from __future__ import annotations

import platform

import pytest

from onnxcompress.runtime.cpu import cpu_class


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu avx avx2 avx512f avx512_vnni", "AVX-512 VNNI"),
        ("fpu avx2 avx_vnni", "AVX VNNI"),
        ("avx2 avx512f", "AVX-512"),
        ("avx avx2", "AVX2"),
        ("fpu sse4_2", platform.machine()),
    ],
)
def test_class_follows_the_strongest_flag(flags: str, name: str) -> None:
    assert cpu_class(f"processor : 0\nflags\t\t: {flags}\nflags\t\t: fpu\n") == name
