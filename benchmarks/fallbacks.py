"""Every way in which a provider silently does not run: what ONNX Runtime says, and what onnxcompress says.

    python benchmarks/fallbacks.py --gpu PYTHON --cuda PYTHON --openvino PYTHON --qnn PYTHON

Each PYTHON is the interpreter of an environment of its own, with this project in it (`pip install -e . --no-deps` and
its dependencies): with onnxruntime-gpu alone (gpu), with `onnxruntime-gpu[cuda,cudnn]` (cuda), with
onnxruntime-openvino (openvino), with onnxruntime and onnxruntime-qnn (qnn). What needs an environment that is not given
is not run, and said so. Meant for a machine without a GPU; drivers and TensorRT 11 are stand-ins compiled here (gcc).
Prints one row a scenario and fails if one was told to have run that did not. About two minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import onnx

MODEL = pathlib.Path(__file__).resolve().parent.parent / "models" / "digits_cnn" / "model.onnx"

# What a careful user of ONNX Runtime alone would look at.
PLAIN = """
import json, sys, numpy as np, onnxruntime as ort
name, model, fallback, chain, options = json.loads(sys.argv[1])
found = {"listed": name in ort.get_available_providers()}
if name.startswith(("CUDA", "Tensorrt")):
    ort.preload_dlls()
try:
    if chain == "plugin":
        import onnxruntime_qnn as qnn
        ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
        chosen = ort.SessionOptions()
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
        chosen.add_provider_for_devices(devices[:1], {"backend_path": qnn.get_qnn_htp_path(), **options})
        session = ort.InferenceSession(model, chosen)
    else:
        given = [(name, options) if options else name, *(["CPUExecutionProvider"] if chain else [])]
        session = ort.InferenceSession(model, providers=given, enable_fallback=fallback)
    if chain == "epfail":
        class Failing:
            def __init__(self, inner): self.inner = inner
            def run(self, *given): raise ort.capi._pybind_state.EPFail("the device went away")
            def __getattr__(self, key): return getattr(self.inner, key)
        session._sess = Failing(session._sess)
    found["session"] = session.get_providers()
    session.run(None, {"image": np.zeros([1, 1, 8, 8], np.float32)})
    found["ran"] = True
    found["session"] = session.get_providers()
except Exception as error:
    found["error"] = type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0]
print("FOUND" + json.dumps(found))
"""

OURS = """
import json, sys
name, model, chain = json.loads(sys.argv[1])
from onnxcompress.validation.validate import validate
if chain == "epfail":
    import onnxruntime as ort
    from onnxcompress.runtime.session import open_session
    from onnxcompress.validation import place
    real = place.Place._start
    def start(self, choice, open_it):
        real(self, choice, open_it)
        if self.session is not None:
            inner = self.session.raw
            class Failing:
                def run(self, *given): raise ort.capi._pybind_state.EPFail("the device went away")
                def __getattr__(self, key): return getattr(inner_sess, key)
            inner_sess = inner._sess
            inner._sess = Failing()
    place.Place._start = start
try:
    result = validate(model, model, providers=[name], latency=False)
    row = next(row for row in result.to_json()["providers"])
    told = {key: row[key] for key in ("ran", "reason", "nodes", "macs", "kernels")}
    told["verdict"] = result.verdict.value
except Exception as error:
    told = {"ran": False, "reason": str(error), "verdict": type(error).__name__}
