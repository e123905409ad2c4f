"""The errors that perfkit raises.

    PerfkitError
    ├── InvalidInputError      (ValueError)           what was passed cannot be used: model, inputs, option, budget
    │   ├── UnknownRecipeError                        no recipe of that name, or no option of that name
    │   ├── DoesNotRunError                           the model raises on its example inputs
    │   └── ChainError                                recipes that cannot be chained
    ├── UnsupportedError       (NotImplementedError)  the recipe cannot work on this model, framework, mode or machine
    ├── MissingDependencyError (ImportError)          a library is not installed
    ├── NoEffectError          (RuntimeError)         strict=True and a recipe touched nothing
    ├── FidelityError          (ArithmeticError)      the result's numbers are not close enough to the original's
    └── SlowerError            (RuntimeError)         on_slower="raise" and the result is slower

A message says what was given, what was expected and what to do about it. Add a class only where a caller would
want to catch it apart from the others. `PerfkitWarning` is the one warning category.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfkit._report import Report


class PerfkitError(Exception):
    """Base of every error that perfkit raises on purpose."""


class InvalidInputError(PerfkitError, ValueError):
    """What was passed cannot be used."""


class UnknownRecipeError(InvalidInputError):
    """No recipe, or no option of a recipe, has that name."""


class DoesNotRunError(InvalidInputError):
    """The model raises on its example inputs."""


class ChainError(InvalidInputError):
    """These recipes cannot be chained."""


class UnsupportedError(PerfkitError, NotImplementedError):
    """The recipe cannot work on this model, framework, mode or machine."""


class MissingDependencyError(PerfkitError, ImportError):
    """A library that the request needs is not installed."""


class _ReportedError(PerfkitError):
    """An error that comes after measuring and carries the report of it."""

    def __init__(self, message: str, report: Report | None = None):
        super().__init__(message)
        self.report = report


class NoEffectError(_ReportedError, RuntimeError):
    """`strict=True` and a recipe touched nothing."""


class FidelityError(_ReportedError, ArithmeticError):
    """The result's numbers are not close enough to the original's."""


class SlowerError(_ReportedError, RuntimeError):
    """`on_slower="raise"` and the result is slower than the original, or a recipe for memory saves none."""


class PerfkitWarning(UserWarning):
    """Something the caller should know, that did not stop the work."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the known names nearest to `name`, or all of them: the tail of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known: {', '.join(map(repr, known))}"


def missing(package: str, needed_for: str, extra: str | None = None) -> MissingDependencyError:
    """The error for a library that is not installed, with the command that installs it."""
    target = f"'perfkit[{extra}]'" if extra else package
    return MissingDependencyError(f"{needed_for} needs {package}, which is not installed: pip install {target}")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; what it says again and again ("Error dispatching computation: " in XLA) once.

    With the next line where the first one only announces it, as of torch's compilers.
    """
    first, *more = list(filter(str.strip, str(error).splitlines())) or [type(error).__name__]
    line = " ".join([first.strip(), *(each.strip() for each in more[:1] if first.rstrip().endswith(":"))])
    return re.sub(r"(\S[^:]*: )\1+", r"\1", line)[:300]
