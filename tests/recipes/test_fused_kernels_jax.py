"""The recipe `fused_kernels` in JAX: whole models, in training, behind other recipes and compiled."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from fused_jax import TOLERANCE, assert_same, gradients, outputs, reasons, swapped, workload
from jax import lax

import perfkit
from perfkit import InvalidInputError, reference
from perfkit._chain import chain_of
from perfkit.backends.jax_dress import finished
from perfkit.kernels import trace
from perfkit.measure.environment import has

pytestmark = pytest.mark.usefixtures("hasty")


def test_include_and_exclude():
    model = reference.load("cnn2", framework="jax")[0]
    work = workload(model, jnp.ones((2, 28, 28, 1)))
    _, effect = swapped(work, "fused_kernels(exclude=['conv1'])")
    assert "conv1" not in effect.touched
    assert "include/exclude" in reasons(effect)["conv1"]
    with pytest.raises(InvalidInputError, match="matches no layer"):
        swapped(work, "fused_kernels(include=['conv3'])")
    _, effect = swapped(work.replace(inputs=None), "fused_kernels(include=['conv1'])")
    assert "not known" in effect.notes[0]
    _, effect = swapped(workload(lambda params, x: x @ params, jnp.ones((2, 3)), params=jnp.ones((3, 2))))
    assert effect.status == "NO_EFFECT"


@pytest.mark.parametrize("name", ["cnn", "cnn2", "lstm", "rnn", "text_lstm"])
def test_training_the_reference_models_gives_the_same_gradients_and_losses(name):
    task = reference.task(name, framework="jax")
    inputs = task.example_inputs if isinstance(task.example_inputs, tuple) else (task.example_inputs,)
    rows = 1 if name in ("lstm", "rnn") else 0
    inputs = tuple(lax.slice_in_dim(each, 0, 8, axis=rows) for each in inputs)
    work = workload(task.model, *inputs, mode="training")
    result, effect = swapped(work)
    assert effect.touched
    assert all("is the library's here" in item.reason for item in effect.skipped)
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)
    curves = [losses(each, lambda y: task.loss(y, task.targets[:8])) for each in (work, result)]
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=10 * TOLERANCE)


def losses(work, loss):
    """Of some steps of gradient descent. Not of Adam, which makes steps of roundings."""
    step = jax.jit(jax.value_and_grad(lambda params: loss(outputs(work, params))))
    params, curve = work.model.params, []
    for _ in range(6):
        value, slopes = step(params)
        params = jax.tree.map(lambda one, slope: one - 0.02 * slope, params, slopes)
        curve.append(float(value))
    return curve


FLOAT32, BFLOAT16 = has("avx512f"), has("avx512_bf16")
CHAINS = [
    ("fused_kernels", "cnn", 1 + 2 * FLOAT32, ""),
    ("bf16+fused_kernels", "cnn", 1 + 2 * BFLOAT16, "bfloat16"),
    ("bf16+fused_kernels", "text_lstm", 2 + BFLOAT16, "bfloat16"),
    ("half+fused_kernels", "lstm", 1 + BFLOAT16, "bfloat16"),
    ("int8_dynamic+fused_kernels", "lstm", 0, ""),
    ("int8_dynamic+fused_kernels", "cnn", 0, ""),
]


@pytest.mark.parametrize(("chain", "name", "count", "dtype"), CHAINS)
def test_chains(chain, name, count, dtype):
    """What earlier steps made is what is rewritten: layers that run in low precision go on so, integer ones stay."""
    model, inputs = reference.load(name, framework="jax")
    rows = 1 if name == "lstm" else 0
    inputs = tuple(lax.slice_in_dim(each, 0, 8, axis=rows) for each in inputs)
    work = workload(model, *inputs)
    result, effect = swapped(work, chain)
    assert len(effect.touched) == count
    with trace() as choices:
        text = str(jax.make_jaxpr(lambda: outputs(result))())
    of_this_step = [choice.implementation for choice in choices if choice.op != "linear_int8_static"]  # quantization's
    assert of_this_step == ["cpu"] * count
    assert not dtype or "bf16" in text
    new, old = outputs(result), outputs(work)
    assert new.dtype == old.dtype
    assert float(jnp.linalg.norm(new - old) / jnp.linalg.norm(old)) < chain_of(chain).tolerance + TOLERANCE


@pytest.mark.skipif(not BFLOAT16, reason="a CPU without AVX512-BF16")
@pytest.mark.parametrize("precision", ["bf16", "half"])
def test_xla_counts_next_to_nothing_in_a_program_of_kernels(precision):
    """So that it runs it on the thread that calls, which it does below a thousand operations."""
    model, inputs = reference.load("cnn", framework="jax", batch_size=16)
    work, _ = swapped(workload(model, *inputs), f"{precision}+fused_kernels")
    done = finished(work.model.compiled_ahead())
    expected = outputs(work)
    assert_same(done.call(*inputs), expected, 2**-7)  # XLA may leave out roundings in between
    assert done.program().cost_analysis()["flops"] < 1000
    assert done.program().as_text().count('custom_call_target="perfkit_') == 4


def test_compiled_the_result_takes_the_models_place():
    model, inputs = reference.load("cnn", framework="jax")
    result = perfkit.optimize(model, "fused_kernels+compile", example_inputs=inputs)
    assert result.report.fidelity.ok
    assert isinstance(result.model, type(model))
    assert_same(result.model(*inputs), model(*inputs))
    for each in (model, result.model):
        each.conv1.kernel[...] = each.conv1.kernel[...] * 2
    assert_same(result.model(*inputs), model(*inputs))
