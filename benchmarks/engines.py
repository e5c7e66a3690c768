"""Do the int8, shared and pruned forms of a model get the same verdict on every engine that is here?

    python benchmarks/engines.py
    python benchmarks/engines.py --python openvino=/path/to/python --python qnn=/path/to/python
    ONNXCOMPRESS_ZOO=/path python benchmarks/engines.py ...     # further models: folders with model.onnx and feeds.npz

Compresses each model in four ways, and holds each form to its original on the first --samples samples, by a metric
with a budget (--max-drop), on these engines:

- cpu: onnxruntime's CPU provider, as everyone runs it;
- exact: the same with integer sums that cannot saturate (session.x64quantprecision; where onnxruntime cannot run the
  model so, Q/DQ in float);
- openvino: onnxruntime-openvino, which overwrites onnxruntime and so needs an interpreter of its own;
- qnn: the HTP simulator of onnxruntime-qnn on x86.

An interpreter given by --python needs the provider's wheel, numpy, and this project's dependencies; the project itself
is taken from here. Without --python, an engine that this interpreter lacks is told as not run. Prints a row an engine,
then for every form whether all engines that ran agree, and if not which differs. Exit status 1 if any differs. The
bundled models are scored on their labels; a model of the zoo on how often it has its original's top-1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import onnxcompress as oc
from onnxcompress.data.source import open_data
from onnxcompress.data.specs import input_specs
from onnxcompress.errors import ModelError, OnnxCompressError
from onnxcompress.runtime.cpu import cpu_class
from onnxcompress.runtime.session import Session, open_session
from onnxcompress.validation.metrics import metric_named
from onnxcompress.validation.pairing import feeds_for
from onnxcompress.validation.portable import PORTABLE
from onnxcompress.validation.verdict import judge, score

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = ("digits_cnn", "digits_gru", "gloss_transformer")
ZOO = ("mlperf_resnet8", "cifar_resdw_cnn", "sst2_minilm3")
FORMS: dict[str, list[Any]] = {
    "int8": ["static-quantization"],
    "int8-dynamic": ["dynamic-quantization"],
    "shared": [{"weight-sharing": {"bits": 4}}],
    "pruned": [{"magnitude-pruning": {"sparsity": 0.3, "storage": "sparse"}}],
}
FLOAT_QDQ = {"session.disable_quant_qdq": "1"}
ENGINES = ("cpu", "exact", "openvino", "qnn")


@dataclasses.dataclass(frozen=True)
class Said:
    """What one engine says of one form. `verdict`: None where it did not run, and `note` says why."""

    verdict: str | None
    note: str
    figures: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its data: the evaluation data holds labels `y`."""

    name: str
    model: pathlib.Path
    calibration: pathlib.Path
    data: pathlib.Path


def tasks(names: tuple[str, ...], samples: int, work: pathlib.Path) -> Iterator[Task]:
    """The models asked for, with `samples` samples."""
    zoo = pathlib.Path(os.environ.get("ONNXCOMPRESS_ZOO", ""))
    for name in names or (BUNDLED + (ZOO if zoo.is_dir() and os.fspath(zoo) != "." else ())):
        bundled = name in BUNDLED
        folder = (ROOT / "models" if bundled else zoo) / name
        with np.load(folder / ("eval.npz" if bundled else "feeds.npz")) as loaded:
            arrays = {key: loaded[key][:samples] for key in loaded.files}
        model, calibration = folder / "model.onnx", folder / ("calib.npz" if bundled else "feeds.npz")
        if not bundled:
            arrays["y"] = _top1(model, arrays)
        data = work / f"{name}.npz"
        np.savez(data, **arrays)
        yield Task(name, model, calibration, data)


