"""The JSON Schemas of `Report.to_json()` and `Profile.to_json()`, generated from the dataclasses.

`python -m perfkit.reporting.schema` prints the report's, `python -m perfkit.reporting.schema profile` the profile's.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import sys
import types
import typing
from typing import Any

from perfkit._quantity import Quantity
from perfkit._report import Report
from perfkit.profiling._profile import Profile

# Set by optimize itself, so never NaN or infinite; every other float is measured, and one that is not finite is null.
ALWAYS_FINITE = frozenset({"apply_s", "confidence", "factor", "max_drop", "optimizing_s", "seconds", "tolerance"})
_SCALARS = {str: "string", bool: "boolean", int: "integer"}


def schema(kind: type[Report] | type[Profile] = Report) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that the `to_dict()` of every report, or every profile, meets."""
    definitions: dict[str, Any] = {}
    _define(kind, definitions)
    root = definitions.pop(kind.__name__)
    root["properties"]["schema_version"]["const"] = kind.__dataclass_fields__["schema_version"].default
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"perfkit {kind.__name__.lower()}",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _define(kind: type, definitions: dict[str, Any]) -> dict[str, str]:
    """Add `kind` and what it is made of to `definitions`; a reference to it."""
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}
        summary, about = _documented(kind)
        hints = typing.get_type_hints(kind)
        properties = {}
        for field in dataclasses.fields(kind):
            properties[field.name] = _type(hints[field.name], field.name, definitions)
            if field.name in about:
                properties[field.name]["description"] = about[field.name]
        definitions[kind.__name__] |= {
            "description": summary,
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        if kind is Quantity:
            # A number that is not finite is null without a reason, so both may be null but never neither.
            either = [{"properties": {name: {"type": "null"}}} for name in ("value", "unavailable")]
            definitions[kind.__name__]["anyOf"] = either
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _type(hint: Any, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _define(hint, definitions)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if hint is float:
        return {"type": "number" if name in ALWAYS_FINITE else ["number", "null"]}
    if hint is types.NoneType:
        return {"type": "null"}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type(argument, name, definitions) for argument in arguments]}
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return {"type": "array", "items": _type(arguments[0], name, definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1], name, definitions)}
    raise AssertionError(f"{name}: no JSON Schema is known for {hint}")


def _documented(kind: type) -> tuple[str, dict[str, str]]:
    """The first line of a dataclass' docstring, and what its Args section says of each field."""
    summary, _, rest = inspect.getdoc(kind).partition("\n")
    about = {}
    for names, told in re.findall(
        r"^    ([\w, ]+): ((?:.+)(?:\n        .+)*)", rest.partition("Args:\n")[2], re.MULTILINE
    ):
        about |= dict.fromkeys(names.split(", "), " ".join(told.split()))
    return summary, about


if __name__ == "__main__":
    print(json.dumps(schema(Profile if sys.argv[1:] == ["profile"] else Report), indent=2))
