"""Plugin providers: found by their package, registered once, refused in words."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest

from onnxcompress.errors import RuntimeUnavailable
from onnxcompress.runtime import plugins


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    plugins.packages.cache_clear()
    yield
    plugins.packages.cache_clear()


class Ort:
    """An onnxruntime with one plugin that can be registered."""

    def __init__(self, error: str = "", devices: int = 1) -> None:
        self.registered: list[tuple[str, str]] = []
        self._error, self._devices = error, devices

    def get_ep_devices(self) -> list[Any]:
        found = [("CPUExecutionProvider", {}), *((name, {"library_path": path}) for name, path in self.registered)]
        return [
            types.SimpleNamespace(ep_name=name, ep_metadata=metadata) for name, metadata in found[: 1 + self._devices]
        ]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self._error:
            raise RuntimeError(self._error)
        self.registered.append((name, path))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(
        get_ep_name=lambda: "FooExecutionProvider", get_library_path=lambda: "/lib/libfoo.so"
    )
    found = [types.SimpleNamespace(metadata={"Name": name}) for name in ("numpy", "onnxruntime-ep-foo", "onnxruntime")]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: found)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.import_module", lambda name: module)


@pytest.mark.usefixtures("package")
def test_registered_from_its_package_once() -> None:
    ort = Ort()
    assert plugins.packages() == {"FooExecutionProvider": "onnxruntime_ep_foo"}
    assert len(plugins.devices(ort, "FooExecutionProvider")) == 1
    assert len(plugins.devices(ort, "FooExecutionProvider")) == 1
    assert ort.registered == [("FooExecutionProvider", "/lib/libfoo.so")]
    assert plugins.names(ort) == ["FooExecutionProvider"]
    assert plugins.devices(ort, "BarExecutionProvider") == []
    assert plugins.registered(ort, "CPUExecutionProvider") == []
    assert plugins.devices(Ort(devices=0), "FooExecutionProvider") == []


@pytest.mark.usefixtures("package")
def test_a_plugin_that_does_not_load() -> None:
    words = "package onnxruntime_ep_foo is installed, but its plugin does not load: libbar.so.1: no such file"
    with pytest.raises(RuntimeUnavailable) as caught:
        plugins.devices(Ort("libbar.so.1: no such file\nmore"), "FooExecutionProvider")
    assert str(caught.value) == words


def test_an_onnxruntime_without_plugins() -> None:
    assert plugins.devices(types.SimpleNamespace(), "FooExecutionProvider") == []
