"""A streaming model of the zoo, pruned, healed without labels; its state is [2, batch, 128], its weights are in Ifs."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir

import onnxcompress as oc
from onnxcompress.model.load import load
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.runtime.session import open_session
from onnxcompress.training.distill import Settings, distill, write
from tests.training.small import opened

SEEN = 128  # of the 256 frames; the others judge


def probabilities(of: ir.Model, frames: np.ndarray) -> np.ndarray:
    """Of speech in each frame, the state handed on from one to the next."""
    found, state = [], np.zeros((2, 1, 128), np.float32)
    with open_session(of) as session:
        for frame in frames:
            out = session.run({"input": frame, "state": state, "sr": np.array(16000)})
            found.append(float(np.asarray(out["output"])[0, 0]))
            state = np.asarray(out["stateN"])
    return np.array(found)


def test_a_model_with_a_state_heals_on_calls_of_its_stream(zoo: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder, cut = zoo / "silero_vad", tmp_path / "cut.onnx"
    oc.compress(folder / "model.onnx", MagnitudePruning(sparsity=0.8), out=cut)
    original, student = load(folder / "model.onnx"), load(cut)
    with np.load(folder / "feeds.npz") as stored:
        calls = {name: stored[name] for name in stored.files}
    few = {name: array[:SEEN] for name, array in calls.items()}
    done = distill(original, student, opened(student, few), settings=Settings(epochs=30))
    assert len(done.parameters) == 26
    wanted, before = (probabilities(of, calls["input"][SEEN:]) for of in (original, student))
    write(student, done.parameters)
    after = probabilities(student, calls["input"][SEEN:])
    lost, left = (float(np.mean((p > 0.5) != (wanted > 0.5))) for p in (before, after))
    assert lost > 0.3
    assert left < 0.3 * lost
