"""Why a provider does not start: the libraries it lacks, another version of one, the driver; and the mend."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import types

import pytest

from onnxcompress.runtime import libraries, nvidia, obstacles

GPU = types.SimpleNamespace(__file__="/nowhere/__init__.py", __version__="1.31.1", cuda_version="13.0")


def compiled(folder: pathlib.Path, name: str, code: str, *links: str) -> pathlib.Path:
    """A shared library made here, linked against `links` of the same folder."""
    source = folder / f"{name}.c"
    source.write_text(code)
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-o",
        str(folder / name),
        str(source),
        f"-Wl,-soname,{name}",
        "-Wl,--no-as-needed",
    ]
    try:
        subprocess.run([*command, *(str(folder / link) for link in links)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no gcc here")
    return folder / name


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_libraries_are_read_off_the_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("libonnxcompress_a.so.10", "libonnxcompress_b.so.1"):
        compiled(other, name, "int f(void) { return 1; }")
    provider = compiled(
        tmp_path,
        "libp.so",
        "int g(void) { return 2; }",
        *(f"other/{n}" for n in sorted(("libonnxcompress_a.so.10", "libonnxcompress_b.so.1"))),
    )
    assert libraries.needed(provider)[:2] == ["libonnxcompress_a.so.10", "libonnxcompress_b.so.1"]
    assert libraries.missing(provider) == ["libonnxcompress_a.so.10", "libonnxcompress_b.so.1"]
    assert libraries.needed(__file__) == []
    assert libraries.needed(tmp_path / "none.so") == []
    (other / "libonnxcompress_a.so.10").rename(other / "libonnxcompress_a.so.11")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(other))
    assert libraries.missing(provider) == ["libonnxcompress_a.so.10"]
    assert libraries.others("libonnxcompress_a.so.10") == ["libonnxcompress_a.so.11"]
    assert libraries.others("libonnxcompress_b.so.1") == []


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
@pytest.mark.parametrize(
    ("start", "devices", "words", "cuda"),
    [
        (100, 0, "the driver finds no device (in a container: start it with --gpus all) (cuInit: 100)", (12, 4)),
        (803, 0, "the kernel module and libcuda are of different versions", (12, 4)),
        (0, 0, "the driver finds no device", (12, 4)),
        (0, 2, None, (12, 4)),
    ],
)
def test_the_driver_is_asked(
    tmp_path: pathlib.Path, start: int, devices: int, words: str | None, cuda: tuple[int, int]
) -> None:
    code = f"""
    int cuInit(unsigned flags) {{ return {start}; }}
    int cuDriverGetVersion(int *v) {{ *v = 12040; return 0; }}
    int cuDeviceGetCount(int *n) {{ *n = {devices}; return 0; }}
    int cuDeviceGetName(char *name, int n, int d) {{ name[0] = 'G'; name[1] = '0' + d; name[2] = 0; return 0; }}
    """
    found = nvidia.driver(str(compiled(tmp_path, f"libfake{start}{devices}.so", code)))
    assert (found.reason or "").startswith(words or "")
    assert (found.reason is None) == (words is None)
    assert found.cuda == cuda
    assert found.devices == (("G0", "G1") if devices else ())


def test_no_driver() -> None:
    assert nvidia.driver("libonnxcompress_none.so.1").reason == (
        "there is no NVIDIA driver (libonnxcompress_none.so.1 is missing)"
    )


@pytest.mark.parametrize(
    ("lacking", "here", "reason", "mend"),
    [
        (
            ["libcublasLt.so.13", "libcudart.so.13", "libcudnn.so.9"],
            [],
            "libcublasLt.so.13, libcudart.so.13 and libcudnn.so.9 (CUDA 13.0 and cuDNN) are missing",
            "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'",
        ),
        (
            ["libnvinfer.so.10"],
            ["libnvinfer.so.11"],
            "libnvinfer.so.10 (TensorRT 10; this machine has libnvinfer.so.11, which is another version) is missing",
            "pip install 'tensorrt-cu13==10.*'",
        ),
        (["libcuda.so.1"], [], "libcuda.so.1 (the NVIDIA driver) is missing", obstacles._DRIVER),
        (["libfoo.so.2"], [], "libfoo.so.2 is missing", ""),
    ],
)
def test_missing_libraries_in_words(
    monkeypatch: pytest.MonkeyPatch, lacking: list[str], here: list[str], reason: str, mend: str
) -> None:
    monkeypatch.setattr(libraries, "missing", lambda path: list(lacking))
    monkeypatch.setattr(libraries, "others", lambda name: here)
    found = obstacles.obstacle(GPU, "TensorrtExecutionProvider")
    assert found == obstacles.Obstacle(reason, mend)


def test_driver_and_build_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "missing", lambda path: [])
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver(None, (12, 4), ("GPU",)))
    found = obstacles.obstacle(GPU, "CUDAExecutionProvider")
    assert found is not None
    assert found.reason == "the driver runs CUDA up to 12.4, this build was made for CUDA 13.0"
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver(None, (13, 1), ("GPU",)))
    assert obstacles.obstacle(GPU, "CUDAExecutionProvider") is None
    monkeypatch.setattr(nvidia, "driver", lambda: nvidia.Driver("the driver finds no device", (13, 1)))
    assert obstacles.obstacle(GPU, "CUDAExecutionProvider") == obstacles.Obstacle("the driver finds no device")
    assert obstacles.obstacle(GPU, "CPUExecutionProvider") is None
