"""Micro-batches: the step of the whole batch, in both frameworks; what cannot be cut is refused."""

import dataclasses

import numpy as np
import pytest
from sample_models import training

import perfkit
from perfkit import Effect, InvalidInputError, Recipe, Stage, UnsupportedError, backends
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit.parallel.layout import layout
from perfkit.parallel.world import Alone


class Taught(Recipe):
    """A teacher whose outputs are the model's first ones, upside down."""

    stage = Stage.STRUCTURE

    def torch(self, work):
        from perfkit.backends.torch_training import teacher

        return self._with(work, teacher(work))

    def jax(self, work):
        from perfkit.backends.jax_training import teacher

        return self._with(work, teacher(work))

    def _with(self, work, original):
        training = dataclasses.replace(work.training, teacher=lambda *args, **kwargs: -original(*args, **kwargs))
        return work.replace(training=training), Effect(("model",))


def dense(framework, loss=None, time_major=False):
    """A small regression task without batch norm, whose inputs hold a mask for all rows."""
    rng = np.random.default_rng(0)
    x, w, y = rng.normal(size=(6, 12, 5) if time_major else (12, 5)), rng.normal(size=(5, 3)), rng.normal(size=(12, 3))
    x, w, y, mask = (values.astype("float32") for values in (x, w, y, np.array([1.0, 0.0, 1.0])))
    if framework == "torch":
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.tensor(w))

            def forward(self, batch):
                out = torch.tanh(batch["data"] @ self.w)
                return (out.sum(0) if time_major else out) * batch["mask"]

        model = Net()
        return {
            "model": model,
            "example_inputs": ({"data": torch.tensor(x), "mask": torch.tensor(mask)},),
            "targets": torch.tensor(y),
            "loss": loss or nn.functional.mse_loss,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        }
    import jax.numpy as jnp
    import optax

    def function(params, batch):
        out = jnp.tanh(batch["data"] @ params["w"])
        return (out.sum(0) if time_major else out) * batch["mask"]

    return {
        "model": function,
        "params": {"w": jnp.array(w)},
        "example_inputs": ({"data": jnp.array(x), "mask": jnp.array(mask)},),
        "targets": jnp.array(y),
        "loss": loss or (lambda out, y: ((out - y) ** 2).mean()),
        "optimizer": optax.sgd(0.1),
    }


def trained(task, recipe, steps=3, batch=None):
    """Losses of some steps, the weights after them, and what the first recipe did; nothing is timed."""
    given = {"params": None} | task
    backend = backends.of(given["model"], given["example_inputs"])
    work = backend.bind(mode="training", seed=0, **given)
    applied = apply(chain_of(recipe), work)
    result = backend.finish(applied.works[-1] if applied.works else work)
    losses = [float(result.train_step(batch or (task["example_inputs"], task["targets"]))) for _ in range(steps)]
    weights = result.params()["w"] if result.params else next(iter(result.model.parameters())).detach()
    return np.array(losses), np.asarray(weights), [step.effect for step in applied.steps]


@pytest.mark.parametrize("time_major", [False, True])
def test_a_step_is_that_of_the_whole_batch(framework, time_major):
    """Float32 sums over 12 rows in another order: within 12 roundings."""
    task = dense(framework, time_major=time_major)
    losses, weights, _ = trained(task, [])
    cut, cut_weights, (effect,) = trained(task, f"accumulate(4, batch_dim={int(time_major)})")
    np.testing.assert_allclose(cut, losses, rtol=12 * 2**-24)
    np.testing.assert_allclose(cut_weights, weights, rtol=12 * 2**-23, atol=1e-7)
    assert "4 micro-batches of 3 rows" in effect.notes[0]


def test_together_with_loss_scaling(framework):
    losses, weights, _ = trained(dense(framework), [])
    cut, cut_weights, _ = trained(dense(framework), "accumulate(2)+fp16")
    np.testing.assert_allclose(cut, losses, rtol=2**-8)
    np.testing.assert_allclose(cut_weights, weights, rtol=2**-8, atol=2**-8)


