"""The recipe `fused_kernels` applied to JAX models without optimizing: for tests of all kinds of layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit._workload import Inputs, Workload
from perfkit.backends.jax_backend import BACKEND
from perfkit.backends.jax_model import FunctionModel, LinenModel, NnxModel
from perfkit.kernels import trace

SUMS = 1024
"""Above the number of terms in any sum here, but those of gradients over pixels."""

TOLERANCE = SUMS**0.5 * 2**-23
"""Sums in another order: each of n roundings moves a result by 2^-24 of it, sqrt(n) of them together; twice that."""


def workload(model: Any, *inputs: Any, params: Any = None, mode: str = "inference", **kwargs: Any) -> Workload:
    if isinstance(model, nnx.Module):
        module = nnx.clone(model)
        module.train() if mode == "training" else module.eval()
        held = NnxModel.of(module)
    elif isinstance(model, linen.Module):
        held = LinenModel(original=model, params=params["params"], rest={})
    else:
        held = FunctionModel(original=model, params=params)
    return Workload(BACKEND, held, Inputs(inputs, kwargs), mode, "cpu")


def swapped(work: Workload, chain: str = "fused_kernels") -> tuple[Workload, Any]:
    """The chain applied, and its last step's effect."""
    done = apply(chain_of(chain), work)
    return done.works[-1], done.steps[-1].effect


def outputs(work: Workload, params: Any = None) -> Any:
    model = work.model

    def run(params):
        return model.function()(params, model.rest, *work.inputs.args, **work.inputs.kwargs)[0]

    return jax.jit(run)(model.params if params is None else params)


def gradients(work: Workload) -> Any:
    def loss(params):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(outputs(work, params)))

    return jax.grad(loss, allow_int=True)(work.model.params)


def assert_same(new: Any, old: Any, within: float = TOLERANCE) -> None:
    """Every leaf is as close as `within`, relative to its largest number."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if jnp.issubdtype(one.dtype, jnp.floating):
            scale = float(jnp.abs(other).max())
            assert float(jnp.abs(one - other).max()) <= within * max(scale, 1e-6)


def reasons(effect: Any) -> dict[str, str]:
    return {item.name: item.reason for item in effect.skipped}


def kernels_in(work: Workload) -> list[str]:
    with trace() as choices:
        jax.make_jaxpr(lambda: outputs(work))()
    return [choice.implementation for choice in choices]


KEYS = jax.random.split(jax.random.key(0), 6)
IMAGES = jax.random.normal(KEYS[0], (2, 12, 11, 3))
SEQUENCES = jax.random.normal(KEYS[1], (4, 5, 6))
LENGTHS = jnp.array([3, 2, 5, 4])