def _top1(model: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    with open_session(model) as session:
        found = [
            next(iter(session.run(feeds_for(session, batch.feeds)).values())).argmax(axis=-1)[: batch.count]
            for batch in open_data(dict(arrays), input_specs(oc.load(model)), last="fill")
        ]
    return np.concatenate(found)


def on_cpu(task: Task, form: pathlib.Path, given: argparse.Namespace) -> Said:
    """The default CPU provider of this interpreter."""
    done = oc.validate(
        task.model, form, data=task.data, metric="accuracy", max_drop=given.max_drop, latency=False, limit=given.samples
    )
    assert done.score is not None
    note = next((reason for reason in done.reasons if "integer products" in reason or "16 bits" in reason), "")
    return Said(judge(done.score).verdict.value, note, _figures(dataclasses.asdict(done.score)))


def exactly(task: Task, form: pathlib.Path, given: argparse.Namespace) -> Said:
    """The CPU provider with sums that cannot saturate."""
    with contextlib.ExitStack() as stack:
        original = stack.enter_context(open_session(task.model))
        first = None
        for config, note in ((PORTABLE, ""), (FLOAT_QDQ, "x64quantprecision fails here (onnxruntime): Q/DQ in float")):
            try:
                other = stack.enter_context(open_session(form, config=config))
                first = _score(task, original, other, given)
            except ModelError:
                continue
            return Said(judge(first).verdict.value, note, _figures(dataclasses.asdict(first)))
    return Said(None, "onnxruntime runs it in neither form")


def _score(task: Task, original: Session, other: Session, given: argparse.Namespace) -> Any:
    data = open_data(task.data, input_specs(oc.load(task.model)), last="fill", limit=given.samples)
    _, evaluator = metric_named("accuracy", None)
    pair = [evaluator(lambda feeds, s=s: s.run(feeds_for(s, feeds)), data) for s in (original, other)]  # type: ignore[misc]
    return score("accuracy", pair[0], pair[1], max_drop=given.max_drop)


def elsewhere(
    engine: str, python: str, task: Task, form: pathlib.Path, given: argparse.Namespace, work: pathlib.Path
) -> Said:
    """Another provider, by `validate` in its interpreter."""
    report = work / "report.json"
    report.unlink(missing_ok=True)
    command = [python, "-m", "onnxcompress", "validate", task.model, form, "--data", task.data, "--metric", "accuracy"]
    command += ["--max-drop", str(given.max_drop), "--limit", str(given.samples), "--provider", engine, "-q"]
    environment = {**os.environ, "PYTHONPATH": os.fspath(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*map(os.fspath, command), "--json", os.fspath(report)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=work,
            timeout=given.timeout,
        )
    except subprocess.TimeoutExpired:
        return Said(None, f"took more than {given.timeout} s")
    if not report.is_file():
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return Said(None, lines[-1])
    row = json.loads(report.read_text(encoding="utf-8"))["providers"][0]
    if not row["ran"] or row["score"] is None:
        return Said(None, str(row["reason"] or "no score"))
    shares = row["macs"] or {}
    ran = f"{row['nodes'].get(engine, 0)} of {sum(row['nodes'].values())} nodes"
    ran += f", {shares.get(engine, 0):.0%} of MACs there" if shares else ""
    return Said(_verdict(row["score"]), ran, _figures(row["score"]))


def _verdict(found: Mapping[str, Any]) -> str:
    if found["bound"] is not None and found["bound"] <= found["max_drop"]:
        return "PASS"
    return "FAIL" if found["lower"] is not None and found["lower"] > found["max_drop"] else "INCONCLUSIVE"


def _figures(found: Mapping[str, Any]) -> str:
    text = f"{found['original']:.4f} -> {found['compressed']:.4f}"
    return text + (f", drop at most {found['bound']:.4f}" if found["bound"] is not None else "")


def compare(task: Task, form: str, out: pathlib.Path, given: argparse.Namespace, work: pathlib.Path) -> bool:
    """Print a row an engine and what follows; True when those that ran agree."""
    pythons = dict(entry.split("=", 1) for entry in given.python)
    said: dict[str, Said] = {}
    for engine in given.engine or ENGINES:
        if engine == "cpu":
            said[engine] = on_cpu(task, out, given)
        elif engine == "exact":
            said[engine] = exactly(task, out, given)
        else:
            said[engine] = elsewhere(engine, pythons.get(engine, sys.executable), task, out, given, work)
        one = said[engine]
        print(
            f"| {task.name} | {form} | {engine} | {one.verdict or 'not run'} | {one.figures} | {one.note} |", flush=True
        )
    ran = {engine: one for engine, one in said.items() if one.verdict is not None}
    reference = next(iter(ran.values()))
    differ = [engine for engine, one in ran.items() if one.verdict != reference.verdict]
    left = [engine for engine in said if engine not in ran]
    end = f"; not run: {', '.join(left)}" if left else ""
    if differ:
        why = "; ".join(f"{engine}: {ran[engine].verdict} ({ran[engine].figures})" for engine in differ)
        print(f"  -> DIFFERS from {next(iter(ran))} ({reference.verdict}): {why}{end}", flush=True)
    else:
        print(f"  -> the same on {', '.join(ran)}: {reference.verdict}{end}", flush=True)
    return not differ


def main() -> int:
    """Compress, run, compare; 1 where engines differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a model by name; may be repeated")
    parser.add_argument("--form", action="append", default=[], choices=list(FORMS), help="may be repeated")
    parser.add_argument("--engine", action="append", default=[], choices=ENGINES, help="may be repeated")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="interpreter of an engine")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--max-drop", type=float, default=0.05)
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one engine and form")
    given = parser.parse_args()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"CPU class {cpu_class()}{load}; {given.samples} samples, budget {given.max_drop}\n")
    print("| model | form | engine | verdict | accuracy | |\n|---|---|---|---|---|---|")
    same = True
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        for task in tasks(tuple(given.model), given.samples, work):
            for form in given.form or FORMS:
                out = work / f"{task.name}-{form}.onnx"
                needed = task.calibration if form == "int8" else None
                try:
                    oc.compress(task.model, {"passes": FORMS[form]}, out=out, calibration=needed)
                except OnnxCompressError as error:
                    print(f"| {task.name} | {form} | | not made | | {error} |", flush=True)
                    continue
                same &= compare(task, form, out, given, work)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
