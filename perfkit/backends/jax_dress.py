"""Giving a transformed function back in the form of the original: an nnx module, or a function."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.backends.adapter import Finished
from perfkit.backends.jax_compile import Program
from perfkit.backends.jax_inputs import by_operation, called_with_settings
from perfkit.backends.jax_model import Function, JaxModel, LinenModel, NnxModel, nnx_function
from perfkit.backends.jax_placement import ONE_DEVICE
from perfkit.backends.jax_prepared import Prepared
from perfkit.backends.jax_quantized import is_quantized
from perfkit.backends.jax_trees import leaves
from perfkit.backends.jax_variables import Gathered, indices, values_of

if TYPE_CHECKING:
    from perfkit.backends.jax_training import Trainer

NOT_PICKLED = (
    "an optimized {} is a compiled or rewritten program, which cannot be pickled: result.save writes a file that "
    "perfkit.load makes it of again. Or save {} and the result's .recipe: where they are loaded, perfkit.apply makes "
    "it of the original again"
)


def finished(model: JaxModel) -> Finished:
    """An inference model as its caller uses it."""
    if isinstance(model, NnxModel):
        module, runner = dressed(model)
        return Finished(module, module, lambda: keeping_variables(module), **_told(model, runner))
    run = as_called(model)
    params = _packed(model)
    told = _told(model, run)
    if params is None:
        return Finished(run, run, nullcontext, **told)

    def call(*args, **kwargs):
        return run(params, *args, **kwargs)

    return Finished(run, call, nullcontext, params=lambda: params, **told)


def _told(model: JaxModel, runner: Any) -> dict[str, Callable[[], Any]]:
    """What a report reads of the program behind a model, once it was called."""
    if not model.ahead:
        return {}
    return {
        "program": lambda: runner.program.compiled,
        "lowered": lambda: runner.program.lowered,
        "kept_bytes": lambda: getattr(runner.program, "kept_bytes", 0),
    }


def as_called(model: JaxModel) -> Callable:
    """A function or linen module as its caller calls it: `f(params, *inputs)`."""
    if not model.untouched:
        return DressedFunction(model)
    return model.original.apply if isinstance(model, LinenModel) else model.original


class DressedFunction:
    """A transformed function with the signature of the original: `function(params, *inputs)`.

    For a flax linen module it stands for `module.apply`, and has that name too.

    Args:
        function: what it calls; by default the model's.
    """

    def __init__(self, model: JaxModel, function: Function | None = None):
        self.model = model
        self.apply = self
        self.__name__ = model.name
        function = function or model.function()
        quantized = any(map(is_quantized, leaves(model.params)))

        def run(packed, args, kwargs):
            params, rest = _unpacked(model, packed)
            if quantized and not any(map(is_quantized, leaves(params))):
                raise InvalidInputError(
                    f"the optimized {model.name} computes on quantized parameters, and was given others: pass "
                    "result.params"
                )
            return function(params, rest, *args, **kwargs)[0]

        self.program = program_of(model, run) if model.ahead else functools.partial(by_operation, run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.params is None:
            args = (None, *args)
        elif not args:
            function, _ = self.model.signature_of
            name = (
                "variables"
                if isinstance(self.model, LinenModel)
                else next(iter(inspect.signature(function).parameters))
            )
            if name not in kwargs:
                raise InvalidInputError(f"{self.model.name} takes its parameters first: pass result.params")
            args = (kwargs.pop(name),)
        return called_with_settings(self.model, functools.partial(self.program, *args[:1]), args[1:], kwargs)

    def __deepcopy__(self, memo: dict) -> DressedFunction:
        return self  # parameters are passed to it: it holds nothing that changes

    def __reduce__(self) -> Any:
        raise UnsupportedError(NOT_PICKLED.format(self.model.name, "result.params"))

    def __repr__(self) -> str:
        return f"<{self.model.name}, optimized by perfkit>"


def _packed(model: JaxModel) -> Any:
    """Parameters and other state as the caller passes them: linen's variables, or a function's params."""
    if not isinstance(model, LinenModel):
        return model.params
    return model.rest if model.bare else {"params": model.params, **model.rest}


def _unpacked(model: JaxModel, packed: Any) -> tuple[Any, Any]:
    if not isinstance(model, LinenModel):
        return packed, model.rest
    rest = dict(packed)
    return rest.pop("params", {}), rest


def dressed(model: NnxModel) -> tuple[nnx.Module, Callable | None]:
    """An nnx module of the original's class with this state; a subclass and its runner where it does something else."""
    module = model.module()
    if model.untouched:
        return module, None
    runner = _Ahead(model) if model.ahead else _Eager(model)

    def __call__(self, *args, **kwargs):
        return runner(self, args, kwargs)

    become(module, __call__)
    return module, runner


def become(module: nnx.Module, __call__: Callable) -> None:
    """Give a module a subclass of its class with this `__call__`."""
    base = type(module)

    def __reduce_ex__(_, __):
        raise UnsupportedError(NOT_PICKLED.format(base.__name__, "nnx.state(result.model)"))

    methods = {"__call__": __call__, "__reduce_ex__": __reduce_ex__}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    module.__class__ = type(base.__name__, (base,), {**names, **methods})


