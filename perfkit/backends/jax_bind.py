"""What a caller passed as a JAX model and what it is called with, as a workload holds it; bad input is refused here."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from perfkit._errors import InvalidInputError, PerfkitWarning
from perfkit._workload import Inputs, Workload
from perfkit.backends.jax_inputs import NUMBERS, TAKE_APART, as_inputs, is_equinox, place_of
from perfkit.backends.jax_model import FunctionModel, JaxModel, LinenModel, NnxModel, is_linen


def model_of(model: Any, params: Any, mode: str) -> JaxModel:
    """The caller's model with a copy of its state.

    Raises:
        InvalidInputError: it is not passed as its kind is: see docs/jax.md.
    """
    if is_equinox(model):
        raise InvalidInputError(f"{type(model).__name__} is an equinox module, {TAKE_APART}")
    if isinstance(model, jax.stages.Compiled):
        raise InvalidInputError("the model is compiled already: pass the function as it was before .lower().compile()")
    if isinstance(model, nnx.Module):
        if params is not None:
            raise InvalidInputError("params= is for functions and flax linen modules: an nnx module holds its own")
        module = nnx.clone(model)
        module.train() if mode == "training" else module.eval()
        return NnxModel.of(module)
    if is_linen(model):
        if params is None and model.scope is not None:
            raise InvalidInputError(
                f"{type(model).__name__} is a bound flax linen module: take it apart, module, variables = "
                "model.unbind(), and pass module with params=variables"
            )
        if params is None:
            raise InvalidInputError(
                f"{type(model).__name__} is a flax linen module, which does not hold its variables: "
                "pass them as params=module.init(key, *inputs)"
            )
        rest, bare = dict(params), "params" not in params
        held = rest.pop("params", {})
        return LinenModel(original=model, params=held, rest=rest, trains=mode == "training", bare=bare)
    bound = FunctionModel(original=model, params=params)
    inside = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)] if params is None else []
    apart = "pass lambda model, *inputs: model(*inputs) with params=model"
    if mode == "training" and params is None:
        how = f"{bound.name} is a pytree: {apart}" if inside else "pass params= and a function of (params, *inputs)"
        raise InvalidInputError(f"mode='training' needs what to train: {how}")
    if inside:
        told = f"{bound.name} is a pytree, whose {len(inside)} array(s) are constants of it as of any other function"
        warnings.warn(f"{told}, so recipes for weights find none: {apart}", PerfkitWarning, stacklevel=5)
    return bound


def check_donation(work: Workload) -> None:
    """Refuse a function that takes the memory of the caller's arrays for its outputs.

    Raises:
        InvalidInputError: it is jitted with donate_argnums.
    """
    model, inputs = work.model, work.inputs
    if not isinstance(model, FunctionModel):
        return
    try:
        traced = jax.make_jaxpr(model.function())(model.params, model.rest, *inputs.args, **inputs.kwargs)
    except Exception:  # whatever code raises that needs the value of something it is not told: it is not jitted
        return
    donated = {
        taken
        for eqn in traced.jaxpr.eqns
        for taken, gone in zip(eqn.invars, eqn.params.get("donated_invars", ()), strict=False)
        if gone and not isinstance(taken, Literal)
    }
    held = ["its parameters"] * len(jax.tree.leaves((model.params, model.rest)))
    given = jax.tree_util.tree_leaves_with_path((inputs.args, dict(inputs.kwargs)))
    for taken, place in zip(traced.jaxpr.invars, [*held, *(place_of(path) for path, _ in given)], strict=True):
        if taken in donated:
            raise InvalidInputError(
                f"{model.name} donates {place} (donate_argnums of jax.jit), which are gone after one call, and here it "
                "is called many times: pass it without donate_argnums, or what it was made of"
            )


def with_numbers_read(work: Workload) -> Workload:
    """The workload with Python numbers among its inputs as settings, where the model cannot be traced otherwise."""
    model, inputs = work.model, work.inputs
    if not any(isinstance(leaf, NUMBERS) for leaf in jax.tree.leaves((inputs.args, dict(inputs.kwargs)))):
        return work
    reading = dataclasses.replace(model, reads_numbers=True)
    settled = as_inputs(reading, inputs)
    if _traces(model, inputs) or not _traces(reading, settled):
        return work
    return work.replace(model=reading, inputs=settled)


def _traces(model: JaxModel, inputs: Inputs) -> bool:
    try:
        jax.eval_shape(model.function(), model.params, model.rest, *inputs.args, **inputs.kwargs)
    except Exception:  # whatever code raises that needs the value of something it is not told
        return False
    return True


def check_outputs(name: str, arrays: list[Any], outputs: Any) -> None:
    """Refuse outputs that nothing can be compared with.

    Args:
        arrays: what JAX sees in `outputs`.

    Raises:
        InvalidInputError: there are none, or nothing but NaN.
    """
    if not arrays:
        raise InvalidInputError(
            f"{name} returned a {type(outputs).__name__} without any array that JAX sees in it: return arrays, or "
            "register the class as a pytree (jax.tree_util.register_dataclass)"
        )
    numbers = [leaf for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size]
    if numbers and all(bool(jnp.isnan(leaf).all()) for leaf in numbers):
        raise InvalidInputError(
            f"{name} returns nothing but NaN on example_inputs, so no result could be compared with it: pass inputs as "
            "the model will see them"
        )


def device_of(model: JaxModel, inputs: Inputs | None) -> str:
    """The platform on which its arrays lie, as JAX names it."""
    arrays = jax.tree.leaves((model.params, inputs and (inputs.args, dict(inputs.kwargs))))
    platforms = {device.platform for leaf in arrays if isinstance(leaf, jax.Array) for device in leaf.devices()}
    return next(iter(platforms - {"cpu"}), "cpu") if platforms else jax.default_backend()
