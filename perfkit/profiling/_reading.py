"""A profile, or a report of steps, read back from JSON: what is none is refused with where it is not."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perfkit._errors import InvalidInputError
from perfkit._quantity import Quantity
from perfkit.profiling._profile import SCHEMA_VERSION, Profile
from perfkit.profiling._step_data import SCHEMA_VERSION as STEPS_VERSION
from perfkit.profiling._step_data import Steps
from perfkit.profiling._time_data import Time


def from_json(source: str | Path) -> Profile:
    """The profile that `Profile.to_json` wrote.

    Args:
        source: the path of the file, or the JSON itself.

    Raises:
        InvalidInputError: no such file, no JSON, no profile, or one of another version.
    """
    return from_dict(*_loaded(source, "the profile", "perfkit profile --json"))


def steps_from_json(source: str | Path) -> Steps:
    """The report that `Steps.to_json` wrote, of one process.

    Args:
        source: the path of the file, or the JSON itself.

    Raises:
        InvalidInputError: no such file, no JSON, no such report, or one of another version.
    """
    data, name = _loaded(source, "the report", "perfkit.profiling.steps")
    if not isinstance(data, Mapping) or not {"schema_version", "warmup", "timeline"} <= set(data):
        raise InvalidInputError(f"{name} holds no report of one process' steps: perfkit.profiling.steps writes them")
    if (version := data["schema_version"]) != STEPS_VERSION:
        raise InvalidInputError(
            f"{name} is a report of version {version!r}, this perfkit reads version {STEPS_VERSION}"
        )
    return _read(Steps, data, name)


def _loaded(source: str | Path, what: str, writer: str) -> tuple[Any, str]:
    """What the JSON holds, and what to call it in an error."""
    if isinstance(source, str) and source.lstrip().startswith("{"):
        text, name = source, what
    else:
        name = str(source)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"cannot read {name}: {error}") from error
    try:
        return json.loads(text), name
    except ValueError as error:
        raise InvalidInputError(f"{name} is not JSON: {error}; expected what `{writer}` writes") from error


def from_dict(data: Any, name: str = "the profile") -> Profile:
    """The profile that `Profile.to_dict` returned.

    Raises:
        InvalidInputError: it is no profile, or one of another version.
    """
    if not isinstance(data, Mapping) or not {"schema_version", "ceilings", "findings"} <= set(data):
        raise InvalidInputError(f"{name} holds no profile: expected what `perfkit profile --json` writes")
    if (version := data["schema_version"]) != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "update perfkit to read it" if newer else "profile again"
        raise InvalidInputError(
            f"{name} is a profile of version {version!r}, this perfkit reads version {SCHEMA_VERSION}: {advice}"
        )
    return _read(Profile, data, name)


def _read(hint: Any, data: Any, where: str) -> Any:
    """`data` as the type says; `where` tells in an error which part of the whole it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if data is None else _read(kind, data, where)
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint), data, where)
    if origin is tuple:
        _check(isinstance(data, list), "a list", data, where)
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if origin is dict:
        _check(isinstance(data, Mapping), "an object", data, where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if hint is float:
        # A number that was not finite was written as null.
        _check(data is None or (isinstance(data, (int, float)) and not isinstance(data, bool)), "a number", data, where)
        return math.nan if data is None else float(data)
    wanted = {str: "a text", int: "a whole number", bool: "true or false"}[hint]
    _check(isinstance(data, hint) and not (hint is int and isinstance(data, bool)), wanted, data, where)
    return data


def _object(kind: type, data: Any, where: str) -> Any:
    _check(isinstance(data, Mapping), "an object", data, where)
    hints = _hints(kind)
    later = {"as_one"} if kind is Time else set()  # which profiles of before do not have
    for problem, names in (("lacks", set(hints) - set(data) - later), ("has an unknown", set(data) - set(hints))):
        if names:
            raise InvalidInputError(f"{where} {problem} {', '.join(sorted(map(str, names)))}: not a {kind.__name__}")
    values = {name: _read(hint, data[name], f"{where}.{name}") for name, hint in hints.items() if name in data}
    if kind is Quantity:
        if values["value"] is not None and values["unavailable"] is not None:
            raise InvalidInputError(f"{where} has a value and a reason for having none")
        if values["value"] is None and values["unavailable"] is None:
            values["value"] = math.nan
    return kind(**values)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(right: bool, wanted: str, data: Any, where: str) -> None:
    if not right:
        raise InvalidInputError(f"{where}: expected {wanted}, found {str(data)[:60]!r}")
