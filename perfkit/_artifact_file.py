"""The file of `Result.save`, apart from its tensors: how it is written and read, and what is refused as another's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import perfkit
from perfkit._environment import Environment
from perfkit._errors import InvalidInputError

SCHEMA_VERSION = 1
HEADER = "perfkit"
SHOWN = 3


@contextmanager
def as_bad_input(path: Path) -> Iterator[None]:
    """Within it a file is written.

    Raises:
        InvalidInputError: it cannot be.
    """
    try:
        yield
    except (OSError, SafetensorError, KeyError, AttributeError) as error:  # the latter of a dtype that is not known
        raise InvalidInputError(f"{path} cannot be written: {type(error).__name__}: {error}") from error


def header(path: Path) -> dict[str, Any]:
    """What a file says of itself.

    Raises:
        InvalidInputError: it is no file of `Result.save`, or of a later perfkit.
    """
    if not os.path.isfile(path):
        raise InvalidInputError(f"there is no file {path}: expected one that result.save wrote")
    try:
        with safe_open(path, framework="np") as file:
            header = (file.metadata() or {}).get(HEADER)
    except SafetensorError as error:
        raise InvalidInputError(f"{path} is no file that result.save wrote, or not whole ({error})") from error
    if header is None:
        raise InvalidInputError(f"{path} is a safetensors file, but none that result.save wrote")
    try:
        about = json.loads(header)
        newer = about["schema_version"] > SCHEMA_VERSION
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidInputError(
            f"{path} is no file that result.save wrote: its header is another's ({error})"
        ) from error
    if newer:
        raise InvalidInputError(
            f"{path} was written by perfkit {about['report']['perfkit_version']}, in a form that this one "
            f"({perfkit.__version__}) does not know: upgrade it"
        )
    return about


def check_form(path: Path, name: str, saved: dict[str, str], here: dict[str, str]) -> None:
    """Refuse a model whose weights are not those of the file by name, shape and dtype, in their order."""
    if list(saved.items()) == list(here.items()):
        return
    wrong = [
        f"{key} is {saved.get(key, 'not there')} in the file and {here.get(key, 'not there')} in the model"
        for key in dict.fromkeys((*saved, *here))
        if saved.get(key) != here.get(key)
    ] or ["they come in another order"]
    if not here:
        wrong = ["that has none without params="]
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise InvalidInputError(
        f"{path} holds the weights of another model than this {name}: {'; '.join(wrong[:SHOWN])}{more}. "
        "Pass the original as it was made before it was optimized"
    )


def proven(report: dict[str, Any], here: Environment) -> str:
    """What was proven of it, and where."""
    there, speedup = report["environment"], report["speedup"]
    proof = report["explanation"] if speedup else "it was not timed"
    told = f"saved by perfkit {report['perfkit_version']} on {there['cpu']}, measured {report['created']}: {proof}"
    others = [
        f"{name} {there['libraries'].get(name, 'not there')} then, {here.libraries.get(name, 'not there')} here"
        for name in sorted(there["libraries"].keys() | here.libraries.keys())
        if there["libraries"].get(name) != here.libraries.get(name)
    ]
    machine = [] if there["cpu"] == here.cpu else [f"here it is {here.cpu}"]
    return "; ".join([told, *machine, *others])
