"""Rematerialization in JAX: the same losses and gradients, in less memory by XLA's count."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from perfkit import backends
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit.memory import jax_checkpoint
from perfkit.memory.jax_segments import Cut, in_segments


class Images(nnx.Module):
    """Batch norms, dropout and a jitted part."""

    def __init__(self, rngs):
        self.convs = nnx.List([nnx.Conv(4 if at else 1, 4, (3, 3), rngs=rngs) for at in range(3)])
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(3)])
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.fc = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.fc(self.drop(x).mean((1, 2)))


def loop(params, x, reverse=False):
    """A recurrent layer over 23 steps, which pieces of one length do not fill."""

    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"])
        return h, h * 2

    h, ys = jax.lax.scan(step, jnp.zeros((x.shape[1], 6)), x, reverse=reverse)
    return h @ params["v"] + ys.mean(0) @ params["v"]


keys = jax.random.split(jax.random.key(0), 5)
SHAPES = {"w": (5, 6), "u": (6, 6), "v": (6, 2)}
WEIGHTS = {name: jax.random.normal(key, shape) / 3 for (name, shape), key in zip(SHAPES.items(), keys, strict=False)}
SEQUENCES = jax.random.normal(keys[3], (23, 4, 5))
IMAGES = jax.random.normal(keys[4], (4, 16, 16, 1))


def bound(model, x, params=None):
    backend = backends.of(model, (x,))
    return backend.bind(
        model,
        params,
        (x,),
        mode="training",
        seed=0,
        loss=lambda out, y: ((out - y) ** 2).mean(),
        targets=jnp.ones((4, 2)),
        optimizer=optax.sgd(0.1),
    )


@pytest.mark.parametrize("cut", [Cut(keeps_products=True), Cut(7)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_in_pieces_has_the_same_gradient(cut, reverse):
    """To rounding over 23 steps: gradients of the weights are added up piece by piece."""

    def plain(params, x):
        return jnp.sum(loop(params, x, reverse) ** 2)

    expected = jax.value_and_grad(plain, (0, 1))(WEIGHTS, SEQUENCES)
    found = jax.jit(jax.value_and_grad(in_segments(plain, cut), (0, 1)))(WEIGHTS, SEQUENCES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=23 * 2**-21, atol=1e-5), found, expected)


def trained(work):
    finished = work.backend.finish(work)
    losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(3)]
    return losses, list(map(np.asarray, jax.tree.leaves(finished.trainer.state[0])))


@pytest.mark.parametrize("cut", [Cut(keeps_products=True), Cut(3), Cut(3, opaque=True)], ids=str)
def test_complex_products_have_the_same_gradient(cut):
    def spectral(w, x):
        for _ in range(3):
            x = jnp.tanh(jnp.fft.ifft(jnp.fft.fft(x) @ w).real)
        return x.sum()

    w = jax.lax.complex(WEIGHTS["u"], WEIGHTS["u"].T)
    x = SEQUENCES[:, 0] @ WEIGHTS["w"]
    expected, found = (jax.jit(jax.grad(each))(w, x) for each in (spectral, in_segments(spectral, cut)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_statistics_and_dropout_trains_as_before():
    """XLA fuses the pieces in other ways than the whole, so to rounding: sums over 1024 numbers a layer."""
    work = bound(Images(nnx.Rngs(0)), IMAGES)
    before, after = trained(work), trained(jax_checkpoint.cut_into(work, Cut(2, opaque=True)))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), after[1], before[1])


def test_a_long_loop_needs_less():
    work = bound(loop, jnp.tile(SEQUENCES, (8, 1, 1)), WEIGHTS)
    applied = apply(chain_of("checkpoint(0.6)"), work)
    assert applied.steps[0].effect.touched == ("loop",)
    before, after = trained(work), trained(applied.works[-1])
    np.testing.assert_allclose(after[0], before[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("budget", "needs", "told"),
    [
        (0.5, {"1 segments": 100, "all but": 45}, "all but the results"),
        (0.5, {"1 segments": 100, "all but": 70, "4 segments": 40}, "4 segments"),
        (0.1, {"1 segments": 100, "all but": 70, "4 segments": 40, "8 segments": 30, "16 segments": 35}, "8 segments"),
        (0.5, dict.fromkeys(("1 segments", "all but", "4 segments", "8 segments", "16 segments"), 100), "no way"),
    ],
)
def test_the_first_that_keeps_the_budget_is_taken(monkeypatch, budget, needs, told):
    def needed(work):
        cut = work.model.transforms[0].keywords["cut"] if work.model.transforms else Cut()
        return needs[next(name for name in needs if cut.told(loops=True).startswith(name))] * 1e6

    monkeypatch.setattr(jax_checkpoint, "_needed", needed)
    (step,) = apply(chain_of(f"checkpoint({budget})"), bound(loop, SEQUENCES, WEIGHTS)).steps
    assert step.effect.notes[0].startswith(told)
    assert ("cannot be kept" in " ".join(step.effect.notes)) == (budget == 0.1)


def plain(params, x):
    return jnp.tanh(x.mean(0) @ params["w"]) @ params["v"]


def short(params, x):
    return loop(params, x[:7])


@pytest.mark.parametrize(("function", "loops"), [(loop, True), (short, False), (plain, False)])
def test_pieces_of_loops_are_told_of_models_that_have_them(monkeypatch, function, loops):
    needed = iter((100e6, 70e6, 40e6))
    monkeypatch.setattr(jax_checkpoint, "_needed", lambda work: next(needed))
    (step,) = apply(chain_of("checkpoint(0.5)"), bound(function, SEQUENCES, WEIGHTS)).steps
    told = "4 segments, and loops in 4 pieces of time, each" if loops else "4 segments, each"
    assert step.effect.notes[0].startswith(told)
