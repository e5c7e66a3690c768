"""A recipe: an ordered list of passes with their parameters, from YAML or Python, checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
import reprlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from onnxcompress import registry
from onnxcompress.contract import Pass, Select, check_bounds
from onnxcompress.errors import RecipeError
from onnxcompress.model import durable

VERSION = 1
TARGETS = ("cpu", "cuda", "tensorrt", "portable")
_KEYS = ("version", "target", "seed", "prefer", "on_error", "passes")
OnError = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of a recipe. `on_error`: stop the run or skip the pass when it fails."""

    run: Pass
    on_error: OnError = "stop"

    @property
    def name(self) -> str:
        """The pass's name; the module path for a foreign one."""
        return self.run.path if isinstance(self.run, registry.Foreign) else self.run.name

    def canonical(self) -> dict[str, Any]:
        """The step as plain data: the same for the same work, whatever its source was written in.

        A file it reads stands there by its content.
        """
        return {"pass": self.name, **parameters(self.run), **_contents(self.run)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An ordered list of passes and what holds for all of them.

    `target`, `seed`, `prefer` are None where the recipe leaves them to the caller.
    """

    steps: tuple[Step, ...]
    name: str = "recipe"
    target: str | None = None
    seed: int | None = None
    prefer: str | None = None

    @staticmethod
    def load(source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any] | Recipe | Pass) -> Recipe:
        """A recipe from a built-in name, a YAML file, the mapping such a file holds, a list of passes, or one pass.

        Raises:
            RecipeError: one line that names the pass and key that is wrong, with a suggestion.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Pass):
            source = [source]
        if isinstance(source, Mapping):
            return _from_mapping(source, "recipe")
        if isinstance(source, str | os.PathLike):
            return _from_mapping(*_read(source))
        if isinstance(source, Sequence) and not isinstance(source, bytes):
            return _from_mapping({"passes": source}, "recipe")
        raise RecipeError(f"a recipe is a name, a file, a mapping or a list of passes, not {type(source).__name__}")

    def digest(self) -> str:
        """sha256 (hex) of the canonical steps."""
        text = json.dumps([step.canonical() for step in self.steps], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def prefix_digest(self, count: int) -> str:
        """Digest of the first `count` steps."""
        return dataclasses.replace(self, steps=self.steps[:count]).digest()


def built_in() -> dict[str, str]:
    """Names of the recipes that come with the package, each with the first comment line of its file."""
    folder = importlib.resources.files("onnxcompress") / "recipes"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name[:-5]] = entry.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return found


def parameters(of: Pass) -> dict[str, Any]:
    """The parameters of a pass as plain data."""
    return {f.name: _plain(getattr(of, f.name)) for f in dataclasses.fields(of)}


def _contents(of: Pass) -> dict[str, str]:
    """The parameters of a pass that name files, each with the digest of what is there."""
    named = {f.name: getattr(of, f.name) for f in dataclasses.fields(of) if f.metadata.get("file")}
    return {name: durable.content_digest(pathlib.Path(value)) for name, value in named.items() if value}


