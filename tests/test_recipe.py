"""A recipe says exactly what will run, or is refused in one line before anything does."""

from __future__ import annotations

import importlib.metadata
import pathlib
import time
from typing import Any

import pytest

from onnxcompress import Recipe, registry
from onnxcompress.contract import Select
from onnxcompress.errors import RecipeError
from onnxcompress.passes.magnitude_pruning import MagnitudePruning
from onnxcompress.passes.simplify import Simplify
from onnxcompress.passes.weight_sharing import WeightSharing
from onnxcompress.recipe import built_in
from tests.house import Scale


def written(folder: pathlib.Path, text: str) -> pathlib.Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def refused(source: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(source)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 1200
    return said


def test_yaml_and_python_mean_the_same(tmp_path: pathlib.Path) -> None:
    text = """
version: 1
target: portable
seed: 7
prefer: speed
on_error: skip
passes:
  - simplify
  - magnitude-pruning: {sparsity: 0.5, scope: layer}
  - weight-sharing: {bits: 2, select: {exclude: ["*head*"], overrides: {"*conv*": {bits: 8}}}, on_error: stop}
"""
    recipe = Recipe.load(written(tmp_path, text))
    select = Select(exclude=["*head*"], overrides={"*conv*": {"bits": 8}})
    passes = [Simplify(), MagnitudePruning(sparsity=0.5, scope="layer"), WeightSharing(bits=2, select=select)]
    assert [step.run for step in recipe.steps] == passes
    assert [step.on_error for step in recipe.steps] == ["skip", "skip", "stop"]
    assert (recipe.target, recipe.seed, recipe.prefer, recipe.name) == ("portable", 7, "speed", "recipe")
    assert recipe.digest() == Recipe.load(passes).digest()
    assert recipe.digest() != Recipe.load(passes[:2]).digest() == recipe.prefix_digest(2)
    assert Recipe.load(recipe) is recipe
    assert Recipe.load(passes[2]).steps[0].run is passes[2]


def test_built_in_recipes_load_and_say_what_they_do() -> None:
    known = built_in()
    assert set(known) >= {"int8", "int8-static", "lossless", "small"}
    for name, words in known.items():
        assert Recipe.load(name).name == name
        assert len(words) > 20
    assert [step.name for step in Recipe.load("small").steps] == ["simplify", "weight-sharing"]


def test_parameters_left_out_are_the_defaults_and_null_is_none() -> None:
    assert Recipe.load(["weight-sharing"]).steps[0].run == WeightSharing()
    assert Recipe.load([{"weight-sharing": None}]).steps[0].run == WeightSharing()
    assert Recipe.load([{"weight-sharing": {"clusters": None}}]).steps[0].run == WeightSharing()


def test_yaml_1e_3_is_a_number_though_yaml_reads_a_string(tmp_path: pathlib.Path) -> None:
    recipe = Recipe.load(written(tmp_path, "passes: [magnitude-pruning: {sparsity: 1e-3}]"))
    assert recipe.steps[0].run == MagnitudePruning(sparsity=0.001)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"pases": ["simplify"]}, ["'pases'", "did you mean 'passes'"]),
        ({"passes": ["simplify"], "sead": 1}, ["'sead'", "did you mean 'seed'"]),
        ({"passes": ["simplfy"]}, ["'simplfy'", "did you mean 'simplify'", "pip install"]),
        ({"passes": [{"weight-sharing": {"bit": 4}}]}, ["pass 1", "'bit'", "did you mean 'bits'"]),
        ({"passes": ["simplify", {"weight-sharing": {"bits": 3}}]}, ["pass 2", "bits = 3", "1, 2, 4 or 8"]),
        ({"passes": [{"weight-sharing": {"bits": True}}]}, ["bits = True", "1, 2, 4 or 8"]),
        ({"passes": [{"weight-sharing": {"clusters": 1}}]}, ["clusters must be at least 2, not 1"]),
        ({"passes": [{"weight-sharing": {"clusters": 2.5}}]}, ["clusters = 2.5", "integer"]),
        ({"passes": [{"magnitude-pruning": {"sparsity": 1.5}}]}, ["sparsity must be at most 1.0, not 1.5"]),
        ({"passes": [{"magnitude-pruning": {"sparsity": float("nan")}}]}, ["sparsity must be at least 0.0"]),
        ({"passes": [{"magnitude-pruning": {"sparsity": True}}]}, ["sparsity = True", "number"]),
        ({"passes": [{"magnitude-pruning": {"sparsity": "half"}}]}, ["sparsity = 'half'", "number"]),
        ({"passes": [{"magnitude-pruning": {"scope": "layers"}}]}, ["scope = 'layers'", "'global' or 'layer'"]),
        ({"passes": [{"weight-sharing": {"select": {"exclud": "a"}}}]}, ["'exclud'", "did you mean 'exclude'"]),
        ({"passes": [{"weight-sharing": {"select": ["a"]}}]}, ["select must be a mapping"]),
        ({"passes": [{"weight-sharing": {"select": {"include": 3}}}]}, ["include must be a list of patterns"]),
        ({"passes": [{"weight-sharing": {"select": {"overrides": {"a": 3}}}}]}, ["overrides must map"]),
        ({"passes": [{"weight-sharing": {"select": {"overrides": {"a": {"bits": 5}}}}}]}, ["overrides: a", "bits = 5"]),
        ({"passes": [{"weight-sharing": {"select": {"overrides": {"a": {"bit": 4}}}}}]}, ["'bit'", "'bits'"]),
        ({"passes": [{"weight-sharing": {"select": {"overrides": {"a": {"select": {}}}}}}]}, ["no meaning"]),
        ({"passes": [{"magnitude-pruning": {"select": {"overrides": {"a": {"normalize": "rms"}}}}}]}, ["normalize"]),
        ({"passes": [{"simplify": {}, "weight-sharing": {}}]}, ["pass 1", "name: {parameter: value}"]),
        ({"passes": [{"simplify": [1]}]}, ["parameters must be a mapping"]),
        ({"passes": [{3: {}}]}, ["named by a string"]),
        ({"passes": [Simplify]}, ["pass 1"]),
        ({"passes": []}, ["at least one pass"]),
        ({"passes": "simplify"}, ["at least one pass"]),
        ({}, ["at least one pass"]),
        ({"passes": ["simplify"], "version": 2}, ["version 2", "version 1"]),
        ({"passes": ["simplify"], "target": "gpu"}, ["target", "cpu, cuda, tensorrt, portable"]),
        ({"passes": ["simplify"], "prefer": "sped"}, ["did you mean 'speed'"]),
        ({"passes": ["simplify"], "seed": -1}, ["seed"]),
        ({"passes": ["simplify"], "seed": True}, ["seed"]),
        ({"passes": ["simplify"], "on_error": "ignore"}, ["on_error", "stop, skip"]),
        ({"passes": [{"simplify": {"on_error": "skp"}}]}, ["did you mean 'skip'"]),
        (3, ["a name, a file, a mapping or a list"]),
        (b"passes: [simplify]", ["a name, a file, a mapping or a list"]),
        ("no_such_recipe.yaml", ["neither a file nor a built-in recipe", "lossless"]),
        ("smal", ["did you mean 'small'"]),
        ("x" * 900, ["neither a file"]),  # longer than any file's name
        ("nul\0byte", ["neither a file"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(source: Any, words: list[str]) -> None:
    said = refused(source)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    "text",
    [
        "passes: [!!python/object/apply:os.system ['touch hacked']]",
        "!!python/object/new:subprocess.Popen [['touch', 'hacked']]",
        "passes: [simplify: !!python/name:os.system ]",
        "passes: [*nowhere]",
        "passes: [simplify",
        "\x00",
        "passes: [simplify]\n---\npasses: [simplify]",
        "just text",
        "",
        "[simplify]",
        "seed: " + "9" * 5000,
        "[" * 100_000,
    ],
)
def test_hostile_and_broken_yaml_is_refused(text: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(written(tmp_path, text))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("passes: [simplify]\npasses: [weight-sharing]", "passes", 2),
        ("passes:\n  - weight-sharing:\n      bits: 4\n      clusters: 9\n      bits: 8", "bits", 5),
        ("passes: [weight-sharing: {select: {exclude: a, exclude: b}}]", "exclude", 1),
    ],
)
def test_a_key_given_twice_is_not_forgotten(text: str, key: str, line: int, tmp_path: pathlib.Path) -> None:
    said = refused(written(tmp_path, text))
    assert f"the key '{key}' is given twice, again in line {line}" in said


