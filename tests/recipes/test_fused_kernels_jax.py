"""The recipe `fused_kernels` in JAX: what is swapped, what is not and why, and that nothing else changes."""

from typing import Any

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

import perfkit
from perfkit import InvalidInputError, reference
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit._workload import Inputs, Workload
from perfkit.backends.jax_backend import BACKEND
from perfkit.backends.jax_model import FunctionModel, LinenModel, NnxModel
from perfkit.kernels import trace

pytestmark = pytest.mark.usefixtures("hasty")

SUMS = 1024
"""Above the number of terms in any sum here, but those of gradients over pixels."""

TOLERANCE = SUMS**0.5 * 2**-23
"""Sums in another order: each of n roundings moves a result by 2^-24 of it, sqrt(n) of them together; twice that."""


def workload(model: Any, *inputs: Any, params: Any = None, mode: str = "inference", **kwargs: Any) -> Workload:
    if isinstance(model, nnx.Module):
        module = nnx.clone(model)
        module.train() if mode == "training" else module.eval()
        held = NnxModel.of(module)
    elif isinstance(model, linen.Module):
        held = LinenModel(original=model, params=params["params"], rest={})
    else:
        held = FunctionModel(original=model, params=params)
    return Workload(BACKEND, held, Inputs(inputs, kwargs), mode, "cpu")


def swapped(work: Workload, chain: str = "fused_kernels") -> tuple[Workload, Any]:
    """The chain applied, and its last step's effect."""
    done = apply(chain_of(chain), work)
    return done.works[-1], done.steps[-1].effect


def outputs(work: Workload, params: Any = None) -> Any:
    model = work.model

    def run(params):
        return model.function()(params, model.rest, *work.inputs.args, **work.inputs.kwargs)[0]

    return jax.jit(run)(model.params if params is None else params)


def gradients(work: Workload) -> Any:
    def loss(params):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(outputs(work, params)))

    return jax.grad(loss, allow_int=True)(work.model.params)