def _plain(value: Any) -> Any:
    if isinstance(value, Select):
        return {k: _plain(v) for k, v in dataclasses.asdict(value).items() if v}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _shown(value: Any) -> str:
    """A value as a message quotes it: short, however often YAML aliases repeat it."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 2, 80
    return short.repr(value)


def _read(source: str | os.PathLike[str]) -> tuple[Any, str]:
    """The content of a recipe file or built-in recipe, and its name."""
    import yaml

    known = built_in()
    text = os.fspath(source)
    path = pathlib.Path(text)
    if text in known:
        content = (importlib.resources.files("onnxcompress") / "recipes" / f"{text}.yaml").read_text(encoding="utf-8")
    elif os.path.isfile(path):  # False, where pathlib's raises, for a name no file can have
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{text}: cannot be read: {error}") from error
    else:
        raise RecipeError(
            f"{text}: neither a file nor a built-in recipe{registry.did_you_mean(text, known)}; "
            f"built in: {', '.join(known)}"
        )
    try:
        _refuse_repeated(yaml.compose(content, Loader=yaml.SafeLoader), text)
        return yaml.safe_load(content), path.stem if text not in known else text
    except yaml.YAMLError as error:
        raise RecipeError(f"{text}: is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list a thousand deep
        raise RecipeError(f"{text}: cannot be read as YAML: {error}") from error


def _refuse_repeated(root: Any, name: str) -> None:
    """Refuse a key that stands twice in one mapping: YAML would forget the first without a word.

    Raises:
        RecipeError: it names the key and the line.
    """
    seen: set[int] = set()  # an alias is the node it stands for, and may lie within itself
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        if node.id == "sequence":
            waiting += node.value
            continue
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            if isinstance(key.value, str):
                if (key.tag, key.value) in keys:
                    line = key.start_mark.line + 1
                    raise RecipeError(f"{name}: the key {_shown(key.value)} is given twice, again in line {line}")
                keys.add((key.tag, key.value))
            waiting += [key, value]


def _from_mapping(content: Any, name: str) -> Recipe:
    if not isinstance(content, Mapping):
        raise RecipeError(f"{name}: a recipe is a mapping with the key 'passes', not {type(content).__name__}")
    for key in content:
        if key not in _KEYS:
            hint = registry.did_you_mean(str(key), _KEYS)
            raise RecipeError(f"{name}: unknown key {_shown(key)}{hint}; known: {', '.join(_KEYS)}")
    if content.get("version", VERSION) != VERSION:
        raise RecipeError(
            f"{name}: version {_shown(content['version'])} is not known; this program reads version {VERSION}"
        )
    _choice(name, "target", content.get("target"), TARGETS)
    _choice(name, "prefer", content.get("prefer"), ("size", "speed"))
    _choice(name, "on_error", content.get("on_error"), ("stop", "skip"))
    seed = content.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise RecipeError(f"{name}: seed must be a whole number from 0, not {_shown(seed)}")
    passes = content.get("passes")
    if not isinstance(passes, Sequence) or isinstance(passes, str) or not passes:
        raise RecipeError(f"{name}: 'passes' must be a list of at least one pass")
    default: OnError = content.get("on_error") or "stop"
    steps = tuple(_step(entry, f"{name}: pass {i + 1}", default) for i, entry in enumerate(passes))
    return Recipe(steps, name, content.get("target"), seed, content.get("prefer"))


def _choice(name: str, key: str, value: Any, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        hint = registry.did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise RecipeError(f"{name}: {key} must be one of {', '.join(allowed)}, not {_shown(value)}{hint}")


def _step(entry: Any, where: str, default: OnError) -> Step:
    if isinstance(entry, Pass):
        return Step(entry, default)
    if isinstance(entry, str):
        name = entry
        given: Any = {}
    elif isinstance(entry, Mapping) and len(entry) == 1:
        name, given = next(iter(entry.items()))
        given = {} if given is None else given
    else:
        raise RecipeError(f"{where}: write a pass as its name, or as `name: {{parameter: value}}`, not {_shown(entry)}")
    if not isinstance(name, str):
        raise RecipeError(f"{where}: a pass is named by a string, not {_shown(name)}")
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where} ({name}): its parameters must be a mapping, not {_shown(given)}")
    given = dict(given)
    on_error = given.pop("on_error", default)
    _choice(f"{where} ({name})", "on_error", on_error, ("stop", "skip"))
    if ":" in name:
        foreign = registry.Foreign(path=name)
        foreign.build()
        if given:
            raise RecipeError(f"{where} ({name}): takes no parameters")
        return Step(foreign, on_error)
    return Step(make_pass(registry.load(name), given, f"{where} ({name})"), on_error)


def make_pass(kind: type[Pass], given: Mapping[str, Any], where: str) -> Pass:
    """An instance of `kind` with checked parameters.

    Raises:
        RecipeError: an unknown parameter, a value of the wrong type or out of bounds.
    """
    import pydantic

    fields = {f.name: f for f in dataclasses.fields(kind)}
    types = _types(kind)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            hint = registry.did_you_mean(str(key), fields)
            raise RecipeError(f"{where}: unknown parameter {_shown(key)}{hint}; known: {', '.join(sorted(fields))}")
        if key == "select":
            values[key] = _select(value, where, kind)
            continue
        try:
            # `yes` and `no` are no numbers, though Python counts with them and finds True in (1, 2, 4, 8).
            strict = True if isinstance(value, bool) else None
            alien = strict and typing.get_origin(types[key]) is Literal and not _holds_bool(types[key])
            read = str(value) if alien else value
            values[key] = pydantic.TypeAdapter(types[key]).validate_python(read, strict=strict)
        except pydantic.ValidationError as error:
            said = error.errors()[0]["msg"]
            raise RecipeError(f"{where}: {key} = {_shown(value)}: {said[0].lower()}{said[1:]}") from error
        except pydantic.PydanticUserError as error:  # a third party's pass with an annotation pydantic cannot read
            raise RecipeError(f"{where}: {key}: its type cannot be checked: {error}") from error
        check_bounds(fields[key], values[key], where)
    return kind(**values)


def _holds_bool(choices: Any) -> bool:
    return any(isinstance(choice, bool) for choice in typing.get_args(choices))


def _types(kind: type[Pass]) -> dict[str, Any]:
    return typing.get_type_hints(kind, localns={"Select": Select})


def _select(value: Any, where: str, kind: type[Pass]) -> Select:
    if isinstance(value, Select):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: select must be a mapping with include, exclude or overrides, not {_shown(value)}")
    for key in value:
        if key not in ("include", "exclude", "overrides"):
            hint = registry.did_you_mean(str(key), ("include", "exclude", "overrides"))
            raise RecipeError(f"{where}: select: unknown key {_shown(key)}{hint}")
    patterns: dict[str, tuple[str, ...]] = {}
    for key in ("include", "exclude"):
        listed = value.get(key) or ()
        listed = (listed,) if isinstance(listed, str) else listed
        if not isinstance(listed, Sequence) or not all(isinstance(p, str) for p in listed):
            raise RecipeError(f"{where}: select: {key} must be a list of patterns, not {_shown(listed)}")
        patterns[key] = tuple(listed)
    overrides = value.get("overrides") or {}
    if not isinstance(overrides, Mapping) or not all(isinstance(v, Mapping) for v in overrides.values()):
        raise RecipeError(f"{where}: select: overrides must map patterns to parameters, not {_shown(overrides)}")
    checked: dict[str, Mapping[str, Any]] = {}
    for pattern, given in overrides.items():
        if "select" in given:
            raise RecipeError(f"{where}: select: overrides: {pattern}: a select inside a select has no meaning")
        made = make_pass(kind, given, f"{where}: select: overrides: {pattern}")
        checked[str(pattern)] = {key: getattr(made, key) for key in given}
    return Select(patterns["include"], patterns["exclude"], checked)