def test_a_teacher_teaches_each_micro_batch(framework):
    """The distance is in units of the variance within each micro-batch, so the losses are near each other only."""
    task = dense(framework)
    whole, parts = (trained(task, [Taught(), *recipe])[0] for recipe in ((), ("accumulate(2)",)))
    assert whole[0] != pytest.approx(trained(task, [])[0][0]), "the teacher is heard"
    np.testing.assert_allclose(parts, whole, rtol=0.2)


@pytest.mark.usefixtures("hasty")
def test_what_looks_at_the_whole_batch_is_named(framework):
    task = training(framework) | {"mode": "training", "recipe": "accumulate(4)"}
    effect = perfkit.plan(**task).steps[0].effect
    assert "statistics" in " ".join(effect.notes)
    with pytest.raises(perfkit.FidelityError, match=r"\+ 0 \(.*statistics.*\)\. The report is"):
        perfkit.optimize(**task, tolerance=0, budget_s=0.01)


def paired(framework):
    """Each row of the batch is compared with another one."""
    task = dense(framework)
    inner = task["model"]
    if framework == "jax":
        return task | {"model": lambda params, batch: inner(params, batch) - inner(params, batch)[::-1]}
    inner.register_forward_hook(lambda _, __, out: out - out.flip(0))
    return task


def test_rows_that_are_computed_together_are_told(framework):
    effect = perfkit.plan(**paired(framework), recipe="accumulate(2)", mode="training").steps[0].effect
    assert "the model computes rows together" in effect.notes[1]
    assert effect.apart == effect.notes[1:]


def test_a_model_that_does_not_run_on_fewer_rows_is_refused(framework):
    task = dense(framework)
    inner = task["model"]
    if framework == "torch":

        def whole(_, inputs):
            inputs[0]["data"].reshape(12, 5)  # raises on fewer rows

        inner.register_forward_pre_hook(whole)
    else:
        task["model"] = lambda params, batch: inner(params, batch | {"data": batch["data"].reshape(12, 5)})
    plan = perfkit.plan(**task, recipe="accumulate(2)", mode="training")
    assert "does not run on a micro-batch, the first 6 rows of the example batch" in plan.steps[0].refusal


def test_numbers_that_micro_batches_draw_alike_are_named():
    jax = pytest.importorskip("jax")
    task = dense("jax")
    (batch,), inner = task.pop("example_inputs"), task["model"]
    task |= {"model": lambda params, key, batch: inner(params, batch) * jax.random.bernoulli(key, 0.5, (1, 3))}
    plan = perfkit.plan(**task, example_inputs=(jax.random.key(0), batch), recipe="accumulate(4)", mode="training")
    assert "the same in each micro-batch" in " ".join(plan.steps[0].effect.notes)


def test_a_batch_that_cannot_be_cut_is_refused(framework):
    plan = perfkit.plan(**dense(framework), recipe="accumulate(5)", mode="training")
    assert "12 rows (dimension 0) cannot be cut into 5 micro-batches" in plan.steps[0].refusal


def test_the_last_batch_of_an_epoch_is_refused(framework):
    task = dense(framework)
    (inputs,), targets = task["example_inputs"], task["targets"]
    shorter = ({"data": inputs["data"][:10], "mask": inputs["mask"]},), targets[:10]
    with pytest.raises(InvalidInputError, match="10 rows"):
        trained(task, "accumulate(4)", batch=shorter)


def test_a_loss_that_is_no_mean_is_refused(framework):
    task = dense(framework, loss=lambda out, y: ((out - y) ** 2).sum())
    with pytest.raises(UnsupportedError, match="needs a loss that is a mean over the batch"):
        perfkit.optimize(**task, recipe="accumulate(4)", mode="training")


