"""Low precision in JAX models: autocast of the function, or weights cast."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from perfkit._errors import UnsupportedError, first_line
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends import jax_autocast
from perfkit.backends.jax_trees import leaves_with_names


def cast(tree: Any, dtype: Any, only: tuple = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)) -> Any:
    """`tree` with its floating-point arrays (of the dtypes in `only`) in `dtype`."""

    def one(leaf: Any) -> Any:
        wanted = hasattr(leaf, "dtype") and any(leaf.dtype == kind for kind in only)
        return jnp.asarray(leaf).astype(dtype) if wanted else leaf

    return jax.tree.map(one, tree)


def in_float64(tree: Any) -> Any:
    """`tree` with its floating-point arrays in float64, the complex ones in complex128."""
    return cast(cast(tree, jnp.float64), jnp.complex128, only=(jnp.complex64,))


def autocast(work: Workload, dtype: str) -> tuple[Workload, Effect]:
    """The model's function with its matrix products and convolutions in `dtype`, accumulated in float32."""
    model, inputs = work.model, work.inputs
    low = work.replace(model=model.then(lambda function: jax_autocast.autocast(function, dtype)))
    if inputs is None:
        return low, Effect((model.name,), notes=("without example_inputs it is not known what this touches",))
    counts = jax_autocast.autocast_counts(
        model.function(), dtype, model.params, model.rest, *inputs.args, **inputs.kwargs
    )
    touched = tuple(f"{count} × {primitive}" for primitive, count in counts.low.items())
    kept = (*counts.skipped, *counts.kept)
    effect = Effect(touched, tuple(Skipped(f"{item.count} × {item.primitive}", item.reason) for item in kept))
    return (low if touched else work), effect


def cast_weights(work: Workload, dtype: str) -> tuple[Workload, Effect]:
    """Parameters, other state and inputs in `dtype`, outputs in the dtypes that they had.

    In training the optimizer keeps float32 parameters and each step casts copies of them; running statistics stay
    float32, since small updates to them would be lost.

    Raises:
        UnsupportedError: the model does not run so.
    """
    model = work.model
    written = _output_dtypes(work)

    def wrap(function):
        if written is not None:  # it can be traced: products in it are accumulated in float32
            function = jax_autocast.autocast(function, dtype)

        def low(params, rest, *args, **kwargs):
            outputs, new_rest = function(cast(params, dtype), rest, *cast(args, dtype), **cast(kwargs, dtype))
            return _restored(outputs, written, dtype), _like(new_rest, rest)

        return low

    named, _ = leaves_with_names(model.params)
    found = {name: leaf.dtype for name, leaf in named if jnp.issubdtype(leaf.dtype, jnp.floating)}
    touched = [name for name, held in found.items() if held != jnp.dtype(dtype)]
    skipped = tuple(Skipped(name, f"it is {dtype} already") for name in found if name not in touched)
    if not touched:
        other = f"they are {', '.join(sorted({str(leaf.dtype) for _, leaf in named}))}"
        why = other if named else "pass params=, or take bf16"
        nothing = () if found else (f"the model has no floating-point parameters: {why}",)
        return work, Effect(skipped=skipped, notes=nothing)
    model = model.then(wrap)
    if not work.trains:
        model = model.with_state(cast(model.params, dtype), cast(model.rest, dtype))
    low_work = work.replace(model=model)
    if written is not None:
        _check_runs(low_work, dtype)
    return low_work, Effect(tuple(touched), skipped)


def _check_runs(work: Workload, dtype: str) -> None:
    try:
        _outputs(work)
    except Exception as error:  # whatever an operation raises that was given this dtype, or two
        raise UnsupportedError(
            f"weights in {dtype} do not fit the rest of {work.model.name}, which has an operation that does not take "
            f"{dtype}: {type(error).__name__}: {first_line(error)}. Choose 'bf16' or 'fp16', which cast at each matrix "
            "product and leave such operations in float32"
        ) from error


def _output_dtypes(work: Workload) -> list[Any] | None:
    """The dtypes of the model's outputs; None where they cannot be told."""
    if work.inputs is None:
        return None
    try:
        outputs = _outputs(work)
    except Exception:  # whatever code raises that reads the values of what it is given
        return None
    return [leaf.dtype for leaf in jax.tree.leaves(outputs)]


def _outputs(work: Workload) -> Any:
    """The shapes and dtypes of the model's outputs."""
    model, inputs = work.model, work.inputs
    return jax.eval_shape(model.function(), model.params, model.rest, *inputs.args, **inputs.kwargs)[0]


def _restored(outputs: Any, written: list[Any] | None, dtype: str) -> Any:
    """Outputs in the dtypes that they had, in float32 where those are not known."""
    leaves, tree = jax.tree.flatten(outputs)
    if written is None or len(written) != len(leaves):
        return cast(outputs, jnp.float32, only=(dtype,))
    low = [getattr(leaf, "dtype", None) == jnp.dtype(dtype) for leaf in leaves]
    back = [leaf.astype(kind) if is_low else leaf for leaf, kind, is_low in zip(leaves, written, low, strict=True)]
    return jax.tree.unflatten(tree, back)


def _like(new: Any, old: Any) -> Any:
    """`new` in the dtypes of `old`: state must not change its type from call to call."""

    def one(n: Any, o: Any) -> Any:
        known = hasattr(n, "dtype") and hasattr(o, "dtype")  # numbers have none
        return n.astype(o.dtype) if known and n.dtype != o.dtype else n

    return jax.tree.map(one, new, old)
