"""Calls of the recurrent op in JAX on a case's numbers, both passes, and what they should return: for several tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from perfkit.kernels.rnn import cases, jax_op
from perfkit.kernels.rnn.cases import CASES, Case

PADDED = [case for case in CASES if case.ragged != "packed"]
SMALL = Case("LSTM", 5, 4, 3, 9, layers=2, bidirectional=True, batch_first=True, ragged="lengths")


def call(case: Case, implementation: str, **options):
    """(x, weights, h0, c0) -> y, hn, cn, on numbers of the case."""
    rows = cases.numbers(case).rows
    given = {"lengths": rows, "batch_first": case.batch_first, "bidirectional": case.bidirectional, **options}
    return lambda x, weights, h0, c0: jax_op.run(x, case.mode, weights, h0, c0, implementation=implementation, **given)


def arrays(case: Case, dtype: str | None = None):
    """The arguments of `call`, and gradients of its results; rounded to the case's dtype, then of `dtype`."""
    given = cases.numbers(case)
    parts = (given.x, list(given.weights), given.h0, given.c0), (given.d_y, given.d_hn, given.d_cn)
    return jax.tree.map(lambda x: jnp.asarray(x, case.dtype).astype(dtype or case.dtype), parts)


def both_passes(function, arguments, gradients):
    """Results and gradients, in one program: y, hn, cn; of x, the weights, h0 and c0."""

    def run(arguments, gradients):
        results, back = jax.vjp(function, *arguments)
        return results, back(gradients)

    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(run)(arguments, gradients))


@functools.cache
def expected(case: Case):
    """By the reference, in float64."""
    with jax.enable_x64(True):
        return both_passes(call(case, "reference"), *arrays(case, "float64"))


def assert_close(case: Case, found) -> None:
    """Results and every gradient, within the case's tolerances."""
    for gradient, (mine, true) in enumerate(zip(found, expected(case), strict=True)):
        leaves = jax.tree.leaves(mine), jax.tree.leaves(true)
        assert jax.tree.structure(mine) == jax.tree.structure(true)
        for actual, exact in zip(*leaves, strict=True):
            error = cases.error(case, actual, exact, gradient=bool(gradient))
            assert error < cases.tolerance(case, gradient=bool(gradient))
