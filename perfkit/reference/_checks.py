"""Every error of this package is made here, so that what is raised and how it reads is decided in one place."""

import difflib
import importlib
import numbers
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from perfkit._errors import InvalidInputError
from perfkit._errors import missing as missing_package


def known(given: object, names: Sequence[str], *, what: str) -> str:
    """Return `given` if it is one of `names`, otherwise raise InvalidInputError with the nearest of them."""
    if isinstance(given, str) and given in names:
        return given
    nearest = difflib.get_close_matches(str(given), names, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    raise InvalidInputError(f"unknown {what} {given!r}: expected one of {', '.join(map(repr, names))}{hint}")


def at_least(given: object, least: int, *, what: str) -> int:
    """Return `given` if it is a whole number of at least `least`, otherwise raise InvalidInputError."""
    if isinstance(given, numbers.Integral) and not isinstance(given, bool) and int(given) >= least:
        return int(given)
    raise InvalidInputError(f"{what} is {given!r}: expected a whole number, {least} or more")


def require(module: str, *, extra: str) -> ModuleType:
    """Import and return `module`, or raise ImportError with the extra of perfkit that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the module is there and fails on something of its own
        raise missing_package(error.name, "this", extra) from error


def unfit(given: str, *, expected: str, remedy: str) -> InvalidInputError:
    """An argument that is well-formed but does not fit the others."""
    return InvalidInputError(f"{given}: expected {expected}; {remedy}")


def missing(where: Path, *, expected: str, remedy: str) -> FileNotFoundError:
    """Files that are not where they were looked for."""
    return FileNotFoundError(f"{where} does not hold {expected}; {remedy}")


def corrupt(path: Path, *, given: str, expected: str, remedy: str) -> InvalidInputError:
    """A file that is there and is not what its name says."""
    return InvalidInputError(f"{path} is damaged: {given}, expected {expected}; {remedy}")


def unreachable(url: str, reason: Exception) -> ConnectionError:
    """A download that broke off or never began."""
    return ConnectionError(
        f"could not download {url} ({reason}); check the network, name a mirror with source=, "
        "or fetch the file by hand and pass its folder as path="
    )
