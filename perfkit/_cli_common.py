"""What the commands share: consoles, exit codes, options, and loading the model that is named."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import perfkit
from perfkit._errors import InvalidInputError
from perfkit._quantity import Verdict
from perfkit._workload import MODES

REFUSED, BAD_INPUT, SLOWER, NOISY, INTERRUPTED = 1, 2, 3, 4, 130
EXIT_CODES = {Verdict.SLOWER: SLOWER, Verdict.NOISY: NOISY}

out, err = Console(), Console(stderr=True)

framework_option = click.option(
    "--framework", type=click.Choice(["torch", "jax"]), default="torch", show_default=True, help="Of a reference model."
)


def mode_option(default: str = "inference") -> Callable:
    return click.option("--mode", type=click.Choice(MODES), default=default, show_default=True)


batch_option = click.option("--batch-size", type=click.IntRange(min=1), help="Of a reference model.  [default: 64]")
recipe_option = click.option(
    "--recipe", default="auto", show_default=True, help="'auto', or names joined by '+': 'channels_last+bf16+compile'."
)
MODEL_HELP = """MODEL is a reference model (cnn, cnn2, rnn, lstm, text_rnn, text_lstm) or PACKAGE.MODULE:FACTORY, a
function that returns the model and its example inputs, or a dict of the arguments of perfkit.optimize."""
EXIT_HELP = "Exit codes: 0 done, 1 refused or failed, 2 bad input, 3 the result is slower, 4 too noisy to tell."


def telling_of_models(command: click.Command) -> click.Command:
    """The command, whose help says what MODEL may be."""
    command.help = f"{inspect.cleandoc(command.help or '')}\n\n{MODEL_HELP}"
    return command


def load(model: str, framework: Any, mode: str, batch_size: int | None) -> dict[str, Any]:
    """The arguments of `perfkit.optimize` for a reference model, or from a factory of the user's.

    Raises:
        InvalidInputError: no such reference model or factory, or the factory returned something else.
    """
    if ":" in model:
        if batch_size is not None:
            raise InvalidInputError("--batch-size is for reference models: your factory decides on its own inputs")
        return _from_factory(model)
    from perfkit import reference

    if mode == "inference":
        loaded, example_inputs = reference.load(model, framework=framework, batch_size=batch_size)
        calibration = reference.calibration(model, framework=framework)
        return {"model": loaded, "example_inputs": example_inputs, "calibration": calibration}
    task = reference.task(model, framework=framework, batch_size=batch_size)
    names = ("model", "example_inputs", "targets", "loss", "optimizer")
    return {name: getattr(task, name) for name in names}


def _from_factory(path: str) -> dict[str, Any]:
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's module lies where they are
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(
            f"MODEL={path!r}: {error}; expected PACKAGE.MODULE:FACTORY, importable from here"
        ) from error
    finally:
        sys.path.pop(0)
    made = factory()
    if isinstance(made, Mapping) and "model" in made:
        return dict(made)
    if isinstance(made, tuple) and len(made) == 2:
        return {"model": made[0], "example_inputs": made[1]}
    raise InvalidInputError(
        f"{path} returned a {type(made).__name__}: expected (model, example_inputs), or a dict of optimize's arguments"
    )


@contextmanager
def status(label: str = "") -> Iterator[Callable[[str], None]]:
    """A line on stderr that tells what is being done, where stderr is a terminal."""
    prefix = f"{label}: " if label else ""
    with err.status(prefix) as shown:
        yield lambda message: shown.update(f"{prefix}{message} …")


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """perfkit's own warnings are in the report already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", perfkit.PerfkitWarning)
        yield


def check_writable(*paths: Path | None) -> None:
    for path in filter(None, paths):
        folder = path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InvalidInputError(f"cannot write {path}: there is no writable folder {folder}")
