"""`Result.save` and `load`: what was proven, in one file without pickle, made again elsewhere and checked there.

The file is a safetensors file. It holds what the chain starts from (the original's weights, the example inputs,
the calibration data), the outputs of the result, and in its header the recipe and the whole report.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from perfkit import _artifact_file as files
from perfkit import _artifact_trees as trees
from perfkit import backends
from perfkit._chain import chain_of
from perfkit._errors import FidelityError, InvalidInputError, UnknownRecipeError
from perfkit._optimize import apply
from perfkit._workload import CALIBRATION_BATCHES
from perfkit.backends.adapter import Backend
from perfkit.measure.fidelity import compare_outputs

if TYPE_CHECKING:
    from perfkit._pipeline import Result

WEIGHT, INPUT, OUTPUT = "weight.", "input.", "output."
ROUNDING = 1e-4
"""Relative error between two machines that is no more than another order of float32 additions."""


def save(
    result: Result, path: str | Path, model: Any, *, example_inputs: Any, params: Any, calibration: Any, seed: int
) -> Path:
    """See `Result.save`."""
    report = result.report
    if report.mode != "inference":
        raise InvalidInputError(
            "the result of a training cannot be saved in one file: put what it learnt into the original (torch: "
            "model.load_state_dict(result.model.state_dict())), optimize that for inference, and save that result; or "
            "keep result.model.state_dict() and result.recipe"
        )
    if report.parallel is not None:
        raise InvalidInputError(f"{report.recipe} spreads the model over processes: save result.recipe, and apply it")
    if example_inputs is None:
        raise InvalidInputError("example_inputs=None: what is saved is checked on them wherever it is loaded")
    path = Path(path)
    if os.path.isdir(path) or not os.path.isdir(path.parent):  # pathlib's raise where a name is too long
        raise InvalidInputError(f"{path} cannot be written: expected a file's name in a folder that is there")
    backend = _backend(report.framework, model, example_inputs)
    batches = None if calibration is None else list(itertools.islice(calibration, CALIBRATION_BATCHES))
    count = 0 if batches is None else len(batches)
    if count != result.calibrated and any(recipe.calibrates for recipe in chain_of(result.recipe)):
        raise InvalidInputError(
            f"{result.recipe} was made with {result.calibrated} batch(es) of calibration data, and here are {count}: "
            "pass as calibration= what it was made with (a used-up iterator?)"
        )
    side = _side(backend.name)
    writing = _Writing(side)
    about = {
        "schema_version": files.SCHEMA_VERSION,
        "framework": backend.name,
        "recipe": result.recipe,
        "seed": seed,
        "weights": writing.named(WEIGHT, side.weights(model, params)),
        "example_inputs": writing.tree(example_inputs),
        "calibration": writing.tree(batches),
        "report": report.to_dict(),
    }
    outputs = _outputs(result, backend, model, params, example_inputs, seed)
    about["outputs"] = writing.named(OUTPUT, {str(i): side.tensor(array) for i, array in enumerate(outputs)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        with files.as_bad_input(path):
            partial.touch()
            mode = partial.stat().st_mode
            side.write(partial, writing.tensors, {files.HEADER: json.dumps(about)})
            partial.chmod(mode)  # safetensors' is its owner's alone
        _check_written(partial, result, model, params)
        with files.as_bad_input(path):
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def _check_written(path: Path, result: Result, model: Any, params: Any) -> None:
    """Make of a file what will be made of it elsewhere.

    Raises:
        InvalidInputError: it is not what it should be.
    """
    try:
        load(path, model, params=params)
    except FidelityError as error:
        raise InvalidInputError(
            f"nothing was written: what {result.recipe} makes of this model now is not what result.model computes "
            f"({error.report.fidelity.reason}). Pass the model, inputs and calibration data that were optimized, "
            "as they were then"
        ) from error
    except UnknownRecipeError as error:
        raise InvalidInputError(
            f"nothing was written: {result.recipe} cannot be read where the file is loaded, since {error}. Make a "
            "recipe of your own a file in a folder that the environment variable PERFKIT_RECIPES names"
        ) from error


def load(path: str | Path, model: Any, *, params: Any = None, progress: Callable[[str], Any] | None = None) -> Result:
    """Make again what `Result.save` wrote, and check it: on the saved inputs it must compute the saved outputs.

    Nothing is timed: the report tells what was measured where the file was written.

    Args:
        path: the file.
        model: the original, as it is when it was just made: its own weights do not matter. It is not changed.
        params: JAX functions and linen modules: parameters of the same form; `jax.eval_shape(module.init, key, x)`
            will do.
        progress: called with a line of text as the work goes on.

    Returns:
        The optimized model, as `perfkit.apply` does.

    Raises:
        InvalidInputError: there is no such file, it is of something else, or of a model of another form.
        UnsupportedError: a recipe cannot work on this machine.
        FidelityError: it computes something else here.

    Example:
        >>> result.save("model.perfkit", model, example_inputs=(x,))
        >>> fast = perfkit.load("model.perfkit", make_model()).model
    """
    path = Path(path)
    about = files.header(path)
    backend = _backend(about["framework"], model, None)
    side = _side(backend.name)
    tensors = side.read(path)

    def given(leaf: str) -> Any:
        return side.beside(model, tensors[leaf])

    held = {name: tensors[stands] for name, stands in about["weights"].items()}
    files.check_form(path, type(model).__name__, *(_forms(side, each) for each in (held, side.weights(model, params))))
    model, params = side.with_weights(model, params, held)
    example_inputs, calibration = (
        trees.unpacked(about[name], given, side.made) for name in ("example_inputs", "calibration")
    )
    result = apply(
        model,
        about["recipe"],
        example_inputs=example_inputs,
        params=params,
        calibration=calibration,
        seed=about["seed"],
        progress=progress,
    )
    outputs = _outputs(result, backend, model, params, example_inputs, about["seed"])
    saved = [side.array(tensors[stands]) for stands in about["outputs"].values()]
    close = compare_outputs(
        outputs,
        saved,
        saved,
        tolerance=max(chain_of(about["recipe"]).tolerance, ROUNDING),
        reference_name="the outputs where it was saved",
    )
    notes = (*result.report.notes, files.proven(about["report"], result.report.environment))
    report = replace(result.report, fidelity=close, notes=notes)
    if not close.ok:
        told = f"{report.recipe} on {report.model} computes something else than where it was saved"
        raise FidelityError(f"{path}: {told}: {close.reason}", report)
    return replace(result, report=report)


class _Writing:
    """Gathers the tensors of a file, each once."""

    def __init__(self, side: ModuleType):
        self.tensors: dict[str, Any] = {}
        self._side = side
        self._known: dict[Any, str] = {}
        self._leaves = itertools.count()

    def named(self, prefix: str, held: dict[str, Any]) -> dict[str, str]:
        """What stands in the file for each of these; tied ones are the same."""
        return {name: self._stored(f"{prefix}{name}", tensor) for name, tensor in held.items()}

    def tree(self, inputs: Any) -> Any:
        return trees.packed(inputs, self._leaf, self._side.parts)

    def _leaf(self, leaf: Any) -> str | None:
        tensor = self._side.one(leaf)
        return None if tensor is None else self._stored(f"{INPUT}{next(self._leaves)}", tensor)

    def _stored(self, name: str, tensor: Any) -> str:
        known = self._known.setdefault(self._side.identity(tensor), name)
        self.tensors.setdefault(known, tensor)
        return known


def _backend(framework: str, model: Any, example_inputs: Any) -> Backend:
    found = backends.of(model, example_inputs)
    if found.name != framework:
        called = ": pass what it returns" if inspect.isfunction(model) else ""
        raise InvalidInputError(f"expected the original, a {framework} model, and got a {type(model).__name__}{called}")
    return found


def _side(framework: str) -> ModuleType:
    return import_module(f"perfkit.backends.{framework}_artifact")


def _forms(side: ModuleType, held: dict[str, Any]) -> dict[str, str]:
    """Dtypes and shapes by name."""
    return {name: side.form(tensor) for name, tensor in held.items()}


def _outputs(
    result: Result, backend: Backend, model: Any, params: Any, example_inputs: Any, seed: int
) -> list[np.ndarray]:
    with backend.preserved():
        settled = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": seed}
        return backend.outputs(backend.bind(model, params, example_inputs, **settled), result.finished)
