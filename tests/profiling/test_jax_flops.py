"""FLOPs of JAX models against the formulas of `flops.py`, and against torch's; forward and training."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas
from profile_jax_models import block, loaded, work_of

from perfkit.kernels import _native
from perfkit.kernels.conv2d import conv2d
from perfkit.kernels.rnn import lstm
from perfkit.profiling import flops, jax_flops
from perfkit.profiling.jax_run import marking

BATCH = 4
needs_compiler = pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")


def count(model, inputs, mode="inference"):
    with marking(work_of(model, inputs, mode), run=False) as run:
        return jax_flops.counted(run.jaxpr, mode == "training", run.scopes)


def both(model, inputs, forward, own):
    """A model's forward pass is `forward`, and a training step that and the backward pass without `own`."""
    assert count(model, inputs).total == forward
    assert count(model, inputs, "training").total == forward + flops.backward(forward, own)


def test_the_reference_cnn():
    model, inputs = loaded("cnn", BATCH)
    conv = flops.convolution(BATCH, 1, 32, (3, 3), (26, 26))
    both(model, inputs, conv + flops.linear(BATCH, 5408, 128) + flops.linear(BATCH, 128, 10), conv)


def test_padded_convolutions_count_every_tap():
    model, inputs = loaded("cnn2", BATCH)
    first = flops.convolution(BATCH, 1, 32, (3, 3), (28, 28))
    second = flops.convolution(BATCH, 32, 64, (3, 3), (14, 14))
    both(model, inputs, first + second + flops.linear(BATCH, 3136, 128) + flops.linear(BATCH, 128, 10), first)


def test_the_reference_lstm():
    model, (x,) = loaded("lstm", BATCH)
    steps = x.shape[0]
    forward = flops.recurrent("lstm", steps, BATCH, 10, 50) + flops.linear(BATCH, 50, 1)
    both(model, (x,), forward, flops.recurrent_inputs("lstm", steps, BATCH, 10, 50))


def test_the_reference_text_lstm_by_module():
    model, inputs = loaded("text_lstm", BATCH)
    steps = inputs[0].shape[1]
    both(model, inputs, flops.recurrent("lstm", steps, BATCH, 100, 128, layers=2) + flops.linear(BATCH, 128, 1), 0)
    found = count(model, inputs)
    assert found.by_place["lstm1.cell.dense_i", "forward"] == flops.recurrent_inputs("lstm", steps, BATCH, 100, 128)
    assert found.times["lstm1.cell.dense_h"] == steps
    assert found.times["lstm1"] == 1


def test_a_transformer_block():
    model, (x,) = block()
    forward = flops.transformer_block(3, 2, 7, 16, 32)
    both(model, (x,), forward, 0)  # a norm before the first product has parameters, so that product's inputs need one


class Stacked(nnx.Module):
    """Recurrent layers, the directions of each side by side."""

    def __init__(self, cell, layers, directions, rngs):
        def layer(width):
            ways = [nnx.RNN(cell(width, 8, rngs=rngs)) for _ in range(directions)]
            return nnx.Bidirectional(*ways) if directions == 2 else ways[0]

        self.layers = nnx.List([layer(6 if index == 0 else 8 * directions) for index in range(layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("kind", "cell"), [("lstm", nnx.OptimizedLSTMCell), ("gru", nnx.GRUCell), ("rnn", nnx.SimpleCell)]
)
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 1), (2, 2)])
def test_recurrent_layers(kind, cell, layers, directions):
    """By the same formulas as torch's."""
    model, x = Stacked(cell, layers, directions, nnx.Rngs(0)), jnp.ones((BATCH, 5, 6))
    forward = flops.recurrent(kind, 5, BATCH, 6, 8, layers, directions)
    both(model, (x,), forward, flops.recurrent_inputs(kind, 5, BATCH, 6, 8, directions))


