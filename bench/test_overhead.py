"""What perfkit itself costs: importing it, and each call of what it returns."""

import subprocess
import sys

import pytest

import perfkit
from perfkit.measure import timing


def interpreter(code: str):
    """A call that runs `code` in a fresh interpreter."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def test_import(paired):
    """`import perfkit` beside an interpreter that only starts."""
    start, loaded = interpreter("pass"), interpreter("import perfkit")
    before, after, comparison = timing.paired(
        start, loaded, baseline="python -c pass", variant_name="import perfkit", budget_s=20
    )
    paired(loaded, comparison, import_ms=after.median_ms - before.median_ms)


def test_call_torch(paired):
    """The smallest optimized module against the module itself: what a call costs on top."""
    torch = pytest.importorskip("torch")
    model, x = torch.nn.Linear(1, 1).eval(), torch.zeros(1, 1)
    result = perfkit.optimize(model, "channels_last", example_inputs=(x,))
    with torch.no_grad():
        before, after, comparison = timing.paired(
            lambda: model(x), lambda: result.model(x), baseline="model", variant_name="result.model", budget_s=5
        )
        paired(lambda: result.model(x), comparison, overhead_us=(after.median_ms - before.median_ms) * 1e3)


def test_call_jax(paired):
    """A compiled nnx module against `jax.jit` of a plain function that computes the same."""
    jax = pytest.importorskip("jax")
    from flax import nnx

    model, x = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), jax.numpy.zeros((1, 1))
    result = perfkit.optimize(model, "compile", example_inputs=(x,))
    kernel, bias = model.kernel.get_value(), model.bias.get_value()
    plain = jax.jit(lambda kernel, bias, x: x @ kernel + bias)
    before, after, comparison = timing.paired(
        lambda: plain(kernel, bias, x).block_until_ready(),
        lambda: result.model(x).block_until_ready(),
        baseline="jax.jit of a function",
        variant_name="result.model",
        budget_s=5,
    )
    paired(
        lambda: result.model(x).block_until_ready(), comparison, overhead_us=(after.median_ms - before.median_ms) * 1e3
    )