def test_a_billion_laughs_are_not_told_again(tmp_path: pathlib.Path) -> None:
    deep = "[x, x, x, x, x, x, x, x, x, x]"
    text = (
        "passes:\n  - &a0 "
        + deep
        + "\n"
        + "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    )
    for key in ("target", "seed", "prefer", "on_error", "version"):
        start = time.perf_counter()
        refused(written(tmp_path, text + f"{key}: *a11\n"))
        assert time.perf_counter() - start < 2


def test_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00passes")
    assert "cannot be read" in refused(binary)
    assert "neither a file" in refused(tmp_path)


# Passes of onnx-ir and onnxscript ---------------------------------------------------------------------------------


def test_a_pass_of_onnx_ir_stands_in_a_recipe_by_its_path() -> None:
    path = "onnx_ir.passes.common:IdentityEliminationPass"
    step = Recipe.load([{path: {"on_error": "skip"}}]).steps[0]
    assert (step.name, step.on_error) == (path, "skip")
    assert step.canonical() == {"pass": path, "select": {}, "path": path}
    assert Recipe.load([path]).steps[0].run == step.run


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("os:system", "only passes of onnx_ir and onnxscript"),
        ("onnx_ir_evil.passes:Pass", "only passes of onnx_ir and onnxscript"),
        ("onnx_ir.passes.common:Nonesuch", "cannot be used"),
        ("onnx_ir.nowhere:Pass", "cannot be used"),
        ("onnx_ir.passes.common:", "cannot be used"),
        ("onnx_ir.passes:PassBase", "cannot be used"),
        ("onnx_ir.passes.common:identity_elimination", "is not an onnx_ir pass"),
        ("onnx_ir._io:load", "is not an onnx_ir pass"),
    ],
)
def test_other_module_paths_are_refused(path: str, words: str) -> None:
    assert words in refused([path])


