"""Looking into jaxprs, and how far a low-precision result may be from the exact one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def equations(jaxpr: Any, *names: str) -> Iterator[Any]:
    """Every equation of a jaxpr and of the jaxprs inside it; only those of the named primitives, if any are named."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if not names or eqn.primitive.name in names:
            yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner, *names)


def operand_dtypes(jaxpr: Any, name: str) -> list[tuple[str, ...]]:
    """The dtypes of the operands of every equation of one primitive."""
    return [tuple(str(var.aval.dtype) for var in eqn.invars) for eqn in equations(jaxpr, name)]


def unit_roundoff(dtype: Any) -> float:
    """The largest relative error of rounding to `dtype`: 2**-8 for bfloat16, 2**-11 for float16."""
    import jax.numpy as jnp

    return float(jnp.finfo(dtype).eps) / 2


def relative_error(result: Any, reference: Any) -> float:
    """The 2-norm of the difference over that of the reference, over all arrays of a tree together."""
    import jax

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])

    return float(np.linalg.norm(flat(result) - flat(reference)) / np.linalg.norm(flat(reference)))


def assert_low_but_close(result: Any, reference: Any, dtype: Any, products: int) -> None:
    """Close to the float32 reference, and yet not computed in float32.

    A product rounds two operands and a result, so it errs by three roundings; a chain of products, by the sum.
    """
    error = relative_error(result, reference)
    assert error <= 3 * products * unit_roundoff(dtype), f"relative error {error:.1e} over {products} products"
    assert error > 1e-6, "as exact as float32: nothing ran in the low dtype"
