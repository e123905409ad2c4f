"""optax's moments in few bits: updates are torchao's, losses stay near, and what is not known is refused."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import optax
from jax_workers import result, start
from shared_runs import once

from perfkit import UnsupportedError, backends
from perfkit._chain import chain_of, check
from perfkit._variant import apply
from perfkit.memory.jax_low_bit import wrapped
from perfkit.memory.jax_stretches import is_held
from perfkit.parallel.checkpoint import Checkpoints
from perfkit.parallel.layout import Layout

WEIGHTS = {"first": (64, 128), "bias": (128,), "second": (128, 32)}


def bound(optimizer):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for name, shape in WEIGHTS.items()}
    x, y = (jnp.asarray(rng.normal(size=(16, width)), jnp.float32) for width in (64, 32))

    def model(params, x):
        return jnp.tanh(x @ params["first"] + params["bias"]) @ params["second"]

    return backends.of(model, (x,)).bind(
        model,
        params,
        (x,),
        mode="training",
        seed=0,
        loss=lambda out, y: ((out - y) ** 2).mean(),
        targets=y,
        optimizer=optimizer,
    )


def steps(work, count=8):
    finished = work.backend.finish(work)
    losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(count)]
    return losses, work.backend.optimizer_state(work, finished).value, finished


def low(optimizer, recipe="low_bit_optimizer"):
    applied = apply(chain_of(recipe), bound(optimizer))
    return applied.works[-1], applied.steps[0].effect


def test_moments_in_float64_stay():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params, x, y = {"w": rng.normal(size=(64, 128))}, rng.normal(size=(16, 64)), rng.normal(size=(16, 128))
        settings = {"mode": "training", "seed": 0, "loss": lambda out, y: ((out - y) ** 2).mean(), "targets": y}
        model = lambda params, x: x @ params["w"]  # noqa: E731 - as a user writes it
        work = backends.of(model, (x,)).bind(model, params, (x,), optimizer=optax.adam(1e-3), **settings)
        assert not apply(chain_of("low_bit_optimizer"), work).steps[0].effect.touched


@pytest.mark.parametrize("bits", [8, 4])
def test_updates_are_torchaos(bits):
    """On the same gradients, to what a number that lies between two codes and is rounded to the other one makes.

    Gradients lie within two decades, so that no second moment is too small for a code.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchao")
    import torchao.optim

    rng, rate = np.random.default_rng(2), 1e-2
    start = rng.normal(size=(64, 160)).astype(np.float32)
    signs = [rng.choice([-1, 1], start.shape) for _ in range(9)]
    gradients = [(sign * 10 ** rng.uniform(-2, 0, start.shape)).astype(np.float32) for sign in signs]
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = {8: torchao.optim.AdamW8bit, 4: torchao.optim.AdamW4bit}[bits]([weight], lr=rate, weight_decay=0.1)
    plain = optax.adamw(rate, weight_decay=0.1)
    sides = {name: [jnp.asarray(start)] for name in ("plain", "few")}
    makers = {"plain": plain, "few": wrapped(plain, bits, 1000)}
    states = {name: makers[name].init(sides[name][0]) for name in sides}
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        with torch.compiler.set_stance("force_eager"):
            theirs.step()
        for name, side in sides.items():
            updates, states[name] = jax.jit(makers[name].update)(gradient, states[name], side[0])
            side[0] = side[0] + updates

    def apart(one, other):
        return float(np.abs(np.asarray(one) - np.asarray(other)).mean() / np.abs(np.asarray(one) - start).mean())

    assert apart(sides["few"][0], weight.detach()) < 1e-4
    assert apart(sides["few"][0], sides["plain"][0]) > 1e-3, "nothing was rounded"


@pytest.mark.parametrize(("bits", "share", "apart"), [(8, 0.28, 1e-2), (4, 0.16, 0.2)])
def test_states_are_small_and_losses_near(bits, share, apart):
    """Of 12416 numbers 12288 are held in `bits`, with a scale of 32 bits a block; the others in float32.

    Losses are compared in units of the first; four bits are coarse, and that they round as torchao's is tested above.
    """
    before, held_before, _ = steps(bound(optax.adamw(1e-3)), 30)
    work, effect = low(optax.adamw(1e-3), f"low_bit_optimizer({bits})")
    after, held_after, _ = steps(work, 30)
    assert effect.touched == ("first", "second")
    assert "mu, nu of 2 of 3 parameters, 99.0% of the numbers" in effect.notes
    assert held_after < share * held_before
    assert after == pytest.approx(before, abs=apart * before[0])
    assert after != before, "nothing was rounded"
    assert after[-1] < before[0] / 2, "and it learns"