def assert_same(new: Any, old: Any, within: float = TOLERANCE) -> None:
    """Every leaf is as close as `within`, relative to its largest number."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if jnp.issubdtype(one.dtype, jnp.floating):
            scale = float(jnp.abs(other).max())
            assert float(jnp.abs(one - other).max()) <= within * max(scale, 1e-6)


def reasons(effect: Any) -> dict[str, str]:
    return {item.name: item.reason for item in effect.skipped}


def kernels_in(work: Workload) -> list[str]:
    with trace() as choices:
        jax.make_jaxpr(lambda: outputs(work))()
    return [choice.implementation for choice in choices]


KEYS = jax.random.split(jax.random.key(0), 6)
IMAGES = jax.random.normal(KEYS[0], (2, 12, 11, 3))
SEQUENCES = jax.random.normal(KEYS[1], (4, 5, 6))
LENGTHS = jnp.array([3, 2, 5, 4])
KERNEL = jax.random.normal(KEYS[2], (3, 3, 3, 8)) / 5
WEIGHTS = {"conv": {"kernel": KERNEL, "bias": jax.random.normal(KEYS[3], (8,))}}


def convolved(x, kernel, padding="VALID", **options):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def pooled(x, size=2, stride=2, padding="VALID"):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), padding)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        for variable, low in (
            (self.norm.mean, -0.5),
            (self.norm.var, 0.5),
            (self.norm.scale, 0.5),
            (self.norm.bias, 0),
        ):
            variable[...] = jax.random.uniform(KEYS[4], (8,), minval=low, maxval=low + 1)

    def __call__(self, x):
        return nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(linen.relu(linen.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = linen.relu(linen.Conv(4, (3, 3), feature_group_count=2, use_bias=False)(x))
        return linen.max_pool(x, (2, 2), (2, 2))


def plain(params, x):
    return pooled(jnp.maximum(convolved(x, params["conv"]["kernel"]) + params["conv"]["bias"], 0))


def pool_first(params, x):
    return jax.nn.relu(pooled(convolved(x, params["conv"]["kernel"], rhs_dilation=(2, 2))))


def inside_of_jit(params, x):
    return jax.jit(plain)(params, x) + jax.jit(plain)(params, 2 * x)


def checkpointed(params, x):
    return jax.checkpoint(lambda x: pooled(jax.nn.relu(convolved(x, params["conv"]["kernel"]))))(x)


def in_a_loop(params, xs):
    return lax.scan(lambda count, x: (count + 1, plain(params, x[None])), 0, xs)


def in_branches(params, x):
    return lax.cond(x.sum() > 0, lambda x: plain(params, x), lambda x: plain(params, -x), x)


FUNCTIONS = [
    (plain, {"conv"}),
    (pool_first, {"conv"}),
    (inside_of_jit, {"conv"}),
    (checkpointed, {"conv"}),
    (in_a_loop, {"conv"}),
    (in_branches, {"conv"}),
]


@pytest.mark.parametrize(("function", "touched"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_convolutions_of_functions(function, touched):
    work = workload(function, IMAGES, params=WEIGHTS)
    result, effect = swapped(work)
    assert set(effect.touched) == touched
    assert set(kernels_in(result)) == {"cpu"}
    assert not kernels_in(work)
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def test_a_fixed_norm_is_folded_and_one_that_trains_is_not():
    model = Normed(nnx.Rngs(0))
    work = workload(model, IMAGES)
    result, effect = swapped(work)
    assert effect.touched == ("conv",)
    assert "bias or norm + ReLU + 2×2 max-pool" in effect.notes[0]
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)
    _, effect = swapped(workload(model, IMAGES, mode="training"))
    assert "directly follows" in reasons(effect)["conv"]


def test_linen():
    model = Linen()
    work = workload(model, IMAGES, params=model.init(KEYS[5], IMAGES))
    result, effect = swapped(work)
    assert effect.touched == ("Conv_0", "Conv_1")
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def used_twice(params, x):
    y = convolved(x, params["conv"]["kernel"])
    return jax.nn.relu(y) + y


def returned(params, x):
    y = convolved(x, params["conv"]["kernel"])
    return pooled(jax.nn.relu(y)), y


def leaky(params, x):
    return jax.nn.leaky_relu(convolved(x, params["conv"]["kernel"]))


def overlapping(params, x):
    return pooled(convolved(x, params["conv"]["kernel"]), 3, 2)


def channels_first(params, x):
    y = lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )
    return jax.nn.relu(y)


def precise(params, x):
    return pooled(convolved(x, params["conv"]["kernel"], precision="highest"))


def one_dimension(params, x):
    kernel = params["conv"]["kernel"][0]
    return jax.nn.relu(lax.conv_general_dilated(x[0], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (used_twice, "is used as well"),
        (returned, "is used as well"),
        (leaky, "no ReLU or max-pool"),
        (overlapping, "no ReLU or max-pool"),
        (channels_first, "its layout is not NHWC"),
        (one_dimension, "over 1 dimension"),
        (precise, "precision=HIGHEST was asked for"),
    ],
)
def test_reasons_why_a_convolution_stays(function, reason):
    x = jnp.moveaxis(IMAGES, -1, 1) if function is channels_first else IMAGES
    work = workload(function, x, params=WEIGHTS)
    result, effect = swapped(work)
    assert not effect.touched
    assert reason in next(iter(reasons(effect).values()))
    assert_same(outputs(result), outputs(work), 0)


@jax.custom_jvp
def passing(x):
    """A ReLU whose derivative is 1 throughout."""
    return jnp.maximum(x, 0)


passing.defjvp(lambda primals, tangents: (passing(*primals), tangents[0]))


def test_in_training_a_relu_is_what_has_its_derivative():
    def bare(params, x):
        return pooled(jnp.maximum(convolved(x, params["conv"]["kernel"]), 0))

    def surrogate(params, x):
        return pooled(passing(convolved(x, params["conv"]["kernel"])))

    def real(params, x):
        return pooled(jax.nn.relu(convolved(x, params["conv"]["kernel"])))

    for function, touched in ((bare, ()), (surrogate, ()), (real, ("conv",))):
        assert swapped(workload(function, IMAGES, params=WEIGHTS, mode="training"))[1].touched == touched
        assert swapped(workload(function, IMAGES, params=WEIGHTS))[1].touched == ("conv",)


class Recurrent(nnx.Module):
    def __init__(self, cell, **options):
        self.rnn = nnx.RNN(cell, rngs=nnx.Rngs(1), **options)

    def __call__(self, x, **options):
        return self.rnn(x, **options)


def cell(kind, **options):
    made = kind(6, 8, rngs=nnx.Rngs(0), **options)
    for _, variable in nnx.iter_graph(made):
        if isinstance(variable, nnx.Param) and variable.ndim == 1:  # flax starts with biases of zero
            variable[...] = jax.random.normal(KEYS[5], variable.shape) / 3
    return made


CELLS = [
    (nnx.OptimizedLSTMCell, {}, {}),
    (nnx.LSTMCell, {}, {"return_carry": True, "reverse": True}),
    (nnx.GRUCell, {"unroll": 2}, {"return_carry": True, "reverse": True, "keep_order": True, "seq_lengths": LENGTHS}),
    (nnx.SimpleCell, {"time_major": True}, {"return_carry": True, "initial_carry": jnp.ones((5, 8))}),
    (nnx.SimpleCell, {}, {"relu": True}),
]


@pytest.mark.parametrize(("kind", "options", "called_with"), CELLS)
def test_recurrent_layers_of_nnx(kind, options, called_with):
    called_with = dict(called_with)
    activation = {"activation_fn": nnx.relu} if called_with.pop("relu", False) else {}
    work = workload(Recurrent(cell(kind, **activation), **options), SEQUENCES, **called_with)
    result, effect = swapped(work)
    assert effect.touched == ("rnn.cell",)
    assert set(kernels_in(result)) == {"cpu"}
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def test_both_directions_of_lengths_where_the_states_are_not_read():
    model = nnx.Bidirectional(*(nnx.RNN(cell(nnx.LSTMCell), rngs=nnx.Rngs(1)) for _ in range(2)), rngs=nnx.Rngs(1))
    work = workload(model, SEQUENCES, seq_lengths=LENGTHS)
    result, effect = swapped(work)
    assert effect.touched == ("forward_rnn.cell", "backward_rnn.cell")
    assert_same(outputs(result), outputs(work))


def test_recurrent_layers_of_linen():
    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.RNN(linen.GRUCell(7))(linen.RNN(linen.OptimizedLSTMCell(8), reverse=True)(x))

    model = Stack()
    work = workload(model, SEQUENCES, params=model.init(KEYS[4], SEQUENCES))
    result, effect = swapped(work)
    assert len(effect.touched) == 2
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def own_lstm(params, x):
    """One matrix for input and state, a bias for remembering, the carry the other way round."""

    def step(carry, x):
        h, c = carry
        gates = jnp.concatenate([x, h], -1) @ params["w"] + params["b"]
        o, f = jax.nn.sigmoid(gates[:, :16][:, 8:]), jax.nn.sigmoid(gates[:, :8] + 1.0)
        c = jnp.tanh(gates[:, 24:]) * jax.nn.sigmoid(gates[:, 16:24]) + c * f
        return (jnp.tanh(c) * o, c), jnp.tanh(c) * o

    start = jnp.zeros((x.shape[1], 8))
    return lax.scan(step, (start, start), x)


def test_a_scan_that_somebody_wrote():
    params = {"w": jax.random.normal(KEYS[2], (14, 32)) / 4, "b": jax.random.normal(KEYS[3], (32,))}
    work = workload(own_lstm, SEQUENCES, params=params)
    result, effect = swapped(work)
    assert len(effect.touched) == 1
    assert "LSTM on 'cpu'" in effect.notes[0]
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def scanned(step):
    def function(params, x):
        return lax.scan(lambda h, x: step(params, h, x), jnp.zeros((x.shape[1], 6)), x)

    return function


STEPS = [
    (lambda w, h, x: (jnp.tanh(x @ w["a"] + h @ w["b"]) + h,) * 2, "something else"),
    (lambda w, h, x: (jnp.tanh(x @ w["a"] + h @ w["b"]), h), "something else than the hidden state"),
    (lambda w, h, x: (jnp.tanh(x @ w["a"]),) * 2, "do not all read"),
    (lambda w, h, x: (jnp.sin(x @ w["a"] + h @ w["b"]),) * 2, "uses sin"),
    (lambda w, h, x: (jnp.tanh(x @ w["a"] + (h * h) @ w["b"]),) * 2, "something else than an input with a weight"),
]


@pytest.mark.parametrize(("step", "reason"), STEPS)
def test_reasons_why_a_scan_stays(step, reason):
    params = {"a": jnp.eye(6), "b": jnp.eye(6) / 2}
    work = workload(scanned(step), SEQUENCES, params=params)
    result, effect = swapped(work)
    assert not effect.touched
    assert reason in next(iter(reasons(effect).values()))
    assert_same(outputs(result), outputs(work), 0)


def test_other_cells_and_states_stay():
    cases = {
        "something else than an LSTM": (Recurrent(cell(nnx.SimpleCell, residual=True)), {}),
        "its cell state of every step": (
            Recurrent(cell(nnx.LSTMCell)), {"return_carry": True, "seq_lengths": LENGTHS}
        ),
        "an LSTM, a GRU": (Recurrent(cell(nnx.LSTMCell, activation_fn=nnx.relu)), {}),
    }  # fmt: skip
    for reason, (model, options) in cases.items():
        work = workload(model, SEQUENCES, **options)
        result, effect = swapped(work)
        assert reason in reasons(effect)["rnn.cell"]
        assert_same(outputs(result), outputs(work), 0)


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


CHAINS = [
    ("bf16+fused_kernels", "cnn", 1, "bfloat16"),
    ("bf16+fused_kernels", "text_lstm", 2, "bfloat16"),
    ("half+fused_kernels", "lstm", 1, "bfloat16"),
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
    assert [choice.implementation for choice in choices] == ["cpu"] * count
    assert not dtype or "bf16" in text
    new, old = outputs(result), outputs(work)
    assert new.dtype == old.dtype
    assert float(jnp.linalg.norm(new - old) / jnp.linalg.norm(old)) < chain_of(chain).tolerance + TOLERANCE


def test_compiled_the_result_takes_the_models_place():
    model, inputs = reference.load("cnn", framework="jax")
    result = perfkit.optimize(model, "fused_kernels+compile", example_inputs=inputs)
    assert result.report.fidelity.ok
    assert isinstance(result.model, type(model))
    assert_same(result.model(*inputs), model(*inputs))
    for each in (model, result.model):
        each.conv1.kernel[...] = each.conv1.kernel[...] * 2
    assert_same(result.model(*inputs), model(*inputs))
