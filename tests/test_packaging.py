"""What is installed is what is here: passes on disk, entry points and a built wheel agree; no file names a machine."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from typing import Any

import pytest

from onnxcompress import registry
from tests.house import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = (
    int(importlib.metadata.version("setuptools").split(".")[0]) if importlib.util.find_spec("setuptools") else 0
)
NEEDED = int(re.search(r"setuptools>=(\d+)", PROJECT["build-system"]["requires"][0])[1])  # type: ignore[index]


def tracked() -> list[pathlib.Path]:
    """The files of the repository; of a copy without one, everything that is not made by a tool."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    made = {"build", "dist", "__pycache__", "onnxcompress.egg-info"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part in made or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def sources(folder: str, root: pathlib.Path = ROOT) -> set[str]:
    """The Python files in a folder, as the package names them; the symbolic link to passes/ counts once."""
    prefix = "onnxcompress/passes" if folder == "passes" else folder
    found = {path.relative_to(root / folder).as_posix() for path in (root / folder).rglob("*.py")}
    return {f"{prefix}/{name}" for name in found if not (folder == "onnxcompress" and name.startswith("passes/"))}


def pass_files() -> set[str]:
    """The files of passes/ that define a pass: a class with a `name` of its own, as no part that passes share has."""
    found = set()
    for path in (ROOT / "passes").glob("*.py"):
        for item in ast.parse(path.read_text()).body:
            own = item.body if isinstance(item, ast.ClassDef) else []
            if any(isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "name" for part in own):
                found.add(path.stem)
    return found


def test_every_pass_on_disk_has_its_entry_point_and_each_leads_to_a_pass() -> None:
    declared: dict[str, str] = PROJECT["project"]["entry-points"][registry.GROUP]
    assert {name: target.partition(":")[0] for name, target in declared.items()} == {
        stem.replace("_", "-"): f"onnxcompress.passes.{stem}" for stem in pass_files()
    }
    for name in declared:
        kind = registry.load(name)
        assert kind.name == name
        assert (kind.__doc__ or "").strip()
    installed = {e.name for e in importlib.metadata.entry_points(group=registry.GROUP) if e.value in declared.values()}
    assert installed == set(declared)


def test_files_of_passes_are_one_pass_each_or_a_package_of_parts() -> None:
    loose = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert loose == pass_files()


def test_setup_lists_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__name__": "__main__"})
    wanted = {name.rpartition("/")[0].replace("/", ".") for name in sources("onnxcompress") | sources("passes")}
    assert set(given["packages"]) == wanted
    assert len(given["packages"]) == len(wanted)
    assert given["package_dir"] == {"onnxcompress.passes": "passes"}
    for name in wanted:
        folder = ROOT / name.replace("onnxcompress.passes", "passes").replace(".", "/")
        assert (folder / "__init__.py").is_file(), f"{name} is no package"


def copy_of_the_repository(target: pathlib.Path) -> pathlib.Path:
    for path in tracked():
        if path.is_symlink():
            continue
        place = target / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return target


@pytest.mark.skipif(SETUPTOOLS < NEEDED, reason=f"a wheel needs setuptools {NEEDED}")
def test_a_wheel_holds_every_source_and_recipe(tmp_path: pathlib.Path) -> None:
    here = copy_of_the_repository(tmp_path / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(here),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    recipes = {f"onnxcompress/recipes/{path.name}" for path in (ROOT / "onnxcompress" / "recipes").glob("*.yaml")}
    assert names == sources("onnxcompress", here) | sources("passes", here) | recipes | {"onnxcompress/py.typed"}


def test_the_engine_imports_no_pass_and_a_pass_neither_the_command_line_nor_another_pass() -> None:
    def imported(path: pathlib.Path) -> set[str]:
        found = set()
        for item in ast.walk(ast.parse(path.read_text())):
            if isinstance(item, ast.ImportFrom):
                found.add(item.module or "")
            elif isinstance(item, ast.Import):
                found |= {alias.name for alias in item.names}
        return found

    for path in (ROOT / "onnxcompress").rglob("*.py"):
        if "passes" not in path.relative_to(ROOT / "onnxcompress").parts:
            assert not any(name.startswith(("onnxcompress.passes", "passes")) for name in imported(path)), path
    others = {f"onnxcompress.passes.{stem}" for stem in pass_files()}
    for path in (ROOT / "passes").rglob("*.py"):
        names = imported(path)
        assert not any(name.startswith("onnxcompress.cli") for name in names), path
        assert not names & others, path


def test_only_light_modules_are_imported_before_a_command_runs() -> None:
    for file in ("onnxcompress/__init__.py", "onnxcompress/__main__.py", "onnxcompress/cli/__init__.py"):
        top = [
            item for item in ast.parse((ROOT / file).read_text()).body if isinstance(item, ast.Import | ast.ImportFrom)
        ]
        names = {getattr(item, "module", None) or item.names[0].name for item in top}
        assert names <= {"__future__", "importlib", "sys", "typing", "click", "onnxcompress", "onnxcompress.cli"}


MACHINE = re.compile(rb"(?<![\w.])/(?:work|home|root|Users|mnt|data)/[A-Za-z0-9_.-]+|[A-Za-z]:\\Users\\")
REGISTRY = re.compile(rb"https?://[^\s\"')>]*(?:simple/?\b|artifactory|nexus|devpi|:\d{4,5})")


def test_no_file_names_a_path_of_a_machine_or_a_private_registry() -> None:
    this = pathlib.Path(__file__)
    for path in tracked():
        if path.resolve() == this.resolve():
            continue
        found = MACHINE.findall(path.read_bytes()) + REGISTRY.findall(path.read_bytes())
        assert not found, f"{path.relative_to(ROOT)}: {found[:3]}"


def test_dependencies_have_lower_bounds_and_no_pins_and_no_runtime_is_forced() -> None:
    needed: list[str] = PROJECT["project"]["dependencies"]
    assert all(re.fullmatch(r"[A-Za-z-]+>=[\d.]+", entry) for entry in needed)
    assert not any(entry.startswith("onnxruntime") for entry in needed)
    extras = PROJECT["project"]["optional-dependencies"]
    assert [entry.partition(">")[0] for entry in extras["cpu"] + extras["gpu"]] == ["onnxruntime", "onnxruntime-gpu"]


def test_version_is_one_number() -> None:
    import onnxcompress

    assert onnxcompress.__version__ == PROJECT["project"]["version"]


def test_the_link_for_type_checkers_leads_to_passes() -> None:
    link = ROOT / "onnxcompress" / "passes"
    assert link.is_symlink() is False or link.resolve() == ROOT / "passes"
