"""What autocast does with each JAX primitive: the tables, and the questions the rewriter and the counter ask of them.

A primitive is one of five things. To teach autocast a new one, put its name in the right table.

    product      matrix product or convolution: operands become the low dtype            PRODUCTS
    neutral      runs in whatever dtype arrives; where two meet, float32 wins            NEUTRAL, SEPARATE
    sensitive    operands go back to float32, and the result stays float32               SENSITIVE
    control      holds other jaxprs, which are rewritten in their turn                   CONTROL
    anything else runs in the dtypes it was written for, and is reported by name         REASONS says why

Only float32 values ever change dtype. Integers, booleans, float64, complex numbers, random keys and whatever the caller
already stored in bfloat16 or float16 pass through untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

FLOAT32 = np.dtype("float32")


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


PRODUCTS = _names("dot_general conv_general_dilated")

_ARITHMETIC = _names("abs add add_any ceil clamp div floor max min mul neg rem round select_n sign")
_COMPARISON = _names("argmax argmin eq eq_to ge gt is_finite le le_to lt lt_to ne")
_ORDER = _names("cummax cummin reduce_max reduce_min reduce_window_max reduce_window_min")
# Moves numbers and never computes one, so a weight that only passes through these can be cast once, before a loop.
MOVEMENT = _names(
    "broadcast_in_dim concatenate copy dynamic_slice dynamic_update_slice gather name pad reshape reshard rev",
    "sharding_constraint slice split squeeze stack stop_gradient tile transpose unstack",
)
NEUTRAL = _ARITHMETIC | _COMPARISON | _ORDER | MOVEMENT

# Neutral as well, but each operand has a result of its own, so operands need not agree with one another.
SEPARATE = _names(
    "all_gather all_gather_invariant all_to_all device_put optimization_barrier pbroadcast pmax pmin ppermute pvary",
    "sort top_k",
)

# torch.autocast keeps in float32: exp, log, pow, rsqrt, sums, products, cumulative sums, norms, losses, hyperbolic
# and inverse functions. So does this list, and four kinds more, each for a reason:
#   logistic, tanh             a forget gate of 0.998 has only 0.996 and 1.0 to choose from in bfloat16, and an LSTM
#                              multiplies by it at every step
#   sub                        softmax and variance subtract first; an error there is felt after exp and square
#   square, integer_pow, sqrt  a gradient of 1e-4 squared is 0 in float16, and Adam divides by its root
#   erf, sin, cos, ...         cost the same on float32 next to a product, and keep their digits
_TRANSCENDENTAL = _names(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp exp2",
    "expm1 igamma igamma_grad_a igammac integer_pow lgamma log log1p log2 logistic nextafter one_minus_square",
    "polygamma polynomial pow random_gamma regularized_incomplete_beta rsqrt sin sinh sqrt square tan tanh zeta",
)
_SUMS = _names(
    "cumlogsumexp cumprod cumsum psum psum_invariant reduce_prod reduce_scatter reduce_sum reduce_window_sum",
    "scatter-add scatter-mul scatter-sub select_and_gather_add select_and_scatter_add sub",
)
_LINEAR_ALGEBRA = _names(
    "cholesky eig eigh fft hessenberg householder_product lu qr schur svd triangular_solve tridiagonal",
    "tridiagonal_solve",
)
# These read or write bits, or carry a function that was traced for float32.
_EXACT = _names(
    "bitcast_convert_type complex reduce reduce_precision reduce_window rng_uniform scatter scatter-max scatter-min",
    "select_and_scatter",
)
SENSITIVE = _TRANSCENDENTAL | _SUMS | _LINEAR_ALGEBRA | _EXACT

# The parameters that hold the inner jaxprs. The rewriter has a rule for each name here, and a test holds it to that.
CONTROL = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "eval_jaxpr": ("call_jaxpr",),
    "checkpoint": ("jaxpr",),
    "remat2": ("jaxpr",),
    "cond": ("branches",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "scan": ("jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "shard_map": ("jaxpr",),
}

_USER_CODE = "calls back into Python code, which sees the dtypes it was written for"
_MUTABLE = "works on a mutable array, whose dtype cannot change"
_KERNEL = "a kernel compiled for the dtypes it was written for"
REASONS = {
    "pallas_call": _KERNEL,
    "ffi_call": _KERNEL,
    "triton_kernel_call": _KERNEL,
    "debug_callback": _USER_CODE,
    "debug_print": _USER_CODE,
    "io_callback": _USER_CODE,
    "pure_callback": _USER_CODE,
    "custom_linear_solve": "an iterative solve needs float32",
    "new_ref": _MUTABLE,
    "swap": _MUTABLE,
    "addupdate": _MUTABLE,
}
NO_RULE = "autocast has no rule for it, so it runs in the dtypes it was written for"


def is_castable(aval: Any) -> bool:
    """Whether autocast may hold this value in the low dtype: a float32 array, and nothing else."""
    return isinstance(aval, jax.core.ShapedArray) and aval.dtype == FLOAT32


def product_skip_reason(eqn: Any, low: np.dtype) -> str | None:
    """Why a matrix product or convolution stays as it is, or None if it will run in the low dtype.

    Args:
        eqn: an equation whose primitive is in PRODUCTS.
        low: the dtype autocast casts to.

    Returns:
        A short reason for a report, such as "float64 operands", or None.
    """
    dtypes = [var.aval.dtype for var in eqn.invars[:2]]
    result = eqn.outvars[0].aval.dtype
    if all(dtype == low for dtype in dtypes):
        return f"already {low}"
    for dtype in dtypes:
        if dtype not in (FLOAT32, low):
            return f"{dtype} operands"
    if result != FLOAT32:
        return f"a {result} result was asked for"
    return precision_reason(eqn.params.get("precision"))


def is_low_throughout(eqn: Any, low: np.dtype) -> bool:
    """Whether a product was written with low operands and a low result, for which XLA's CPU widens both operands."""
    return all(var.aval.dtype == low for var in (*eqn.invars[:2], eqn.outvars[0]))


