"""Low-rank factorization of JAX models: matrices as two smaller ones.

Source: Eckart and Young, "The approximation of one matrix by another of lower rank" (1936);
Denton et al., "Exploiting Linear Structure Within Convolutional Networks" (2014), https://arxiv.org/abs/1404.0736.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perfkit._errors import UnsupportedError
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.jax_model import JaxModel, NnxModel
from perfkit.pruning.jax_factors import NotMultipliedError, factored
from perfkit.pruning.jax_prune import with_teacher
from perfkit.pruning.jax_weights import kernels

CONVOLUTION = "it is no matrix: only linear and recurrent layers are factorized"


def factorized(work: Workload, recipe: Any) -> tuple[Workload, Effect]:
    """The workload with every matrix as two, where those are smaller at the recipe's share of squared singular values.

    In an nnx module each `nnx.Linear`, those of recurrent cells included, becomes a `LowRankLinear`. In the parameters
    of a function or a linen module the matrix becomes a node {"left", "right"}, and the products with it are done in
    two, in a loop too.

    Args:
        recipe: has `energy` (0 to 1), `distill`, `name` and `selected(names)`.

    Raises:
        UnsupportedError: the model has no parameters, or (functions and linen) there are no example inputs.
    """
    if not jax.tree.leaves(work.model.params):
        raise UnsupportedError(f"{recipe.name}: {work.model.name} has no parameters: pass a function's as params=")
    taught = with_teacher(work, recipe)
    if isinstance(work.model, NnxModel):
        model, effect = _modules(work.model, recipe)
    else:
        model, effect = _leaves(work, recipe)
    return taught.replace(model=model), effect


class LowRankLinear(nnx.Module):
    """A linear layer whose kernel is the product of two matrices: y = x @ left @ right + bias.

    Args:
        linear: the layer that it replaces; its bias and settings are taken over.
        left, right: (in_features, rank) and (rank, out_features).
    """

    def __init__(self, linear: nnx.Linear, left: jax.Array, right: jax.Array):
        self.left, self.right = nnx.Param(left), nnx.Param(right)
        self.bias = linear.bias if linear.bias is not None else nnx.data(None)
        for name in _SETTINGS:
            setattr(self, name, getattr(linear, name))

    @property
    def in_features(self) -> int:
        return self.left.shape[0]

    @property
    def out_features(self) -> int:
        return self.right.shape[1]

    @property
    def kernel(self) -> jax.Array:
        """The product of the two, for code that asks for its type or shape: (in_features, out_features)."""
        return self.left[...] @ self.right[...]

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """inputs: (..., in_features). Returns (..., out_features)."""
        bias = self.bias[...] if self.bias is not None else None
        inputs, left, right, bias = self.promote_dtype(
            (inputs, self.left[...], self.right[...], bias), dtype=self.dtype
        )
        options = {"precision": self.precision}
        if self.preferred_element_type is not None:
            options["preferred_element_type"] = self.preferred_element_type
        last = (((inputs.ndim - 1,), (0,)), ((), ()))
        inner = self.dot_general(inputs, left, last, **options)
        outputs = self.dot_general(inner, right, last, out_sharding=out_sharding, **options)
        return outputs if bias is None else outputs + bias


_SETTINGS = (
    "use_bias", "dtype", "param_dtype", "precision", "dot_general", "promote_dtype",
    "preferred_element_type",
)  # fmt: skip


def split_in_two(kernel: Any, energy: float) -> tuple[np.ndarray, np.ndarray] | str:
    """Two matrices whose product keeps a share of a kernel's squared singular values, or why they would not be smaller.

    The singular values go to both in equal parts, so that neither is much larger than the other.

    Args:
        kernel: (m, n), any floating or complex dtype; decomposed in float64 or complex128.
        energy: the share, 0 to 1.
    """
    array = np.asarray(kernel)
    if array.ndim != 2:
        return f"its kernel has {array.ndim} dimensions: a stack of layers, which is not factorized"
    whole = array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
    if not np.isfinite(whole).all() or not whole.any():
        return "it is zero or not finite"
    u, values, v = np.linalg.svd(whole, full_matrices=False)
    kept = np.cumsum(values**2) / np.sum(values**2)
    rank = min(int(np.searchsorted(kept, energy * (1 - 1e-12))) + 1, len(values))
    m, n = array.shape
    if rank * (m + n) >= m * n:
        return f"{energy:.0%} of its energy takes rank {rank} of {len(values)}: two factors would not be smaller"
    root = np.sqrt(values[:rank])
    return (u[:, :rank] * root).astype(array.dtype), (root[:, None] * v[:rank]).astype(array.dtype)


def _note(name: str, left: Any, right: Any) -> str:
    return f"{name}: {left.shape[0]} × {right.shape[1]} at rank {left.shape[1]}"


def _modules(model: NnxModel, recipe: Any) -> tuple[JaxModel, Effect]:
    found, other = _linears(model.module())
    wanted = recipe.selected(found)
    skipped = [Skipped(name, "left out by include or exclude") for name in found if name not in wanted]
    touched, notes = [], []

    def replace(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path))
        if type(node) is not nnx.Linear or name not in wanted:
            return node
        factors = split_in_two(node.kernel[...], recipe.energy)
        if isinstance(factors, str):
            skipped.append(Skipped(name, factors))
            return node
        touched.append(name)
        notes.append(_note(name, *factors))
        return LowRankLinear(node, *map(jnp.asarray, factors))

    module = nnx.recursive_map(replace, model.module())
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    replaced = dataclasses.replace(model, graphdef=graphdef, params=params, rest=rest)
    return replaced, Effect(tuple(touched), (*skipped, *other), tuple(notes))


def _linears(module: nnx.Module) -> tuple[list[str], list[Skipped]]:
    """The names of the linear layers, and the layers that have kernels and are none."""
    found, other = [], []
    for path, node in nnx.iter_modules(module):
        name = ".".join(map(str, path))
        if type(node) is nnx.Linear:
            found.append(name)
        elif isinstance(node, nnx.Embed):
            other.append(Skipped(name, "its rows are looked up, not multiplied"))
        elif isinstance(getattr(node, "kernel", None), nnx.Variable):
            other.append(
                Skipped(name, CONVOLUTION if node.kernel.ndim != 2 else f"a {type(node).__name__} is not known")
            )
    return found, other


def _leaves(work: Workload, recipe: Any) -> tuple[JaxModel, Effect]:
    if work.inputs is None:
        raise UnsupportedError(
            f"{recipe.name}: how a function uses its matrices is read off a run of it: pass example_inputs"
        )
    model, (found, skipped) = work.model, kernels(work.model)
    wanted = recipe.selected(dict.fromkeys(found.values()))
    nodes, tree = jax.tree.flatten(model.params)
    matrices, touched, notes = [], [], []
    for leaf, layer in found.items():
        kernel = nodes[leaf]
        factors = (
            "left out by include or exclude" if layer not in wanted
            else CONVOLUTION if kernel.ndim != 2
            else split_in_two(kernel, recipe.energy)
        )  # fmt: skip
        reason = factors if isinstance(factors, str) else _unfit(work, leaf, factors)
        if reason:
            skipped.append(Skipped(layer, reason))
            continue
        left, right = factors
        matrices.append(leaf)
        nodes[leaf] = {"left": jnp.asarray(left), "right": jnp.asarray(right)}
        touched.append(layer)
        notes.append(_note(layer, left, right))
    if matrices:
        model = model.with_state(jax.tree.unflatten(tree, nodes), model.rest)
        if not work.trains:
            notes.append("the function is traced anew on every call unless it is compiled: chain it with compile")
        model = model.then(lambda function: factored(function, tree, matrices))
    return model, Effect(tuple(dict.fromkeys(touched)), tuple(skipped), tuple(notes))


def _unfit(work: Workload, leaf: int, factors: tuple[np.ndarray, np.ndarray]) -> str | None:
    """Why the model cannot run with this matrix as two; None where it can."""
    model, inputs = work.model, work.inputs
    nodes, tree = jax.tree.flatten(model.params)
    nodes[leaf] = dict(zip(("left", "right"), factors, strict=True))
    run = factored(model.function(), tree, [leaf])
    try:
        jax.eval_shape(run, jax.tree.unflatten(tree, nodes), model.rest, *inputs.args, **inputs.kwargs)
    except NotMultipliedError as error:
        return str(error)
    return None
