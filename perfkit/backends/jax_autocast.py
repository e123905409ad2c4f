"""Mixed precision for any JAX function, by rewriting its jaxpr: what torch.autocast is to PyTorch.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from perfkit.backends.jax_autocast import autocast
    >>> half = jax.jit(autocast(lambda w, x: jax.nn.softmax(x @ w), "bfloat16"))
    >>> half(jnp.eye(3), jnp.ones((2, 3))).dtype   # the product ran in bfloat16, the softmax in float32
    dtype('float32')

Source: https://docs.pytorch.org/docs/stable/amp.html (the operation lists),
https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit.backends import jax_autocast_rules as rules
from perfkit.backends.jax_autocast_rewrite import Rewriter
from perfkit.backends.jax_inputs import tracing

LOW_DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Equations that autocast leaves as they were written."""

    primitive: str
    reason: str
    count: int


@dataclasses.dataclass(frozen=True)
class AutocastCounts:
    """What autocast does to one function, counted on its jaxpr: a scan body once, every branch of a cond."""

    dtype: str
    low: Mapping[str, int]  # products that run in the low dtype: primitive name -> how many
    skipped: tuple[Kept, ...]  # products that do not
    kept: tuple[Kept, ...]  # other primitives on float32 values that autocast has no rule for


def autocast(fn: Callable, dtype: Any) -> Callable:
    """`fn` with matrix products and convolutions in a low dtype, accumulated in float32.

    Products cast their float32 operands to `dtype` and return it. Elementwise arithmetic, comparisons, maxima and data
    movement run in whatever arrives; where the low dtype meets float32, float32 wins. Sums, exponentials, powers,
    normalizations and gate functions run in float32. The tables are in jax_autocast_rules. Weights stay float32 and are
    cast where they are used; a weight used inside a scan or while loop is cast once, before the loop. A product that
    was written with a precision, such as `precision="highest"`, is left as it is.

    Works on a function of gradients as well as under one: `autocast(jax.grad(loss), ...)` and
    `jax.grad(autocast(loss, ...))` both run the backward products in the low dtype. Gradients come back in the dtype
    of what they are gradients of. float16 needs loss scaling besides, which is not done here.

    The function is traced anew on every call, because it may close over something that has changed since, and a cached
    jaxpr would go on using the old value. Call it under `jax.jit`, which traces once, as usual. Inner `jax.jit`
    functions are compiled once either way.

    Args:
        fn: any function of arrays that JAX can trace. Arguments that are not arrays (flags, strings, Python numbers)
            are passed through as they are. Like under `jax.jit`, it must not change what it closes over: a flax nnx
            module with state goes in as an argument, by `nnx.split` and `nnx.merge`.
        dtype: "bfloat16" or "float16", or the dtype object of either.

    Returns:
        A function with the signature of `fn`, whose outputs have the dtypes that the outputs of `fn` had.

    Raises:
        ValueError: if `dtype` is neither bfloat16 nor float16.

    Example:
        >>> step = jax.jit(jax.value_and_grad(autocast(loss, "bfloat16")))      # doctest: +SKIP
        >>> value, gradients = step(params, batch)                              # doctest: +SKIP
    """
    rewriter = Rewriter(_low_dtype(dtype))

    @functools.wraps(fn, updated=())  # the attributes of a callable module are not this function's
    def autocast_fn(*args: Any, **kwargs: Any) -> Any:
        jaxpr, values, outputs = trace(fn, args, kwargs)
        results = rewriter.evaluate(jaxpr, values)
        return untraced(jaxpr, results, outputs)

    return autocast_fn


def autocast_counts(fn: Callable, dtype: Any, /, *args: Any, **kwargs: Any) -> AutocastCounts:
    """What `autocast(fn, dtype)` does when it is called with these arguments. Nothing is computed.

    Args:
        fn, dtype: as for `autocast`.
        args, kwargs: example arguments; `jax.ShapeDtypeStruct` will do for arrays.

    Returns:
        The counts, as plain data for a report.

    Raises:
        ValueError: if `dtype` is neither bfloat16 nor float16.

    Example:
        >>> autocast_counts(lambda x: x @ x, "bfloat16", jnp.eye(3)).low
        {'dot_general': 1}
    """
    low = _low_dtype(dtype)
    jaxpr, _, _ = trace(fn, args, kwargs)
    lowered, skipped, kept = collections.Counter(), collections.Counter(), collections.Counter()

    def count(jaxpr: Any) -> None:
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            name = eqn.primitive.name
            if name in rules.PRODUCTS:
                reason = rules.product_skip_reason(eqn, low)
                (skipped if reason else lowered)[(name, reason) if reason else name] += 1
            elif reason := rules.kept_reason(eqn):
                kept[name, reason] += 1
            elif name in rules.CONTROL:
                for inner in rules.inner_jaxprs(eqn):
                    count(inner)

    count(jaxpr)
    return AutocastCounts(str(low), dict(lowered), _as_kept(skipped), _as_kept(kept))


def _as_kept(counter: collections.Counter) -> tuple[Kept, ...]:
    return tuple(Kept(name, reason, number) for (name, reason), number in counter.items())


def _low_dtype(dtype: Any) -> np.dtype:
    try:
        low = jnp.dtype(dtype)
    except TypeError:
        low = None
    if low not in [jnp.dtype(name) for name in LOW_DTYPES]:
        raise ValueError(
            f"autocast got dtype={dtype!r}, expected one of {', '.join(LOW_DTYPES)}. "
            "Take bfloat16 unless the device has only float16; for int8 or float8 use a quantization recipe."
        )
    return low


def trace(fn: Callable, args: tuple, kwargs: dict) -> tuple[Any, list[Any], Any]:
    """The jaxpr of a call, the values of its inputs, and the structure of its output."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [at for at, leaf in enumerate(leaves) if isinstance(leaf, ARRAYS)]

    def flat(*values: Any) -> Any:
        full = list(leaves)
        for at, value in zip(traced, values, strict=True):
            full[at] = value
        args, kwargs = jax.tree.unflatten(structure, full)
        return fn(*args, **kwargs)

    values = [jnp.asarray(leaf) if isinstance(leaf, _NUMPY) else leaf for leaf in (leaves[at] for at in traced)]
    with tracing():
        jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*values)
    return jaxpr, values, jax.tree.structure(shapes)


_NUMPY = (np.ndarray, np.generic)
ARRAYS = (jax.Array, jax.ShapeDtypeStruct, *_NUMPY)


def untraced(jaxpr: Any, results: Iterable[Any], structure: Any) -> Any:
    """The results of evaluating a traced function, as the function itself would have returned them."""
    restored = [_as_written(result, aval) for result, aval in zip(results, jaxpr.out_avals, strict=True)]
    return jax.tree.unflatten(structure, restored)


def _as_written(value: Any, aval: Any) -> Any:
    """A result as the function itself would have returned it: an array, in its own dtype."""
    array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    return array.astype(aval.dtype) if array.dtype != aval.dtype else array
