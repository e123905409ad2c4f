"""JAX models that read values in Python while they run: profiled operation by operation, and told where they read."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from profile_jax_models import squares, work_of

import perfkit
from perfkit import Quantity
from perfkit.profiling import ceilings, flops, jax_flops, jax_recorded
from perfkit.profiling._profile import Ceilings
from perfkit.profiling.jax_run import marking

ROWS, WIDTH = 64, 8


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch):
    """They take a second to measure and are tested by themselves."""
    found = Ceilings({"float32": Quantity.missing("GFLOP/s", "no")}, Quantity.missing("GB/s", "no"))
    monkeypatch.setattr(ceilings, "measured", lambda framework, device: found)


class Deciding(nnx.Module):
    """Divides by its largest output, if that is above 1; goes on until the outputs are small."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(WIDTH, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        y = self.second(nnx.relu(self.first(x)))
        if y.max() > 1:
            y = y / y.max()
        while y.max() > 0.3:
            y = y / 2
        return y


def inputs():
    return (10 * jax.random.normal(jax.random.key(1), (ROWS, WIDTH)),)


FORWARD = flops.linear(ROWS, WIDTH, 32) + flops.linear(ROWS, 32, 4)


def profiled(model, mode="inference", **options):
    arguments = {"example_inputs": inputs(), "budget_s": 0.05} | options
    if mode == "training":
        arguments |= {"loss": squares, "targets": jnp.float32(0), "optimizer": optax.adam(1e-3)}
    return perfkit.profile(model, mode=mode, **arguments)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_model_that_decides_in_python_is_profiled_by_operation(mode):
    profile = profiled(Deciding(rngs=nnx.Rngs(0)), mode)
    assert (profile.outcome, profile.explanation) == ("complete", "")
    (finding,) = [item for item in profile.findings if item.kind == "a value read back"]
    assert "test_jax_recorded.py:" in finding.told
    assert "`if y.max() > 1:`" in finding.told
    assert "jax.lax.cond" in finding.advice
    assert finding.predicted.value > 1
    assert not any(item.recipe for item in profile.findings)  # none could be applied
    whole = FORWARD + (flops.backward(FORWARD, flops.linear(ROWS, WIDTH, 32)) if mode == "training" else 0)
    assert profile.time.flops.value == whole
    assert sum(op.flops for op in profile.time.ops) == pytest.approx(whole)
    modules = {module.path: module for module in profile.time.modules}
    assert {"", "first", "second"} <= set(modules)
    assert modules["second"].calls == 1
    assert modules["first"].forward_ms > 0
    assert profile.memory.peak.value == pytest.approx(sum(profile.memory.by_category.values()))
    if mode == "training":
        assert modules["first"].backward_ms > 0
        assert {"forward", "backward", "optimizer"} <= set(profile.time.phases_ms)
        assert {"parameters", "gradients", "optimizer state"} <= set(profile.memory.by_category)


@pytest.mark.parametrize(
    "reading",
    [
        lambda y: y * float(y.max()),
        lambda y: y * y.max().item(),
        lambda y: y * int(y.max()),
        lambda y: y * np.asarray(y).max(),
        lambda y: y[y > 0],
        lambda y: y[: int(y.argmax())],
    ],
)
def test_every_way_to_read_a_value(reading):
    work = work_of(lambda params, x: reading(x @ params["w"]), inputs(), params={"w": jnp.ones((WIDTH, 4))})
    with marking(work) as run:
        assert "test_jax_recorded.py:" in run.read_at
        assert jax_flops.counted(run.jaxpr, trains=False).total == flops.linear(ROWS, WIDTH, 4)


def test_a_linen_module():
    class Module(linen.Module):
        @linen.compact
        def __call__(self, x):
            y = linen.Dense(4, name="fc")(x)
            return y if y.sum() > 1e9 else -y

    (x,) = inputs()
    profile = profiled(Module(), params=Module().init(jax.random.key(0), x))
    assert profile.outcome == "complete"
    assert profile.time.flops.value == flops.linear(ROWS, WIDTH, 4)
    assert "fc" in {module.path for module in profile.time.modules}


def test_what_is_recorded_is_what_would_be_traced():
    """Of a model that reads nothing, both ways see the same products in the same places, gradients included."""

    class Plain(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), strides=(2, 2), rngs=rngs)
            self.rnn = nnx.RNN(nnx.GRUCell(16, 6, rngs=rngs))

        def __call__(self, x):
            y = jax.nn.gelu(self.conv(x.reshape(-1, WIDTH, WIDTH, 1)))
            return self.rnn(jax.checkpoint(jnp.tanh)(y.reshape(y.shape[0], 4, 16)))

    for mode in ("inference", "training"):
        work = work_of(Plain(rngs=nnx.Rngs(0)), inputs(), mode)
        with marking(work, run=False) as run:
            traced = jax_flops.counted(run.jaxpr, work.trains, run.scopes)
            again = jax_recorded.recorded(run.jitted.__wrapped__, *run.arguments)
            found = jax_flops.counted(again, work.trains, run.scopes)
        assert found.by_place == traced.by_place


def test_an_error_of_the_models_own_still_ends_the_profile():
    def failing(params, x):
        raise TypeError("no such thing")

    profile = profiled(failing, params={"w": jnp.ones(3)})
    assert profile.outcome == "failed"
    assert "no such thing" in profile.explanation
