"""Providers as they are asked for, and the options TensorRT gets."""

from __future__ import annotations

import pathlib

import pytest

from onnxcompress.errors import OnnxCompressError
from onnxcompress.runtime.choice import Choice


def test_names_and_options() -> None:
    assert Choice.of("cuda") == Choice("CUDAExecutionProvider")
    assert Choice.of("cuda").name == "cuda"
    openvino = Choice.of("OpenVINO:device_type=CPU, num_of_threads=1")
    assert openvino.provider_options() == {"device_type": "CPU", "num_of_threads": "1"}
    assert openvino.name == "openvino:device_type=CPU, num_of_threads=1"
    with pytest.raises(OnnxCompressError, match="did you mean 'tensorrt'"):
        Choice.of("tensort:fp16")
    with pytest.raises(OnnxCompressError, match="no option 'fp17'; it has fp16, bf16, int8, sparsity"):
        Choice.of("tensorrt:fp17")
    with pytest.raises(OnnxCompressError, match=r"write cuda:OPTION=VALUE"):
        Choice.of("cuda:=1")
    with pytest.raises(OnnxCompressError, match="cpu has no options"):
        Choice.of("cpu:num_of_threads=2")


def test_tensorrt_in_our_words(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice = Choice.of("tensorrt:fp16,sparsity,int8=off,trt_max_workspace_size=1000")
    expected = {
        "trt_fp16_enable": "1",
        "trt_sparsity_enable": "1",
        "trt_int8_enable": "0",
        "trt_max_workspace_size": "1000",
    }
    assert choice.provider_options() == expected
    assert choice.provider_options(quantized=True)["trt_int8_enable"] == "0"
    assert Choice.of("tensorrt").provider_options(quantized=True) == {"trt_int8_enable": "1"}


def test_engines_are_kept_by_model_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def folder(text: str, model: str, quantized: bool = False) -> str:
        options = Choice.of(text).provider_options(model, quantized=quantized)
        assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
        assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"]
        return options["trt_engine_cache_path"]

    found = [
        folder("tensorrt", "a" * 64),
        folder("tensorrt", "b" * 64),
        folder("tensorrt:fp16", "a" * 64),
        folder("tensorrt", "a" * 64, quantized=True),
    ]
    assert len(set(found)) == 4
    assert found[0] == folder("tensorrt", "a" * 64)
    assert all(pathlib.Path(path).parent == tmp_path / "onnxcompress" / "tensorrt" for path in found)
    assert folder("tensorrt:trt_engine_cache_path=/engines", "a" * 64) == "/engines"
    assert "trt_engine_cache_enable" not in Choice.of("tensorrt").provider_options()
    off = Choice.of("tensorrt:trt_engine_cache_enable=0").provider_options("a" * 64)
    assert off == {"trt_engine_cache_enable": "0"}
