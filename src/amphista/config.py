"""Settings: TOML recipes into frozen dataclasses, overrides, and back to what ran.

Flat sections are dataclass fields; only differences from the defaults are written. An unknown key is an error that
names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from amphista.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
SHOWN_CHARACTERS = 80


def read_recipe(path: Path) -> dict[str, Any]:
    """A TOML file as nested dicts."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `section.key=value` strings; values are TOML, bare words are strings."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for override in overrides:
        name, found, text = override.partition("=")
        if not found or not name:
            raise ConfigError(f"--set {override!r}: expected key=value, for example optimizer.learning_rate=5e-4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        place = merged
        *sections, key = name.strip().split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override!r}: {section!r} is the value {place!r}, not a section")
        place[key] = value
    return merged


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A frozen dataclass from nested mappings; raises ConfigError on unknown keys and wrong types."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown setting {name!r}: {hint}")
        arguments[key] = _convert(value, hints[key], name)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where or kind.__name__}: {error}") from error


def _convert(value: Any, hint: Any, name: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, name)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(value, next(option for option in options if option is not type(None)), name)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} is {_shown(value)}: expected one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if hint is Any:
        return value
    if origin in (list, tuple, dict):
        return _convert_container(value, hint, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise ConfigError(f"{name} is {_shown(value)}: expected {hint.__name__}")
    return value


def _convert_container(value: Any, hint: Any, name: str) -> Any:
    """A list, tuple or section, its elements of the type the hint gives them."""
    origin, elements = get_origin(hint), get_args(hint)
    if not isinstance(value, (list, tuple) if origin is tuple else origin):
        raise ConfigError(f"{name} is {_shown(value)}: expected {'a section' if origin is dict else 'a list'}")
    if isinstance(value, dict):
        return {key: _convert(element, elements[1], f"{name}.{key}") for key, element in value.items()}
    return origin(_convert(element, elements[0], f"{name}[{index}]") for index, element in enumerate(value))


def _shown(value: Any) -> str:
    """A value in an error, cut short."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