print("FOUND" + json.dumps(told))
"""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """`name`, `provider` (ONNX Runtime's name and ours), `where`: environment. `runs`: whether it truly runs there.

    `fallback`, `chain`, `options`: how ONNX Runtime alone is asked. `stand_in`: libraries compiled for it. `model`:
    "unnamed" for one whose free dimension has no name. `runs` is what is true of onnxcompress, not of ONNX Runtime.
    """

    name: str
    where: str
    provider: str
    ours: str
    fallback: int = 0
    chain: str = ""
    stand_in: str = ""
    runs: bool = False
    model: str = ""
    options: dict[str, str] = dataclasses.field(default_factory=dict)


CUDA, TRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
OPENVINO, QNN = "OpenVINOExecutionProvider", "QNNExecutionProvider"
HTP = {"htp_arch": "75", "soc_model": "57"}
SCENARIOS = [
    Scenario("no CUDA libraries, fallback on", "gpu", CUDA, "cuda", 1),
    Scenario("no CUDA libraries, fallback off", "gpu", CUDA, "cuda"),
    Scenario("no CUDA libraries, CPU behind it", "gpu", CUDA, "cuda", chain="cpu"),
    Scenario("no TensorRT, fallback on", "gpu", TRT, "tensorrt", 1),
    Scenario("no TensorRT, fallback off", "gpu", TRT, "tensorrt"),
    Scenario("TensorRT 11 where 10 is wanted, fallback on", "gpu", TRT, "tensorrt", 1, stand_in="libnvinfer.so.11"),
    Scenario("provider of another build", "gpu", OPENVINO, "openvino", 1),
    Scenario("two builds in one environment", "gpu", CUDA, "cuda", 1, stand_in="two builds"),
    Scenario("CUDA libraries, no driver, fallback on", "cuda", CUDA, "cuda", 1),
    Scenario("CUDA libraries, no driver, fallback off", "cuda", CUDA, "cuda"),
    Scenario("CUDA libraries, no TensorRT, fallback on", "cuda", TRT, "tensorrt", 1),
    Scenario("driver without a device, fallback on", "cuda", CUDA, "cuda", 1, stand_in="driver 13000 100 0"),
    Scenario("driver without a device, fallback off", "cuda", CUDA, "cuda", stand_in="driver 13000 100 0"),
    Scenario("driver and kernel module differ", "cuda", CUDA, "cuda", 1, stand_in="driver 13000 803 0"),
    Scenario("driver of CUDA 12, build for 13", "cuda", CUDA, "cuda", 1, stand_in="driver 12040 0 1"),
    Scenario("OpenVINO on a GPU there is not", "openvino", OPENVINO, "openvino:device_type=GPU", 1,
             options={"device_type": "GPU"}),
    Scenario("provider fails in the middle (EPFail)", "openvino", OPENVINO, "openvino", 1, chain="epfail"),
    Scenario("OpenVINO runs (control)", "openvino", OPENVINO, "openvino", runs=True),
    Scenario("QNN takes no node: unnamed free dimension", "qnn", QNN, "qnn", chain="plugin", options=HTP,
             model="unnamed"),
    Scenario("QNN and a free dimension (we fix it)", "qnn", QNN, "qnn", chain="plugin", options=HTP, runs=True),
    Scenario("QNN plugin not registered (we do), fallback on", "qnn", QNN, "qnn", 1, runs=True),
]  # fmt: skip


def main() -> int:
    """Print the table; 1 when something that did not run was told to have run, or the reverse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gpu", "cuda", "openvino", "qnn"):
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"interpreter of the environment {name}")
    given = vars(parser.parse_args())
    wrong = ran = 0
    print("| scenario | ONNX Runtime alone | onnxcompress | right |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for at, scenario in enumerate(SCENARIOS):
            python = given[scenario.where]
            if python is None:
                print(f"| {scenario.name} | not run: no --{scenario.where} | | |")
                continue
            place = pathlib.Path(folder, str(at))
            place.mkdir()
            environment = stand_in(scenario.stand_in, place, python)
            if environment is None:
                print(f"| {scenario.name} | not run: its stand-in could not be compiled | | |")
                continue
            model = str(unnamed(place) if scenario.model else MODEL)
            ask = [scenario.provider, model, scenario.fallback, scenario.chain, scenario.options]
            plain, log = child(python, PLAIN, ask, environment)
            ours, _ = child(python, OURS, [scenario.ours, model, scenario.chain], environment)
            right = ours.get("ran") is scenario.runs and (ours.get("verdict") == "PASS") is scenario.runs
            wrong, ran = wrong + (not right), ran + 1
            print(
                f"| {scenario.name} | {words(plain, log)} | {verdict(ours)} | {'yes' if right else '**NO**'} |",
                flush=True,
            )
    print(f"\n{ran} of {len(SCENARIOS)} scenarios run, {wrong} wrong")
    return 1 if wrong else 0


def child(python: str, code: str, ask: list[object], environment: dict[str, str]) -> tuple[dict[str, object], str]:
    """What the code found, and its last line on stderr."""
    command = [python, "-c", code, json.dumps(ask)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    found = re.search(r"FOUND(.*)", done.stdout)
    if found is None:
        return {"error": f"ended with status {done.returncode}"}, done.stderr
    return dict(json.loads(found.group(1))), done.stderr


def words(found: dict[str, object], log: str) -> str:
    """One cell for ONNX Runtime alone."""
    listed = "lists it" if found.get("listed") else "does not list it"
    session = [str(name).replace("ExecutionProvider", "") for name in found.get("session") or ()]  # type: ignore[attr-defined]
    if "error" in found:
        return f"{listed}; raises {str(found['error'])[:90]}".replace("|", "/")
    logged = "a line in the log" if re.search(r"\[[EW]:onnxruntime|EP Error", log) else "silent"
    return f"{listed}; runs without an error, session says {', '.join(session)} ({logged})"


def verdict(found: dict[str, object]) -> str:
    """One cell for onnxcompress."""
    if found.get("ran"):
        return f"ran: nodes {found['nodes']}, kernels {found['kernels']}"
    return f"{found.get('verdict')}, did not run: {found.get('reason') or found.get('error')}".replace("|", "/")


def stand_in(kind: str, folder: pathlib.Path, python: str) -> dict[str, str] | None:
    """The environment variables under which `kind` is found; None where there is no compiler."""
    if not kind:
        return {}
    if kind == "two builds":
        metadata = folder / "onnxruntime-1.0.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 1.0.0\n")
        return {"PYTHONPATH": str(folder)}
    code = "int stand_in(void) { return 0; }\n"
    name = kind
    if kind.startswith("driver"):
        version, start, count = kind.split()[1:]
        name = "libcuda.so.1"
        code = f"""
        int cuInit(unsigned flags) {{ return {start}; }}
        int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}
        int cuDeviceGetCount(int *n) {{ *n = {count}; return 0; }}
        int cuDeviceGetName(char *name, int n, int d) {{ name[0] = 'G'; name[1] = 0; return 0; }}
        """
        have = {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGetName"}
        code += "".join(f"int {symbol}(void) {{ return 100; }}\n" for symbol in wanted(python) if symbol not in have)
    (folder / "stand_in.c").write_text(code)
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(folder / "stand_in.c")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def unnamed(folder: pathlib.Path) -> pathlib.Path:
    """The model with a free dimension that has no name."""
    model = onnx.load(MODEL)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
    del model.graph.value_info[:]
    onnx.save(model, folder / "unnamed.onnx")
    return folder / "unnamed.onnx"


def wanted(python: str) -> list[str]:
    """Functions of the driver that the CUDA provider is linked against."""
    code = "import onnxruntime, os; print(os.path.dirname(onnxruntime.__file__))"
    root = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    file = os.path.join(root, "capi", "libonnxruntime_providers_cuda.so")
    done = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True)
    return sorted(set(re.findall(r"\bU (cu[A-Z]\w*)", done.stdout)))


if __name__ == "__main__":
    sys.exit(main())
