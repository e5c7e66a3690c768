"""What all tests share: the builders (`from tests.builders import ...`) and the zoo."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def zoo() -> pathlib.Path:
    """The folder of real models that ONNXCOMPRESS_ZOO names; a test that needs it is skipped without."""
    folder = pathlib.Path(os.environ.get("ONNXCOMPRESS_ZOO", "/nonexistent"))
    if not folder.is_dir():
        pytest.skip("ONNXCOMPRESS_ZOO names no folder")
    return folder
