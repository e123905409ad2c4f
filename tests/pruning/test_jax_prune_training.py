"""Pruning JAX models in training: smaller from the start, or masked step by step; sparse weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
from flax import nnx
from jax_compression_models import Prune, applied, filled, flat, made, outputs, rows, training

import perfkit
from perfkit import InvalidInputError
from perfkit._workload import Training
from perfkit.backends.jax_backend import BACKEND
from perfkit.pruning.jax_masks import Group, masking

pytestmark = pytest.mark.usefixtures("hasty")


def trained_work(name, classes, **options):
    """A training workload and the recipe applied to it, without the pipeline's measuring."""
    given = training(name, classes)
    fields = ("loss", "targets", "optimizer")
    work = BACKEND.bind(given["model"], None, given["example_inputs"], mode="training", seed=0,
                        **{name: given[name] for name in fields})  # fmt: skip
    after, effect = Prune(**options).jax(work)
    return given, after, effect, BACKEND.finish(after)


def steps(finished, given, count):
    return [float(finished.train_step((given["example_inputs"], given["targets"]))) for _ in range(count)]


def zeros(array):
    return int((np.asarray(array) == 0).sum())


@pytest.mark.parametrize("name", ["conv", "fused_lstm"])
def test_at_once_the_small_model_trains(name):
    given, _, effect, finished = trained_work(name, 3)
    losses = steps(finished, given, 60)
    assert losses[-1] < losses[0] / 2
    assert not effect.simulated
    assert "optimizer's state" in effect.notes[-1]
    smaller = flat(finished.model)
    assert all(smaller[path].size <= array.size for path, array in flat(given["model"]).items())
    assert sum(a.size for a in smaller.values()) < 0.7 * sum(a.size for a in flat(given["model"]).values())


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "activation"])
@pytest.mark.parametrize("name", ["conv", "fused_lstm"])
def test_units_masked_while_training_are_removed_afterwards(name, criterion):
    given, _, effect, finished = trained_work(name, 3, schedule=12, criterion=criterion)
    assert effect.simulated
    kernel = {"conv": "conv.kernel", "fused_lstm": "fc.kernel"}[name]
    axes = {"conv": (0, 1, 2), "fused_lstm": (1,)}[name]
    gone = []
    for _ in range(20):
        steps(finished, given, 1)
        gone.append(int((flat(finished.model)[kernel] == 0).all(axes).sum()))
    final = {"conv": 6, "fused_lstm": 5}[name]
    assert gone == sorted(gone), "nothing returns"
    assert 0 < gone[3] < final, "they go little by little"
    assert gone[11] == gone[-1] == final
    model = finished.model
    model.eval()
    x = rows(4, *given["example_inputs"][0].shape[1:])
    result = applied(Prune(), model, x)
    assert result.parameters[1] < 0.7 * result.parameters[0]
    assert [note.split(" after")[0] for note in effect.notes[:-1]] == list(result.effect.notes)
    np.testing.assert_allclose(outputs(result.model, x), outputs(model, x), rtol=1e-4, atol=1e-5)


