"""The NVIDIA driver and its devices, asked of the driver itself (CUDA driver API), with no package of NVIDIA's."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
import sys

# CUresult, as in the CUDA driver API reference.
_CODES = {
    100: "the driver finds no device (in a container: start it with --gpus all)",
    101: "the driver refuses the device (CUDA_VISIBLE_DEVICES?)",
    802: "the system is not ready yet (fabric manager?)",
    803: "the kernel module and libcuda are of different versions: reboot after the driver's update",
    804: "the driver is too old for this CUDA on this GPU",
}


@dataclasses.dataclass(frozen=True)
class Driver:
    """`reason`: why no GPU can be used, None when one can. `cuda`: newest CUDA the driver runs, (13, 0)."""

    reason: str | None
    cuda: tuple[int, int] | None = None
    devices: tuple[str, ...] = ()


def driver(library: str | None = None) -> Driver:
    """What the driver of this machine says. `library`: another libcuda (for tests)."""
    name = library or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return Driver(f"there is no NVIDIA driver ({name} is missing)")
    code = int(cuda.cuInit(0))
    version = ctypes.c_int()
    known = int(cuda.cuDriverGetVersion(ctypes.byref(version))) == 0 and version.value > 0
    runs = (version.value // 1000, version.value % 1000 // 10) if known else None
    if code:
        return Driver(f"{_CODES.get(code, 'the driver does not start')} (cuInit: {code})", runs)
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return Driver("the driver finds no device", runs)
    names = []
    for index in range(count.value):
        text = ctypes.create_string_buffer(128)
        names.append(text.value.decode(errors="replace") if not cuda.cuDeviceGetName(text, 128, index) else "unknown")
    return Driver(None, runs, tuple(names))


def memory_used() -> int | None:
    """Bytes in use on all NVIDIA devices, by every process; None where nvidia-smi does not tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return sum(int(line) for line in done.stdout.split()) * 1024 * 1024
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
