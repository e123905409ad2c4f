"""Factorized JAX models: as close as the kept energy promises, smaller, and never multiplied back together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
from flax import linen, nnx
from jax_compression_models import LowRank, Prune, Recurrent, applied, filled, flat, outputs, rows, training
from jaxpr_walk import equations

import perfkit
from perfkit import InvalidInputError, UnsupportedError, reference
from perfkit.backends.jax_backend import BACKEND
from perfkit.pruning.jax_low_rank import split_in_two

pytestmark = pytest.mark.usefixtures("hasty")


def low(m, n, rank, seed=0):
    """A matrix of that rank."""
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.standard_normal((m, rank)) @ generator.standard_normal((rank, n)), jnp.float32)


def products(result, x):
    """The shapes of the matrices that the result's products read beside the activations."""
    model = result.after.model
    traced = jax.make_jaxpr(model.function())(model.params, model.rest, x)
    return {eqn.invars[1].aval.shape for eqn in equations(traced) if eqn.primitive.name == "dot_general"}


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)  # float32, two products instead of one


@pytest.mark.parametrize(("energy", "rank"), [(1.0, 3), (0.992, 3), (0.99, 2), (0.86, 2), (0.85, 1)])
def test_the_rank_is_the_smallest_that_keeps_the_energy(energy, rank):
    values = np.array([10.0, 4.0, 1.0])  # shares of the squares: 85.5 %, 13.7 %, 0.9 %
    u, v = (np.linalg.qr(np.random.default_rng(seed).standard_normal((20, 3)))[0] for seed in (0, 1))
    left, right = split_in_two((u * values) @ v.T, energy)
    assert (left.shape, right.shape) == ((20, rank), (rank, 20))


def test_complex_kernels_keep_both_parts():
    kernel = np.asarray(low(20, 16, 2) + 1j * low(20, 16, 2, seed=1))
    left, right = split_in_two(kernel, 1 - 1e-9)
    assert left.shape[1] == 4
    close(left @ right, kernel)


def test_the_error_is_the_energy_left_out():
    kernel = np.random.default_rng(0).standard_normal((40, 60)) * np.linspace(1, 0.01, 60) ** 4
    left, right = split_in_two(kernel, 0.9)
    lost = np.linalg.norm(kernel - left @ right) ** 2 / np.linalg.norm(kernel) ** 2
    assert 0 < lost <= 0.1
    shorter = np.linalg.norm(kernel - left[:, :-1] @ right[:-1]) ** 2 / np.linalg.norm(kernel) ** 2
    assert shorter > 0.1, "one rank less would keep too little"
    assert left.dtype == kernel.dtype


