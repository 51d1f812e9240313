"""`preset + overlay.toml + key=value` -> RunConfig, remembering where each value came from."""

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trinity.base.errors import UsageError, nearest
from trinity.config.base import Frozen
from trinity.config.run import EvalConfig, RunConfig


class Origin(NamedTuple):
    """A resolved value and the place that set it: "default", "preset nano", "overlay FILE" or "command line"."""

    value: Any
    source: str


def list_presets() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("trinity") / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def resolve(
    preset: str, overlays: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> tuple[RunConfig, dict[str, Origin]]:
    """Settings of a run and the origin of every value by dotted key.

    `preset` is the name of a shipped preset or the path of a TOML file. Raises UsageError with the key, what is allowed
    and the nearest match.
    """
    layers = [_read_preset(preset)]
    layers += [(f"overlay {path}", _read_toml(path)) for path in overlays]
    layers.append(("command line", _parse_overrides(overrides)))

    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, tree in layers:
        _merge(merged, tree, RunConfig, (), source, sources)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise UsageError(_explain(error.errors()[0], sources)) from None
    origins = {key: Origin(value, sources.get(key, "default")) for key, value in _leaves(config)}
    return config, origins


class _EvalOnly(Frozen):
    eval: EvalConfig


def override_eval(base: EvalConfig, overrides: Sequence[str]) -> tuple[EvalConfig, frozenset[str]]:
    """`base` with `eval.KEY=VALUE` overrides, and the keys that they set. Raises UsageError as `resolve` does."""
    merged: dict[str, Any] = {"eval": base.model_dump()}
    sources: dict[str, str] = {}
    _merge(merged, _parse_overrides(overrides), _EvalOnly, (), "command line", sources)
    try:
        config = _EvalOnly.model_validate(merged).eval
    except ValidationError as error:
        raise UsageError(_explain(error.errors()[0], sources)) from None
    return config, frozenset(key.removeprefix("eval.") for key in sources)


Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(schema: type[Settings], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings of another kind than a run's: a TOML file and key=value. Raises UsageError as `resolve` does."""
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, tree in ((str(path), _read_toml(path)), ("command line", _parse_overrides(overrides))):
        _merge(merged, tree, schema, (), source, sources)
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":  # of an entry of a list; others were found on the way here
            keys = _keys_at(schema, first["loc"][:-1])
            where, key = ".".join(str(part) for part in first["loc"][:-1]), str(first["loc"][-1])
            raise UsageError(
                f"{path}: {where} has no key {key!r}; it has {', '.join(keys)}{nearest(key, keys)}"
            ) from None
        raise UsageError(_explain(first, sources)) from None


def _keys_at(schema: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """Keys of the section at a place such as ("rephrase", 0)."""
    for part in place:
        if isinstance(part, str):
            annotation = schema.model_fields[part].annotation
            arguments = typing.get_args(annotation)
            schema = _section(annotation) or next(s for a in arguments if (s := _section(a)))
    return list(schema.model_fields)


def to_toml(config: RunConfig) -> str:
    """The resolved settings as TOML that `resolve` reads back to an equal RunConfig."""
    data = config.model_dump(mode="json", exclude_none=True)
    lines = [f"{key} = {_toml(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for section, values in data.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _read_preset(preset: str) -> tuple[str, dict[str, Any]]:
    if preset in list_presets():
        text = (resources.files("trinity") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
        return f"preset {preset}", tomllib.loads(text)
    path = Path(preset)
    if path.suffix == ".toml":
        return f"file {path}", _read_toml(path)
    names = list_presets()
    raise UsageError(
        f"there is no preset {preset!r}: use one of {', '.join(names)} or the path of a .toml file"
        + nearest(preset, names)
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no settings file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the settings file {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is not a setting; write key=value, such as optim.muon_lr=0.001")
        node = tree
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UsageError(f"{key} sets a part of a value that another override sets as a whole")
        node[leaf] = _parse_value(value.strip())
    return tree


def _parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((s for a in typing.get_args(annotation) if (s := _section(a))), None)
    return None


def _merge(
    into: dict[str, Any],
    tree: Mapping[str, Any],
    schema: type[BaseModel],
    path: tuple[str, ...],
    source: str,
    sources: dict[str, str],
) -> None:
    for key, value in tree.items():
        here = (*path, key)
        dotted = ".".join(here)
        if key not in schema.model_fields:
            where = f"section [{'.'.join(path)}] has" if path else "the settings have"
            raise UsageError(
                f"{source}: {where} no key {key!r}; "
                f"it has {', '.join(schema.model_fields)}{nearest(key, schema.model_fields)}"
            )
        section = _section(schema.model_fields[key].annotation)
        if section is None:
            into[key] = value
            sources[dotted] = source
        elif isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value, section, here, source, sources)
        else:
            raise UsageError(
                f"{source}: {dotted} is a section; set its keys, such as {dotted}.{next(iter(section.model_fields))}"
            )


def _leaves(config: BaseModel, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            found += _leaves(value, (*path, key))
        else:
            found.append((".".join((*path, key)), value))
    return found


def _explain(error: ErrorDetails, sources: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "settings"
    source = next((sources[k] for k in (key, *_prefixes(key)) if k in sources), None)
    prefix = f"{source}: " if source else ""
    if error["type"] == "missing":
        return f"{prefix}{key} is not set and has no default"
    if error["type"] == "extra_forbidden":
        return f"{prefix}{key} is not a known key"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    if error["type"] == "literal_error":
        allowed = str(error.get("ctx", {}).get("expected", ""))
        words = [w.strip(" '") for w in allowed.replace(" or ", ", ").split(",")]
        return f"{prefix}{key} = {value!r} is not one of {allowed}{nearest(str(value), words)}"
    if error["type"] == "too_short":
        return f"{prefix}{key} is empty; it needs at least one entry"
    if error["type"] == "tuple_type":
        return f"{prefix}{key} = {value!r} is no list; write it in brackets, such as '[\"{value}\"]'"
    if isinstance(value, dict):
        return f"{prefix}{key}: {message[0].lower()}{message[1:]}"
    return f"{prefix}{key} = {value!r}: {message[0].lower()}{message[1:]}"


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)
