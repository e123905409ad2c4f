"""What the commands share: consoles, exit codes, options, and loading the model that is named."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import perfkit
from perfkit._errors import InvalidInputError, nearest
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
MODEL_HELP = """MODEL is a reference model (cnn, cnn2, rnn, lstm, text_rnn, text_lstm), or PACKAGE.MODULE:FACTORY or
PATH/FILE.py:FACTORY, a function that returns the model and its example inputs, or a dict of the arguments of
perfkit.optimize."""
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
    factory = _found(path)
    if not callable(factory) or "forward" in dir(factory):  # torch's modules can be called with anything
        kind = "class" if isinstance(factory, type) else type(factory).__name__
        raise InvalidInputError(f"{path} is a {kind}: {_EXPECTED}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise InvalidInputError(f"{path} cannot be called without arguments ({error}): {_EXPECTED}") from error
    made = factory()
    if isinstance(made, tuple) and len(made) == 2:
        return {"model": made[0], "example_inputs": made[1]}
    if not isinstance(made, Mapping):
        raise InvalidInputError(f"{path} returned a {type(made).__name__}: {_EXPECTED}")
    taken = inspect.signature(perfkit.optimize).parameters.keys() - _OPTIONS
    if unknown := [name for name in made if name not in taken]:
        told = " (an option of the command)" if unknown[0] in _OPTIONS else ""
        raise InvalidInputError(f"{path} returned a dict with {unknown[0]!r}{told}: {nearest(str(unknown[0]), taken)}")
    if missing := [name for name in ("model", "example_inputs") if name not in made]:
        raise InvalidInputError(f"{path} returned a dict without {missing[0]!r}: {_EXPECTED}")
    return dict(made)


_EXPECTED = "expected a function that returns (model, example_inputs), or a dict of perfkit.optimize's arguments"
_OPTIONS = {"recipe", "mode", "strict", "progress"}
"""What the command line says of a run, and no factory."""


def taken_by(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes: a factory may return what only optimize needs, a metric or a tolerance."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def _found(path: str) -> Any:
    """What `path` names, of a module by its name or of a file ending with .py."""
    module, _, name = path.rpartition(":")
    expected = "expected PACKAGE.MODULE:FACTORY, importable from here, or PATH/FILE.py:FACTORY"
    if not module.endswith(".py") and not all(map(str.isidentifier, module.split("."))):
        raise InvalidInputError(f"MODEL={path!r}: {module!r} is no module's name; {expected}")
    file = Path(module).absolute() if module.endswith(".py") else None
    if file and not file.is_file():
        raise InvalidInputError(f"MODEL={path!r}: there is no file {file}; {expected}")
    # To stay: what runs later may import what lies beside it.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    if file and str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # where profile.py hides no module of Python's
    try:
        held = _from_file(file) if file else importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the user's module imports
        raise InvalidInputError(f"MODEL={path!r}: {error}; {expected}") from error
    if not hasattr(held, name):
        functions = [key for key, value in vars(held).items() if inspect.isfunction(value)]
        near = nearest(name, functions) if functions else expected
        raise InvalidInputError(f"MODEL={path!r}: {held.__name__} has no {name!r}; {near}")
    return getattr(held, name)


def _from_file(file: Path) -> types.ModuleType:
    """The module that a file makes, under a name that is not another's."""
    name = f"{file.stem}_of_the_user" if file.stem in sys.modules else file.stem
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None, "its name ends with .py"
    held = module_from_spec(spec)
    sys.modules[name] = held
    spec.loader.exec_module(held)
    return held


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


def trained_line(model: str, framework: str, trained: Any) -> str:
    """One line on a trained reference model."""
    return (
        f"{model} ({framework}): held-out {trained.metric} {trained.value:.4g} "
        f"(baseline {trained.baseline:.4g}) after {trained.train_seconds:.1f} s of training"
    )


@contextmanager
def training_progress(label: str) -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar as `reference.train` feeds it: step, total, loss."""
    from rich.progress import Progress

    with Progress(console=err, transient=True) as bar:
        task = bar.add_task(f"training {label}", total=None)

        def progress(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, description=f"training {label}, loss {loss:.4f}")

        yield progress