def changing(function: Function) -> Callable[[Any, Any, tuple, dict], tuple[Any, dict[int, Any]]]:
    """`run(params, rest, args, kwargs)`: a model's outputs, and by their numbers the leaves of `rest` that changed."""

    def run(params: Any, rest: Any, args: tuple, kwargs: dict) -> tuple[Any, dict[int, Any]]:
        outputs, new = function(params, rest, *args, **kwargs)
        pairs = enumerate(zip(jax.tree.leaves(new), jax.tree.leaves(rest), strict=True))
        return outputs, {number: new for number, (new, old) in pairs if new is not old}

    return run


def run_by(module: nnx.Module, model: NnxModel, run: Callable[..., tuple[Any, dict[int, Any]]]) -> None:
    """Let `run(function, key, params, rest, args, kwargs)` do what a module's call asks for.

    The function is the module's in the mode in which it is then, which `key` tells; what is given back is as `changing`
    has it, and is written into the module.
    """

    def __call__(module, *args, **kwargs):
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        function = model.transformed(nnx_function(model.original, graphdef))
        outputs, changed = run(function, graphdef, params, rest, args, kwargs)
        if changed:
            state, structure = jax.tree.flatten(rest)
            new = [changed.get(number, leaf) for number, leaf in enumerate(state)]
            nnx.update(module, jax.tree.unflatten(structure, new))
        return outputs

    become(module, __call__)


def gathering(module: nnx.Module, trainer: Trainer, model: NnxModel) -> None:
    """Let a call of a module gather its parameters from all devices first."""
    programs: dict[Any, Callable] = {}

    def run(function, key, _, rest, args, kwargs):
        if key not in programs:
            programs[key] = jax.jit(changing(function))
        return programs[key](trainer.held[0], rest, args, kwargs)

    run_by(module, model, run)


class _Eager:
    """Runs the transformed function operation by operation."""

    def __init__(self, model: NnxModel):
        self.model = model

    def __call__(self, module: nnx.Module, args: tuple, kwargs: dict) -> Any:
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        function = self.model.transformed(nnx_function(self.model.original, graphdef))
        run = functools.partial(function, params, rest)
        outputs, new_rest = by_operation(lambda args, kwargs: run(*args, **kwargs), args, kwargs)
        nnx.update(module, new_rest)
        return outputs


_SELDOM_CHANGED = (nnx.Param, nnx.BatchStat)


class _Ahead:
    """Runs the transformed function as one compiled program on the module's values as they are at each call.

    Splitting an nnx module takes longer than running a small model, and so does finding its variables: they are
    remembered for as long as it holds what it held. Where the module's structure or settings are no longer those that
    were compiled, it is split and compiled anew.
    """

    def __init__(self, model: NnxModel):
        self.model = model
        self.gathered: Gathered | None = None

    def __call__(self, module: nnx.Module, args: tuple, kwargs: dict) -> Any:
        gathered = self.gathered
        if gathered is None or gathered.module is not module or not gathered.holds():
            gathered = self._gather(module)
        variables = gathered.variables
        values = [variable.get_raw_value() for variable in variables]
        held, moving = ([values[at] for at in places] for places in self.places)
        run = functools.partial(self.program, held, moving)
        outputs, changed = called_with_settings(self.model, run, args, kwargs)
        for index, value in changed.items():
            variables[index].set_raw_value(value)
        return outputs

    def _gather(self, module: nnx.Module) -> Gathered:
        gathered, before = Gathered(module), self.gathered
        if before is None or gathered.structure != before.structure:
            self._build(module, gathered.variables)
        self.gathered = gathered
        return gathered

    def _build(self, module: nnx.Module, variables: list[Any]) -> None:
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        function = self.model.transformed(nnx_function(self.model.original, graphdef))
        states = [indices(state, module, variables) for state in (params, rest)]

        fixed = [isinstance(variable, _SELDOM_CHANGED) for variable in variables]
        places = self.places = [[at for at, flag in enumerate(fixed) if flag is kind] for kind in (True, False)]

        def run(held, moving, args, kwargs):
            values = dict(zip(itertools.chain(*places), (*held, *moving), strict=True))
            params, rest = (jax.tree.unflatten(tree, [values[i] for i in order]) for order, tree in states)
            outputs, new_rest = function(params, rest, *args, **kwargs)
            changes = zip(states[1][0], values_of(new_rest), strict=True)
            changed = {index: new for index, new in changes if new is not values[index]}
            return outputs, changed

        self.program = program_of(self.model, run)


def program_of(model: JaxModel, run: Callable) -> Program | Prepared:
    """`run(held, *inputs)` of a model for inference, compiled at its first call."""
    return Prepared(run) if model.placement is ONE_DEVICE else Program(run)


@contextmanager
def keeping_variables(module: nnx.Module) -> Iterator[None]:
    variables = Gathered(module).variables
    before = [variable.get_raw_value() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.set_raw_value(value)


def writer(module: nnx.Module) -> Callable[[Any, Any], None]:
    """A function that writes parameters and other state into the module's variables."""
    variables = Gathered(module).variables
    orders = [indices(state, module, variables)[0] for state in nnx.split(module, nnx.Param, ...)[1:]]

    def write(params: Any, rest: Any) -> None:
        for order, state in zip(orders, (params, rest), strict=True):
            for index, value in zip(order, values_of(state), strict=True):
                variables[index].set_raw_value(value)

    return write