def test_taylor_keeps_what_the_loss_needs():
    """Large weights on an input that is always zero have no gradient."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.out = nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.fc(x))

    model = filled(lambda: Net(nnx.Rngs(0)))
    model.fc.kernel[...] = jnp.array([[0.0, 0.0, 0.5, 0.5], [9.0, 9.0, 0.1, 0.1]])
    x = jnp.stack([jnp.arange(1.0, 7.0), jnp.zeros(6)], 1)

    def left(criterion):
        training = Training(lambda y, t: jnp.mean(y * t), jnp.ones((6, 3)) * jnp.arange(1.0, 4.0), optax.sgd(1e-2))
        work = BACKEND.bind(model, None, (x,), mode="training", seed=0, loss=training.loss, targets=training.targets,
                            optimizer=training.optimizer)  # fmt: skip
        after, _ = Prune(criterion=criterion).jax(work)
        return np.asarray(BACKEND.finish(after).model.fc.kernel[...])[1]

    np.testing.assert_allclose(left("magnitude"), [9.0, 9.0])
    np.testing.assert_allclose(left("taylor"), [0.1, 0.1])


@pytest.mark.parametrize("schedule", [0, 10])
def test_weights_stay_zero_in_training(schedule):
    given, _, effect, finished = trained_work("conv", 5, structure="unstructured", amount=0.75, schedule=schedule)
    assert effect.simulated
    assert set(effect.touched) == {"conv", "fc", "out"}
    before = zeros(flat(finished.model)["fc.kernel"])
    assert before == (0 if schedule else round(0.75 * 192 * 16))
    losses = steps(finished, given, 40)
    weights = flat(finished.model)
    for layer in effect.touched:
        assert zeros(weights[f"{layer}.kernel"]) == round(0.75 * weights[f"{layer}.kernel"].size)
    assert zeros(weights["fc.bias"]) == 0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("trains", [False, True])
def test_two_of_each_four_inputs(trains):
    if trains:
        given, _, effect, finished = trained_work("conv", 5, structure="2:4", schedule=6)
        steps(finished, given, 8)
        model = finished.model
    else:
        original, x = made("conv")
        result = applied(Prune(structure="2:4"), original, x)
        effect, model = result.effect, result.model
    assert effect.simulated
    assert effect.touched == ("fc", "out")
    assert {item.name: item.reason for item in effect.skipped} == {"conv": "its 1 input features are no multiple of 4"}
    fours = flat(model)["fc.kernel"].reshape(48, 4, 16)
    np.testing.assert_array_equal((fours == 0).sum(1), 2)
    if not trains:
        largest = np.sort(np.abs(flat(original)["fc.kernel"]).reshape(48, 4, 16), 1)[:, 2:]
        np.testing.assert_array_equal(np.sort(np.abs(fours), 1)[:, 2:], largest)


@pytest.mark.parametrize(("structure", "n", "m"), [("1:4", 1, 4), ("3:6", 3, 6)])
def test_other_patterns(structure, n, m):
    model, x = made("conv")
    result = applied(Prune(structure=structure, include="fc"), model, x)
    runs = flat(result.model)["fc.kernel"].reshape(-1, m, 16)
    np.testing.assert_array_equal((runs != 0).sum(1), n)


def test_the_smallest_weights_go():
    model, x = made("conv")
    result = applied(Prune(structure="unstructured", amount=0.25, exclude="out"), model, x)
    before, after = flat(model)["fc.kernel"], flat(result.model)["fc.kernel"]
    threshold = np.quantile(np.abs(before), 0.25)
    np.testing.assert_array_equal(after, np.where(np.abs(before) > threshold, before, 0))
    np.testing.assert_array_equal(flat(result.model)["out.kernel"], flat(model)["out.kernel"])
    assert "out" in {item.name for item in result.effect.skipped}


def test_without_example_inputs_weights_can_be_masked():
    model, _ = made("conv")
    result = applied(Prune(structure="unstructured"), model, None)
    assert result.effect.status == "applied"


def test_a_contradiction_is_refused():
    model, x = made("conv")
    with pytest.raises(InvalidInputError, match="rates units"):
        applied(Prune(structure="unstructured", criterion="activation"), model, x)


def test_the_optimizer_under_masks_is_the_optimizer_on_what_stays():
    """Clipped momentum on four weights of which two are masked, against the same on the other two."""
    weights, gradients = jnp.array([3.0, -1.0, 2.0, 0.5]), jnp.array([1.0, 2.0, -3.0, 4.0])
    group = Group(4, 2, lambda leaves, _: jnp.abs(leaves[0]), lambda stays: {0: stays})
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    optimizer = masking(plain, [group], 0)
    params, state = [weights], optimizer.init([weights])
    small, small_state = [weights[jnp.array([0, 2])]], plain.init([weights[jnp.array([0, 2])]])
    for _ in range(3):
        updates, state = optimizer.update([gradients], state, params)
        params = optax.apply_updates(params, updates)
        updates, small_state = plain.update([gradients[jnp.array([0, 2])]], small_state, small)
        small = optax.apply_updates(small, updates)
    np.testing.assert_array_equal(params[0], [small[0][0], 0.0, small[0][1], 0.0])


@pytest.mark.parametrize("step", [1, 7, 16, 31, 32, 40])
def test_the_cubic_schedule(step):
    group = Group(1000, 500, lambda leaves, _: jnp.abs(leaves[0]), lambda stays: {0: stays})
    optimizer = masking(optax.sgd(0.0), [group], 32)
    params = [jnp.arange(1.0, 1001.0)]
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for _ in range(step):
        updates, state = update([jnp.zeros(1000)], state, params)
        params = optax.apply_updates(params, updates)
    share = 1 - (1 - min(step / 32, 1)) ** 3  # Zhu and Gupta 2017, equation 1
    assert zeros(params[0]) == round(500 * share)


def test_what_has_gone_never_returns():
    """Not even where the scores turn round."""
    group = Group(4, 2, lambda _, gradients: gradients[0], lambda stays: {0: stays})
    optimizer = masking(optax.sgd(1.0), [group], 2)
    params = [jnp.ones(4)]
    state = optimizer.init(params)
    for gradients in ([0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]):
        updates, state = optimizer.update([jnp.array(gradients)], state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params[0], [0.0, 0.0, 1 - 2 - 1 - 1, 1 - 3])


def test_the_original_teaches():
    given, after, _, finished = trained_work("conv", 3, distill=True)
    model = nnx.clone(given["model"])
    model.eval()
    x = given["example_inputs"][0]
    np.testing.assert_allclose(after.training.teacher(x), outputs(model, x), rtol=1e-4, atol=1e-5)
    losses = steps(finished, given, 40)
    assert losses[-1] < losses[0]


def test_through_the_pipeline():
    """Training, then inference on what it gave, each by one call; the original as it was."""
    given = training("conv", 3)
    before = flat(given["model"])
    result = perfkit.optimize(**given, recipe=Prune(schedule=20))
    assert result.report.fidelity.ok
    assert result.report.steps[0].effect.simulated
    for _ in range(25):
        result.train_step((given["example_inputs"], given["targets"]))
    smaller = perfkit.optimize(result.model, recipe=Prune(), example_inputs=given["example_inputs"])
    assert smaller.report.fidelity.relative_error < 1e-5
    assert smaller.report.after.parameters < 0.7 * smaller.report.before.parameters
    for path, array in flat(given["model"]).items():
        np.testing.assert_array_equal(array, before[path])