@pytest.mark.parametrize("key", ["typed", "raw"])
def test_a_key_before_the_data_is_no_batch(key):
    """As haiku's functions take it, or, among inputs by name, wherever its name comes in the alphabet."""
    jax = pytest.importorskip("jax")
    task = dense("jax")
    given, inner = (jax.random.key(0) if key == "typed" else jax.random.PRNGKey(0)), task["model"]
    (batch,) = task.pop("example_inputs")
    task |= {"model": lambda params, key, batch: inner(params, batch)}
    losses = [
        trained(task | {"example_inputs": inputs}, "accumulate(4)")[0]
        for inputs in ((given, batch), {"key": given, "batch": batch})
    ]
    whole = trained(task | {"example_inputs": (given, batch)}, [])[0]
    for found in losses:
        np.testing.assert_allclose(found, whole, rtol=1e-5)


def test_the_wrong_dimension_is_refused(framework):
    """Six time steps could be cut into two, and the loss would be that of half the sequence."""
    with pytest.raises(UnsupportedError, match="set batch_dim="):
        perfkit.optimize(**dense(framework, time_major=True), recipe="accumulate(2)", mode="training")


@pytest.mark.parametrize("recipe", ["accumulate(2)", "data_parallel", "pipeline_parallel", "max_batch_size"])
def test_time_is_not_cut_for_the_batch(recipe):
    """Outputs and targets are of every step, so that time could be cut without anything failing."""
    jnp = pytest.importorskip("jax.numpy")
    optax = pytest.importorskip("optax")

    def function(params, x):
        h, outputs = jnp.zeros((x.shape[1], 3)), []
        for step in x:
            h = jnp.tanh(step @ params["w"] + h)
            outputs.append(h)
        return jnp.stack(outputs)

    rng = np.random.default_rng(0)
    task = {
        "params": {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)},
        "mode": "training",
        "example_inputs": (jnp.asarray(rng.normal(size=(8, 4, 5)), jnp.float32),),
        "targets": jnp.zeros((8, 4, 3)),
        "loss": lambda out, y: ((out - y) ** 2).mean(),
        "optimizer": optax.sgd(0.1),
    }
    told = "4 rows along dimension 1 of the inputs, and not dimension 0: set batch_dim=1"
    if recipe == "max_batch_size":
        with pytest.raises(InvalidInputError, match=told):
            perfkit.max_batch_size(function, **task, limit_bytes=1e9)
    else:
        work = backends.of(function, task["example_inputs"]).bind(function, seed=0, **task)
        chain, two = chain_of(recipe), Alone(2)
        assert told in chain.recipes[0].refusal(work.replace(world=two, layout=layout(chain, two)))


def test_packed_sequences_are_refused():
    torch = pytest.importorskip("torch")
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 4, 3), torch.tensor([5, 4, 4, 2]))
    model = torch.nn.LSTM(3, 2)
    task = {"targets": torch.zeros(4, 2), "loss": lambda out, y: (out[1][0][-1] - y).square().mean()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="packed sequence"):
        perfkit.optimize(model, "accumulate(3)", example_inputs=(packed,), mode="training", optimizer=optimizer, **task)


@pytest.mark.parametrize("number", [1, 0, 2.5])
def test_fewer_than_two_is_no_recipe(number):
    with pytest.raises(InvalidInputError, match="2 or more"):
        chain_of(f"accumulate({number})")


def test_a_loss_that_is_in_the_outputs_needs_no_targets():
    """Models that are given their labels, and return the loss."""
    pytest.importorskip("torch")
    import torch

    class Taught(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 2)

        def forward(self, x, y):
            return {"loss": (self.fc(x) - y).square().mean()}

    model, x, y = Taught(), torch.randn(8, 4), torch.randn(8, 2)
    task = {"model": model, "example_inputs": (x, y), "targets": (), "loss": lambda outputs, _: outputs["loss"]}
    task["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    whole, *_ = trained(task, [])
    losses, _, (effect,) = trained(task, "accumulate(4)")
    np.testing.assert_allclose(losses, whole, rtol=16 * 2**-24)  # sums of 16 in another order
    assert "told by the loss curves alone" in " ".join(effect.notes)