def test_a_pass_of_onnx_ir_takes_no_parameters() -> None:
    assert "takes no parameters" in refused([{"onnx_ir.passes.common:IdentityEliminationPass": {"x": 1}}])


# Passes in Python -------------------------------------------------------------------------------------------------


def test_bounds_hold_in_python_too() -> None:
    for make in (
        lambda: WeightSharing(bits=3),  # type: ignore[arg-type]
        lambda: WeightSharing(clusters=257),
        lambda: MagnitudePruning(sparsity=-0.1),
        lambda: MagnitudePruning(sparsity="half"),  # type: ignore[arg-type]
        lambda: WeightSharing(select=Select(overrides={"*": {"bitz": 2}})),
        lambda: WeightSharing(select=Select(overrides={"*": {"bits": 3}})),
        lambda: Scale(factor=0.0),
    ):
        with pytest.raises(RecipeError):
            make()


def test_one_pattern_as_a_string_is_one_pattern() -> None:
    assert Select(include="*conv*").include == ("*conv*",)  # its letters would match everything


def test_installed_passes() -> None:
    assert set(registry.names()) >= {
        "simplify",
        "magnitude-pruning",
        "weight-sharing",
        "dynamic-quantization",
        "static-quantization",
    }
    assert registry.load("weight-sharing") is WeightSharing


def test_an_entry_point_that_is_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        importlib.metadata.EntryPoint("gone", "nowhere.at_all:Pass", registry.GROUP),
        importlib.metadata.EntryPoint("wrong", "pathlib:Path", registry.GROUP),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    assert "'gone' (nowhere.at_all:Pass) cannot be imported" in refused(["gone"])
    assert "is not a subclass" in refused(["wrong"])