def precision_reason(precision: Any) -> str | None:
    """Whoever writes precision=HIGHEST at a product means it, and a low dtype would silently overrule them."""
    parts = precision if isinstance(precision, tuple) else (precision,)
    asked = [part for part in parts if part not in (None, lax.Precision.DEFAULT)]
    return f"precision={getattr(asked[0], 'name', asked[0])} was asked for" if asked else None


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs inside an equation whose primitive is in CONTROL."""
    for name in CONTROL[eqn.primitive.name]:
        inner = eqn.params[name]
        yield from inner if isinstance(inner, tuple) else (inner,)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations in a jaxpr, inner ones included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives in a jaxpr, inner ones included."""
    return {eqn.primitive.name for eqn in equations(jaxpr)}


def kept_reason(eqn: Any) -> str | None:
    """Why an equation that reads float32 values runs as it was written, or None if autocast has a rule for it."""
    name = eqn.primitive.name
    if not any(is_castable(var.aval) for var in eqn.invars) and name not in CONTROL:
        return None
    if name in CONTROL:
        arrays = all(isinstance(var.aval, jax.core.ShapedArray) for var in eqn.invars)
        return None if arrays else _MUTABLE
    if name in PRODUCTS or name in NEUTRAL or name in SEPARATE or name in SENSITIVE or name == "convert_element_type":
        return None
    return REASONS.get(name, NO_RULE)


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants and how many are carried; the rest are scanned over."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # JAX 0.11 keeps a tree instead of two numbers
    return len(constants), len(carried)


def runs(items: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """The items in runs of the given sizes, and what is left."""
    found, start = [], 0
    for size in sizes:
        found.append(list(items[start : start + size]))
        start += size
    return [*found, list(items[start:])]


def feeds_only_products(jaxpr: Any, low: np.dtype) -> list[bool | None]:
    """For each input of a jaxpr: is every use of it an operand of a product that will run in the low dtype?

    Such an input can be cast once, before a loop, instead of in every iteration.

    Args:
        jaxpr: the body of a loop, open or closed.
        low: the dtype autocast casts to.

    Returns:
        True, False, or None where the input is not used at all.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    uses: dict[Any, list[bool | None]] = {var: [False] for var in jaxpr.outvars if not _is_literal(var)}
    for eqn in reversed(
        jaxpr.eqns
    ):  # backwards, so that what becomes of a result is known before its operands are seen
        for position, var in enumerate(eqn.invars):
            if not _is_literal(var):
                uses.setdefault(var, []).append(_use_feeds_product(eqn, position, low, uses))
    return [_every(uses.get(var, ())) for var in jaxpr.invars]


def _use_feeds_product(eqn: Any, position: int, low: np.dtype, uses: dict[Any, list[bool | None]]) -> bool | None:
    name = eqn.primitive.name
    if name in PRODUCTS:
        return product_skip_reason(eqn, low) is None
    if name in MOVEMENT:
        return _every([_every(uses.get(var, ())) for var in eqn.outvars])
    if name in CONTROL:
        return _every([feeds_only_products(inner, low)[at] for inner, at in _inside(eqn, position)] or [False])
    return False


def _inside(eqn: Any, position: int) -> list[tuple[Any, int]]:
    """Where an operand of a control equation arrives inside it; nowhere, if its dtype there is not ours to choose."""
    name, params = eqn.primitive.name, eqn.params
    if name.startswith("custom_"):
        return []
    if name == "cond":
        return [(branch, position - 1) for branch in params["branches"]] if position else []
    if name == "scan":
        constants, carried = scan_sizes(params)
        return [] if constants <= position < constants + carried else [(params["jaxpr"], position)]
    if name == "while":
        in_test, in_body = params["cond_nconsts"], params["body_nconsts"]
        if position < in_test:
            return [(params["cond_jaxpr"], position)]
        return [(params["body_jaxpr"], position - in_test)] if position < in_test + in_body else []
    return [(inner, position) for inner in inner_jaxprs(eqn)]


def _every(answers: Sequence[bool | None]) -> bool | None:
    """All of the answers that are known; None if none is."""
    known = [answer for answer in answers if answer is not None]
    return all(known) if known else None


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, jax.extend.core.Literal)