@pytest.mark.parametrize(
    ("optimizer", "fields"),
    [
        (optax.adam(1e-2), "mu, nu"),
        (optax.nadamw(1e-2), "mu, nu"),
        (optax.amsgrad(1e-2), "mu, nu, nu_max"),
        (optax.lion(1e-3), "mu"),
        (optax.sgd(1e-1, momentum=0.9), "trace"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 50))), "mu, nu"),
        (optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), "mu, nu"),
        (optax.apply_if_finite(optax.adam(1e-2), 3), "mu, nu"),
        (optax.adam(1e-2, mu_dtype=jnp.bfloat16), "mu, nu"),
        (optax.masked(optax.adam(1e-2), {"first": True, "bias": False, "second": True}), "mu, nu"),
        (
            optax.partition(
                {"a": optax.adam(1e-2), "s": optax.sgd(1e-2, 0.9)}, {"first": "a", "bias": "s", "second": "s"}
            ),
            "mu, nu, trace",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_known_states_are_found_wherever_they_are(optimizer, fields):
    before, held_before, _ = steps(bound(optimizer))
    work, effect = low(optimizer)
    after, held_after, _ = steps(work)
    assert effect.touched == ("first", "second")
    assert effect.notes[0].startswith(f"{fields} of 2 of")
    assert held_after < 0.4 * held_before
    assert after == pytest.approx(before, rel=1e-2)


def test_other_numbers_in_the_state_are_told_of():
    _, effect = low(optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation())
    assert effect.notes[1].startswith("12419 other numbers")  # the gradients so far, and three counts


@pytest.mark.parametrize(
    ("recipe", "optimizer", "why"),
    [
        ("low_bit_optimizer", optax.sgd(1e-2), "the optimizer's state is made of EmptyState"),
        ("low_bit_optimizer", optax.adafactor(1e-2), "FactoredState"),
        ("low_bit_optimizer('fp8')", optax.adam(1e-2), "float8 moments are torchao's"),
    ],
)
def test_what_is_not_known_is_refused(recipe, optimizer, why):
    with pytest.raises(UnsupportedError, match=why):
        check(chain_of(recipe), bound(optimizer))


def test_a_pipeline_is_refused():
    (recipe,) = chain_of("low_bit_optimizer")
    assert "reach across" in recipe.refusal(bound(optax.adam(1e-2)).replace(layout=Layout(("pipeline",), (2,))))


def test_small_models_are_left_alone():
    work = bound(optax.adam(1e-2))
    work = work.replace(model=work.model.with_state({"first": jnp.ones((8, 8))}, ()))
    (recipe,) = chain_of("low_bit_optimizer")
    assert recipe.jax(work)[0] is work


@pytest.mark.parametrize("chain", ["low_bit_optimizer+donate", "low_bit_optimizer+compile", "low_bit_optimizer+fp16"])
def test_in_a_chain(chain):
    expected = steps(low(optax.adam(1e-2))[0])[0]
    work, _ = low(optax.adam(1e-2), chain)
    losses, _, finished = steps(work)
    assert losses == pytest.approx(expected, rel=5e-3 if "fp16" in chain else 1e-4)
    assert any(map(is_held, jax.tree.leaves(finished.trainer.state[2], is_leaf=is_held)))


def test_a_second_moment_that_is_too_small_for_a_code_is_not_taken_for_none():
    """Beside a large gradient in its block, and then without one: a first moment over 0 would be any step at all."""
    gradient = np.full(4096, 1e-2, np.float32)
    gradient[::256] = 1e3
    optimizer, params = wrapped(optax.adam(1e-3), 8, 2**16), jnp.zeros(4096)
    state, largest = optimizer.init(params), []
    for given in (gradient, 0 * gradient, 0 * gradient):
        updates, state = optimizer.update(jnp.asarray(given), state, params)
        largest.append(float(jnp.abs(updates).max()))
    assert max(largest) <= 1.01e-3, "the step of the first gradient is the largest"


def test_moments_are_never_there_in_full_but_within_a_step():
    """XLA's count of what making the state takes: no temporaries of the moments' size."""
    params = {"w": jnp.ones((512, 512))}
    compiled = jax.jit(wrapped(optax.adam(1e-2), 8, 2**16).init).lower(params).compile()
    analysis = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes + analysis.output_size_in_bytes < params["w"].nbytes


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    work, _ = low(optax.adamw(1e-2))
    _, _, finished = steps(work)
    there = Checkpoints(tmp_path / "c", "jax", {})
    there.save(finished, 8)
    batch = work.inputs, work.training.targets
    straight = [float(finished.train_step(batch)) for _ in range(4)]
    again = work.backend.finish(work)
    assert there.restore(again) == 8
    assert [float(again.train_step(batch)) for _ in range(4)] == straight


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    run, folder = "jax_low_bit_on_four_devices", tmp_path_factory.mktemp("low_bit")
    return once(run, lambda: result(start(f"{run}.py", 4, CHECKPOINTS=str(folder))))


@pytest.mark.parametrize("recipe", ["data_parallel", "data_parallel(shard=True)", "data_parallel(engine='pmap')"])
def test_four_devices_do_what_one_does(four, recipe):
    """Gradients that are added up in another order move some moments to the next code: a hundredth of themselves."""
    assert four[recipe]["losses"] == pytest.approx(four["one"]["losses"], rel=1e-3)
    assert four[recipe]["held"]["codes"] > 0


def test_the_state_is_shared_out_as_the_parameters_are(four):
    whole, shared = (four[recipe]["held"] for recipe in ("data_parallel", "data_parallel(shard=True)"))
    assert shared["codes"] == whole["codes"] / 4
    assert shared["scales"] == whole["scales"] / 4


def test_moments_are_averaged_and_not_their_codes(four):
    assert four["averaged"]["off"] <= four["averaged"]["step"]


def test_another_number_of_devices_goes_on_from_a_checkpoint(four):
    assert four["resumed"]["one"] == pytest.approx(four["resumed"]["four"], rel=1e-3)
