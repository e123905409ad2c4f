"""A training step is the framework's own: nothing but what a recipe asks for stands between gradients and optimizer."""

import warnings

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import perfkit

pytestmark = pytest.mark.usefixtures("hasty")


def _linear(params, x):
    return x @ params["w"]


def _squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def test_a_step_of_an_optimizer_that_feels_the_size_of_gradients():
    """Adam hides a factor on all gradients; plain descent does not."""
    random = np.random.default_rng(0)
    x, y, w = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((16, 4), (16, 2), (4, 2)))
    result = perfkit.optimize(
        _linear,
        "compile",
        params={"w": w},
        mode="training",
        example_inputs=(x,),
        targets=y,
        loss=_squared,
        optimizer=optax.sgd(0.1),
    )
    expected = w
    for _ in range(5):
        loss = result.train_step((x, y))
        assert loss == pytest.approx(float(_squared(x @ expected, y)), rel=1e-5)
        expected -= 0.1 * jax.grad(lambda w: _squared(x @ w, y))(expected)


def _given(**changes):
    random = np.random.default_rng(0)
    x, y, w = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((16, 4), (16, 2), (4, 2)))
    given = {"model": _linear, "params": {"w": w}, "example_inputs": (x,), "targets": y, "loss": _squared}
    return {**given, "optimizer": optax.sgd(0.1), "mode": "training"} | changes


@pytest.mark.filterwarnings("ignore:accumulate saves no memory:perfkit.PerfkitWarning")
@pytest.mark.parametrize("recipe", ["compile", "accumulate", "fp16", "prune"])
def test_an_optimizer_that_asks_for_the_loss(recipe):
    """`reduce_on_plateau` takes `value=`, and remembers the lowest one."""
    given = _given(optimizer=optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=2)))
    result = perfkit.optimize(**given, recipe=recipe)
    batch = given["example_inputs"], given["targets"]
    losses = [float(result.train_step(batch)) for _ in range(100)]
    state = next(s for s in jax.tree.leaves(result.finished.trainer.state[2], is_leaf=_is_plateau) if _is_plateau(s))
    assert float(state.best_value) == pytest.approx(min(losses), rel=2e-4)  # its own rtol is 1e-4


def _is_plateau(node):
    return isinstance(node, optax.contrib.ReduceLROnPlateauState)


def test_an_optimizer_that_takes_something_else_than_the_loss():
    """`sam` may be given a `grad_fn=`, and raises where it is given `value=`."""
    sharp = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.01)), sync_period=2)
    given = _given(optimizer=sharp)
    result = perfkit.optimize(**given, recipe="compile")
    batch = given["example_inputs"], given["targets"]
    losses = [float(result.train_step(batch)) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_multi_steps_is_taken_as_it_is():
    every = optax.MultiSteps(optax.sgd(0.1), 2)
    given = _given(optimizer=every)
    result = perfkit.optimize(**given, recipe="compile")
    before = np.asarray(result.params["w"])
    batch = given["example_inputs"], given["targets"]
    result.train_step(batch)
    np.testing.assert_array_equal(result.params["w"], before)
    with pytest.raises(perfkit.InvalidInputError, match=r"expected \(inputs, targets\)"):
        result.train_step(given["targets"])
    result.train_step(batch)
    assert not np.array_equal(result.params["w"], before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda: {"optimizer": optax.masked(optax.adam(1e-3), {"other": True})}, "takes no step on these parameters"),
        (lambda: {"optimizer": optax.lbfgs()}, "value_fn"),
        (lambda: {"params": {}, "model": lambda params, x: x[:, :2]}, "nothing to train"),
        (lambda: {"optimizer": optax.adam}, "expected an optax transformation"),
        (lambda: {"params": {"w": jnp.ones((4, 2)), "rows": jnp.int32(3)}}, "'rows' is int32"),
        (lambda: {"example_inputs": (jnp.full((16, 4), jnp.nan),)}, "nothing but NaN"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_done(changes, said):
    with pytest.raises(perfkit.InvalidInputError) as raised:
        perfkit.optimize(**_given(**changes()), recipe="compile")
    assert said in str(raised.value)


def test_an_optimizer_that_searches_along_a_line_is_told_to_do_without():
    told = "training", {"w": jnp.ones((4, 2))}, (jnp.ones((6, 4)),), jnp.zeros((6, 2)), _squared
    task = dict(zip(("mode", "params", "example_inputs", "targets", "loss"), told, strict=True))
    with pytest.raises(perfkit.InvalidInputError, match="linesearch=None"):
        perfkit.plan(_linear, "donate", optimizer=optax.lbfgs(), **task)
    assert perfkit.plan(_linear, "donate", optimizer=optax.lbfgs(0.1, linesearch=None), **task).ok


def test_complex_parameters_that_would_go_uphill_are_told():
    """JAX's gradient of |w|² is 2·conj(w): against it, the imaginary part grows."""
    conjugated = optax.stateless(lambda gradients, _: jax.tree.map(jnp.conj, gradients))
    task = {
        "model": lambda params, x: abs(params["w"] * x),
        "params": {"w": jnp.array([0.5 + 1j])},
        "example_inputs": (jnp.ones((4, 1)),),
        "targets": jnp.zeros((4, 1)),
        "loss": lambda y, t: ((y - t) ** 2).mean(),
        "mode": "training",
    }
    with pytest.warns(perfkit.PerfkitWarning, match="complex parameter.* w uphill"):
        perfkit.apply(recipe="compile", optimizer=optax.adam(0.1), **task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = perfkit.apply(recipe="compile", optimizer=optax.chain(conjugated, optax.adam(0.1)), **task)
    losses = [float(result.train_step((task["example_inputs"], task["targets"]))) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
