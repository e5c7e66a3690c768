"""The pass that shows how to write one is complete, short, and does what it says on real models."""

from __future__ import annotations

import ast
import pathlib
import re

import numpy as np
import onnx
import pytest

import onnxcompress as oc
from onnxcompress.contract import Reason, Select
from tests.builders import floats
from tests.example_pass import EvenLevels
from tests.house import BUNDLED_QUICK, ROOT, accuracy, bundled, two_layers


# bits, file / original, points of accuracy it may lose
@pytest.mark.parametrize(("bits", "ratio", "drop"), [(8, 0.31, 0.003), (4, 0.175, 0.015)])
@pytest.mark.parametrize("name", BUNDLED_QUICK)
def test_real_models_shrink_and_keep_their_accuracy(
    name: str, bits: int, ratio: float, drop: float, tmp_path: pathlib.Path
) -> None:
    done = oc.compress(bundled(name), EvenLevels(bits=bits), out=tmp_path / "o.onnx")
    assert done.steps[0].skipped is None
    assert done.ratio < ratio
    assert accuracy(name, tmp_path / "o.onnx") >= accuracy(name, bundled(name)) - drop
    onnx.checker.check_model(onnx.load(tmp_path / "o.onnx"), full_check=True)
    worst = max(t.error for t in done.steps[0].coverage.touched)
    assert 0 < worst < 0.5 / (1 << bits) * 10  # half a step, of a range of ten times the root mean square


def test_every_weight_is_accounted_for_and_rounded_by_half_a_step_at_most() -> None:
    done = oc.compress(two_layers(), EvenLevels(bits=8, select=Select(exclude=["bias"])))
    coverage = done.steps[0].coverage
    assert done.steps[0].skipped is None
    assert [t.key for t in coverage.touched] == ["first"]
    assert {x.key: x.reason for x in coverage.left} == {"second": Reason.TOO_SMALL, "bias": Reason.EXCLUDED}
    found = {weight.key: weight for weight in oc.weights(done.model)}
    assert found["first"].encoding.kind == "codebook"
    before = floats(16, 64)
    assert np.abs(found["first"].array() - before).max() <= np.ptp(before) / 255 / 2 * 1.001


def test_a_recipe_that_runs_it_twice_finds_nothing_left() -> None:
    done = oc.compress(bundled("digits_gru"), [EvenLevels(), EvenLevels()])
    assert done.steps[0].coverage.changed
    assert not done.steps[1].coverage.changed
    assert Reason.ROLE in {x.reason for x in done.steps[1].coverage.left}


def test_it_is_short_and_self_contained() -> None:
    text = (ROOT / "tests" / "example_pass.py").read_text()
    assert len(text.splitlines()) < 40
    tree = ast.parse(text)
    assert "tests" not in {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}


def test_the_readme_shows_this_very_pass() -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (ROOT / "tests" / "example_pass.py").read_text() in shown
