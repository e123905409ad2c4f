"""Tests of Triton kernels without a GPU: in Triton's interpreter, on CPU tensors, in a process of their own.

`triton.jit` reads TRITON_INTERPRET when a kernel is defined, those of Triton itself too: the knob must be set before
the first import of Triton, and Triton is never the same again after. So a test that is marked here runs in one other
process, kept for all of them, and the test's own process may compile kernels.

    from triton_interpreter import interpreted

    @pytest.mark.parametrize("hidden", [1, 50])
    @interpreted
    def test_numbers(hidden): ...

Parameters must be such as can be pickled, and fixtures are not there. Programs of a grid run one after the other: one
that waits for a later one waits for ever, and is killed after `LIMIT_S`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import pytest

LIMIT_S = 120
_KNOB = "TRITON_INTERPRET"


def interpreted(test: Callable) -> Callable:
    """Run `test` in the interpreting process; what it raises there fails it here, with the traceback from there."""

    @functools.wraps(test)
    def run(**parameters: Any) -> None:
        if os.environ.get(_KNOB) == "1":
            test(**parameters)
        else:
            _process().run(inspect.getfile(test), test.__name__, parameters)

    return run


class _Process:
    """The interpreting process, and the pipe to it."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, path: str, name: str, parameters: dict[str, Any]) -> None:
        self.pipe.send((path, name, parameters))
        if not self.pipe.poll(LIMIT_S):
            self.process.kill()
            _process.cache_clear()
            pytest.fail(f"{name} hangs: no answer from the interpreter in {LIMIT_S} s")
        try:
            outcome, told = self.pipe.recv()
        except EOFError:
            _process.cache_clear()
            pytest.fail(f"the interpreting process died in {name}, with exit code {self.process.exitcode}")
        if outcome == "skipped":
            pytest.skip(told)
        if outcome == "failed":
            pytest.fail(f"in the interpreting process:\n{told}", pytrace=False)


@functools.cache
def _process() -> _Process:
    return _Process()


def _serve(pipe: Connection) -> None:
    """What the interpreting process does, until its parent is gone."""
    os.environ[_KNOB] = "1"
    warnings.simplefilter("error")
    # the interpreter computes masked elements too, and NumPy tells of their overflows
    warnings.simplefilter("ignore", RuntimeWarning)
    _count_loops()
    while True:
        try:
            path, name, parameters = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(path, name, parameters))


def _count_loops() -> None:
    """Triton 3.6 takes `int` of an array to count a loop's steps, which newer NumPy refuses and Triton 3.7 mended."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def _outcome(path: str, name: str, parameters: dict[str, Any]) -> tuple[str, str]:
    try:
        getattr(_load(path), name)(**parameters)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except (Exception, pytest.fail.Exception):
        return "failed", traceback.format_exc()
    return "passed", ""


@functools.cache
def _load(path: str) -> ModuleType:
    """The test's module, under a name that no other has."""
    name = f"interpreted_{len(path)}_{os.path.basename(path).removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
