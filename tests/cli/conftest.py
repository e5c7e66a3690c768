"""What the tests of the command line share."""

from __future__ import annotations

import pathlib

import pytest

from tests.house import two_layers


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty current folder with a small model in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(two_layers().SerializeToString())
    return tmp_path