@pytest.mark.parametrize("name", ["cnn", "lstm", "text_lstm"])
def test_both_frameworks_count_alike(name):
    pytest.importorskip("torch")
    from perfkit import reference
    from perfkit.backends import backend
    from perfkit.profiling import torch_count

    model, inputs = reference.load(name, framework="torch", batch_size=BATCH)
    theirs = backend("torch").bind(
        model, None, inputs, mode="inference", loss=None, targets=None, optimizer=None, seed=0
    )
    theirs = torch_count.counted(theirs, theirs.backend.finish(theirs)).flops()
    assert count(*loaded(name, BATCH)).total == theirs


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((2, 2), (2, 2))])
@pytest.mark.parametrize(("strides", "groups"), [((1, 1), 1), ((2, 2), 1), ((1, 2), 2)])
def test_the_gradients_of_a_convolution_are_two_convolutions(strides, groups, padding):
    x, kernel = jnp.ones((2, 9, 11, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def made(x, kernel):
        return conv(x, kernel, window_strides=strides, padding=padding, feature_group_count=groups)

    forward = flops.convolution(2, 4, 6, (3, 3), made(x, kernel).shape[1:3], groups)
    assert jax_flops.counted(jax.make_jaxpr(made)(x, kernel), False).total == forward
    step = jax.make_jaxpr(jax.grad(lambda x, kernel: jnp.sum(made(x, kernel) ** 2), argnums=(0, 1)))
    assert jax_flops.counted(step(x, kernel), True).total == 3 * forward


def test_loops_branches_and_recomputation():
    w = jnp.ones((8, 8))

    def model(x):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

    found = jax_flops.counted(jax.make_jaxpr(model)(jnp.ones((2, 8))), False)
    assert found.total == (5 + 2 + 1) * flops.linear(2, 8, 8)
    assert "unknown length" in found.unknown[0]
    step = jax.make_jaxpr(jax.value_and_grad(jax.checkpoint(lambda w: jnp.sum(jnp.sin(w @ w) @ w))))(w)
    again = 1  # product of the two, whose result the backward pass reads
    assert jax_flops.counted(step, True).total == (2 + again + 2 * 2) * flops.linear(8, 8, 8)


def test_a_pallas_kernel_runs_at_every_place_of_its_grid():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    rows = pallas.BlockSpec((8, 16), lambda i: (i, 0))
    whole = pallas.BlockSpec((16, 16), lambda i: (0, 0))
    result = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    call = pallas.pallas_call(kernel, result, grid=(4,), in_specs=[rows, whole], out_specs=rows)
    found = jax_flops.counted(jax.make_jaxpr(call)(jnp.ones((32, 16)), jnp.ones((16, 16))), False)
    assert found.total == flops.linear(32, 16, 16)


def test_every_device_of_a_mesh_counts():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    parts = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(lambda x: x @ jnp.ones((16, 16)), mesh=mesh, in_specs=parts, out_specs=parts)
    assert jax_flops.counted(jax.make_jaxpr(split)(jnp.ones((32, 16))), False).total == flops.linear(32, 16, 16)


def test_what_nobody_reads_is_not_counted():
    def model(x):
        jax.jit(lambda x: x @ x)(x)
        return x + 1

    assert jax_flops.counted(jax.make_jaxpr(model)(jnp.ones((8, 8))), False).total == 0


def test_an_unknown_custom_call_is_told():
    call = jax.ffi.ffi_call("somebodys_kernel", jax.ShapeDtypeStruct((2,), jnp.float32))
    found = jax_flops.counted(jax.make_jaxpr(call)(jnp.ones(2)), False)
    assert found.unknown == ["custom call somebodys_kernel is not counted"]


@needs_compiler
@pytest.mark.parametrize(("of_inputs", "bidirectional"), [(False, False), (True, True)])
def test_perfkits_own_recurrent_layers(of_inputs, bidirectional):
    directions, x = 1 + bidirectional, jnp.ones((5, BATCH, 6))
    widths = [6] * directions + [8 * directions] * directions
    weights = [(jnp.ones((32, width)), jnp.ones((32, 8)), jnp.ones(32), jnp.ones(32)) for width in widths]

    def loss(x, weights):
        return jnp.sum(lstm(x, weights, bidirectional=bidirectional, implementation="cpu")[0])

    forward = flops.recurrent("lstm", 5, BATCH, 6, 8, 2, directions)
    assert jax_flops.counted(jax.make_jaxpr(loss)(x, weights), False).total == forward
    step = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1) if of_inputs else 1))(x, weights)
    own = 0 if of_inputs else flops.recurrent_inputs("lstm", 5, BATCH, 6, 8, directions)
    assert jax_flops.counted(step, True).total == forward + flops.backward(forward, own)


@needs_compiler
@pytest.mark.parametrize("of_inputs", [False, True])
def test_perfkits_own_convolutions(of_inputs):
    x, weight = jnp.ones((BATCH, 9, 9, 2)), jnp.ones((3, 3, 2, 8))

    def loss(x, weight):
        return jnp.sum(conv2d(x, weight, padding=1, activation="relu", pool=2, implementation="cpu"))

    forward = flops.convolution(BATCH, 2, 8, (3, 3), (9, 9))
    assert jax_flops.counted(jax.make_jaxpr(loss)(x, weight), False).total == forward
    step = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1) if of_inputs else 1))(x, weight)
    own = 0 if of_inputs else forward
    assert jax_flops.counted(step, True).total == forward + flops.backward(forward, own)