@pytest.mark.parametrize(("kernel", "why"), [
    (np.random.default_rng(0).standard_normal((8, 8)), "two factors would not be smaller"),
    (np.zeros((8, 8)), "zero or not finite"),
])  # fmt: skip
def test_what_would_not_get_smaller_stays(kernel, why):
    assert why in split_in_two(kernel, 0.99)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(24, 20, rngs=rngs), nnx.Linear(20, 20, use_bias=False, rngs=rngs)])
        self.conv, self.out = nnx.Conv(1, 2, (1,), rngs=rngs), nnx.Linear(20, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.out(x)


def mlp():
    model = filled(lambda: Mlp(nnx.Rngs(0)))
    model.layers[0].kernel[...] = low(24, 20, 3)
    model.layers[1].kernel[...] = low(20, 20, 2)
    return model


def test_linear_layers_become_two_products():
    model, x = mlp(), rows(4, 24)
    before = flat(model)
    result = applied(LowRank(energy=0.99999), model, x)
    assert result.effect.touched == ("layers.0", "layers.1")
    assert result.effect.notes == ("layers.0: 24 × 20 at rank 3", "layers.1: 20 × 20 at rank 2")
    reasons = {item.name: item.reason for item in result.effect.skipped}
    assert "would not be smaller" in reasons["out"]
    assert "no matrix" in reasons["conv"]
    assert not result.effect.simulated
    close(outputs(result.model, x), outputs(model, x))
    assert products(result, x) == {(24, 3), (3, 20), (20, 2), (2, 20), (20, 3)}
    assert result.parameters[0] - result.parameters[1] == 24 * 20 - 3 * 44 + 20 * 20 - 2 * 40
    assert type(result.model) is Mlp
    assert result.model.layers[0].kernel.shape == (24, 20)
    for path, array in flat(model).items():
        np.testing.assert_array_equal(array, before[path])


def test_a_layer_used_twice_stays_one():
    model = mlp()
    model.layers[1].kernel[...] = low(20, 20, 2)
    model.again = model.layers[1]
    result = applied(LowRank(), model, rows(4, 24))
    assert result.model.again is result.model.layers[1]


@pytest.mark.parametrize("cell", [nnx.OptimizedLSTMCell, nnx.GRUCell])
def test_recurrent_cells(cell):
    model, x = filled(lambda: Recurrent(cell, nnx.Rngs(0))), rows(3, 5, 6)
    kernel = model.rnn.cell.dense_h.kernel
    kernel[...] = 0.1 * low(*kernel.shape, 2)
    result = applied(LowRank(energy=0.99999, include="rnn.cell.dense_h"), model, x)
    assert result.effect.touched == ("rnn.cell.dense_h",)
    close(outputs(result.model, x), outputs(model, x))
    assert kernel.shape not in products(result, x)


def test_a_reference_model_that_asks_its_cell_for_a_kernel():
    model, inputs = reference.load("lstm", framework="jax")
    result = applied(LowRank(energy=0.6), model, inputs)
    assert "lstm.cell.dense_h" in result.effect.touched
    assert outputs(result.model, *inputs).shape == (64, 1)


def test_functions_in_either_layout_and_in_a_loop():
    def net(params, x):
        x = jax.nn.relu(x @ params["in"]["left"])  # a name that the nodes have too
        x = (params["turned"] @ x.T).T

        def step(h, _):
            return jnp.tanh(h @ params["loop"].T), None

        return jax.lax.scan(step, x, None, length=3)[0]

    params = {"in": {"left": low(24, 20, 3), "right": rows(3)}, "turned": low(20, 20, 2), "loop": 0.1 * low(20, 20, 1)}
    x = rows(4, 24)
    result = applied(LowRank(energy=0.99999), net, x, params=params)
    assert set(result.effect.touched) == {"in", "turned", "loop"}
    assert {leaf.shape for leaf in jax.tree.leaves(result.after.model.params["loop"])} == {(20, 1), (1, 20)}
    close(result.model(result.after.model.params, x), net(params, x))
    model = result.after.model
    traced = jax.make_jaxpr(model.function())(model.params, model.rest, x)
    shapes = {var.aval.shape for eqn in equations(traced) for var in eqn.invars if eqn.primitive.name == "dot_general"}
    assert not shapes & {(24, 20), (20, 20)}, "the product of the two is never there"


def test_linen():
    class Dense(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(20)(x)

    x = rows(4, 24)
    params = {"params": {"Dense_0": {"kernel": low(24, 20, 3), "bias": rows(20)}}}
    result = applied(LowRank(energy=0.99999), Dense(), x, params=params)
    assert result.effect.touched == ("Dense_0",)
    close(result.model.apply({"params": result.after.model.params}, x), Dense().apply(params, x))
    assert products(result, x) == {(24, 3), (3, 20)}


def test_then_pruned():
    """Of what is factorized already, units and ranks can go."""
    model, x = mlp(), rows(4, 24)
    thin = applied(LowRank(energy=0.99999), model, x)
    small = applied(Prune(include="layers.0"), thin.model, x)
    assert small.model.layers[0].left.shape == (24, 2)
    assert small.model.layers[0].right.shape == (2, 10)
    assert small.model.layers[0].out_features == small.model.layers[1].in_features == 10

    def net(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": low(24, 20, 3), "b": rows(20, 3)}
    thin = applied(LowRank(include="a"), net, x, params=params)
    work, effect = Prune(include="a").jax(thin.after)
    assert work.model.params["b"].shape == (10, 3)
    assert effect.touched == ("a",)


def test_a_matrix_used_otherwise_stays():
    def net(params, x):
        return x @ params["a"] + jnp.sum(params["a"])

    result = applied(LowRank(), net, rows(4, 24), params={"a": low(24, 20, 3)})
    assert result.effect.status == "NO_EFFECT"
    assert "used in 'reduce_sum'" in result.effect.skipped[0].reason


def test_a_stack_of_layers_stays():
    class Net(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
            self.layers = nnx.split_rngs(splits=3)(make)(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    result = applied(LowRank(energy=0.5), Net(nnx.Rngs(0)), rows(4, 8))
    assert result.effect.status == "NO_EFFECT"
    assert "a stack of layers" in result.effect.skipped[0].reason


def test_training_trains_the_factors():
    given = training("conv", 3)
    given["model"].fc.kernel[...] = low(192, 16, 2)
    fields = {name: given[name] for name in ("loss", "targets", "optimizer")}
    work = BACKEND.bind(given["model"], None, given["example_inputs"], mode="training", seed=0, **fields)
    after, effect = LowRank(distill=True).jax(work)
    assert effect.touched == ("fc",)
    assert after.training.teacher is not None
    finished = BACKEND.finish(after)
    losses = [float(finished.train_step((given["example_inputs"], given["targets"]))) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert finished.model.fc.left.shape == (192, 2)


def test_a_function_trains_on_its_factors():
    params = {"a": low(24, 20, 2), "b": 0.1 * rows(20, 3)}
    x, targets = rows(8, 24), jnp.arange(8) % 3

    def net(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    result = perfkit.optimize(
        net, params=params, recipe=LowRank(), example_inputs=(x,), targets=targets, mode="training",
        loss=lambda y, t: optax.softmax_cross_entropy_with_integer_labels(y, t).mean(), optimizer=optax.adam(1e-2),
    )  # fmt: skip
    losses = [float(result.train_step((x, targets))) for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    assert result.params["a"]["left"].shape == (24, 2)


def test_what_cannot_be_asked():
    with pytest.raises(InvalidInputError, match="mode='training'"):
        applied(LowRank(distill=True), mlp(), rows(4, 24))
    with pytest.raises(UnsupportedError, match="pass example_inputs"):
        applied(LowRank(), lambda p, x: x @ p["w"], None, params={"w": low(24, 20, 2)})
    with pytest.raises(UnsupportedError, match="has no parameters"):
        applied(LowRank(), lambda x: x @ x.T, rows(4, 24))
    with pytest.raises(InvalidInputError, match="matches no layer"):
        applied(LowRank(exclude="nothing"), mlp(), rows(4, 24))
