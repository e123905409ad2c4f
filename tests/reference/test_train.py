"""Training really learns, repeats itself, and is judged on rows it has not seen."""

import numpy as np
import pytest
import torch
from flax import nnx

from perfkit import reference
from perfkit.reference._evaluate import judge
from perfkit.reference._train import shuffled
from perfkit.reference.data import Dataset, Split

each_framework = pytest.mark.parametrize("framework", ["torch", "jax"])


def easy_texts(count=96, length=6):
    """Texts whose last word alone decides."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, length, count, endpoint=True)
    targets = generator.integers(0, 2, (count, 1)).astype(np.float32)
    ids = np.where(np.arange(length) < lengths[:, None], generator.integers(4, 9, (count, length)), 0)
    ids[np.arange(count), lengths - 1] = 2 + targets[:, 0]
    rows = [Split((ids[part], lengths[part]), targets[part]) for part in (slice(0, -32), slice(-32, None))]
    return Dataset(name="last word", kind="texts", train=rows[0], test=rows[1])


def easy_sequences():
    """The adding problem with two steps: both values count, and there is nothing to remember."""
    return reference.data.adding(count=400, length=2)


def test_the_cnn_reads_held_out_digits():
    trained = reference.train("cnn")
    assert trained.metric == "accuracy"
    assert trained.value >= 0.97
    assert trained.baseline < 0.11


@each_framework
@pytest.mark.parametrize(("name", "steps"), [("cnn", 40), ("cnn2", 40)])
def test_images_are_learned(name, steps, framework):
    trained = reference.train(name, framework=framework, steps=steps, batch_size=32)
    # ln 10 = 2.3 is the loss of knowing nothing
    assert trained.losses[0] > 1.5
    assert np.mean(trained.losses[-5:]) < 1.0
    assert trained.value > 0.6


@each_framework
@pytest.mark.parametrize(("name", "steps"), [("rnn", 150), ("lstm", 150)])
def test_sequences_are_learned(name, steps, framework):
    trained = reference.train(name, framework=framework, steps=steps, data=easy_sequences())
    assert trained.metric == "mse"
    assert trained.value < 0.3 * trained.baseline
    assert len(trained.losses) == steps


@each_framework
@pytest.mark.parametrize("name", ["text_rnn", "text_lstm"])
def test_texts_are_learned(name, framework):
    trained = reference.train(name, framework=framework, steps=20, batch_size=16, data=easy_texts())
    assert trained.metric == "accuracy"
    assert np.mean(trained.losses[-5:]) < 0.35  # ln 2 = 0.69 is the loss of knowing nothing
    assert trained.value > 0.9 > trained.baseline


@each_framework
def test_the_same_seed_repeats_and_another_does_not(framework):
    data = reference.data.adding(count=50)
    first, again, other = (
        reference.train("rnn", framework=framework, steps=4, batch_size=8, seed=seed, data=data) for seed in (1, 1, 2)
    )
    assert first.losses == again.losses
    assert first.value == again.value
    assert first.losses != other.losses


@each_framework
def test_progress_is_told_every_step_and_its_loss(framework):
    told = []
    trained = reference.train(
        "rnn",
        framework=framework,
        steps=3,
        batch_size=4,
        data=reference.data.adding(count=50),
        progress=lambda *step: told.append(step),
    )
    assert told == [(number, 3, loss) for number, loss in enumerate(trained.losses, start=1)]
    assert trained.train_seconds > 0
    if framework == "torch":
        assert not trained.model.training


@each_framework
@pytest.mark.parametrize("name", ["cnn", "rnn"])
def test_the_steps_of_a_task_lower_its_loss(name, framework):
    work = reference.task(name, framework=framework, batch_size=4)
    assert work.metric == ("mse" if name in ("rnn", "lstm") else "accuracy")
    if framework == "torch":
        assert work.model.training
        optimizer = work.optimizer(work.model.parameters())

        def step():
            optimizer.zero_grad()
            loss = work.loss(work.model(*work.example_inputs), work.targets)
            loss.backward()
            optimizer.step()
            return loss.item()
    else:
        optimizer = nnx.Optimizer(work.model, work.optimizer, wrt=nnx.Param)

        @nnx.jit
        def update(model, optimizer):
            def objective(model):
                return work.loss(model(*work.example_inputs), work.targets)

            loss, gradients = nnx.value_and_grad(objective)(model)
            optimizer.update(model, gradients)
            return loss

        def step():
            return float(update(work.model, optimizer))

    losses = [step() for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_recurrent_models_are_trained_with_a_bounded_gradient():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = reference.task("lstm", batch_size=1).optimizer([weight])
    weight.grad = torch.full((4,), 30.0)  # a 2-norm of 60
    optimizer.step()
    torch.testing.assert_close(weight.grad, torch.full((4,), 0.5))


@each_framework
def test_evaluation_sees_the_held_out_rows_in_full_batches(framework):
    data = reference.data.adding(count=50)  # 10 held out
    seen = []

    def oracle(x):
        seen.append(np.asarray(x))
        return (x[:, :, 0] * x[:, :, 1]).sum(0)[:, None]

    judged = reference.evaluate("lstm", oracle, framework=framework, batch_size=4, data=data)
    assert [batch.shape for batch in seen] == [(28, 4, 10)] * 3  # the last batch is filled up, not cut short
    np.testing.assert_array_equal(np.concatenate(seen, axis=1)[:, :10], data.test.inputs[0].swapaxes(0, 1))
    assert judged.count == 10
    assert judged.value < 1e-12  # one float32 rounding, squared
    assert judged.baseline == pytest.approx(data.test.targets.var())


@each_framework
def test_the_framework_is_told_by_the_module(framework):
    data = reference.data.adding(count=50)
    model, _ = reference.load("lstm", framework=framework)
    told = reference.evaluate("lstm", model, framework=framework, data=data)
    assert reference.evaluate("lstm", model, data=data) == told
    with pytest.raises(ValueError, match="name the kind of arrays it takes with framework="):
        reference.evaluate("lstm", lambda x: x, data=data)


def test_the_baseline_is_the_best_constant_answer():
    labels = np.array([3, 3, 3, 1])
    scores = np.eye(10)[[3, 3, 3, 3]]
    assert judge("images", scores, labels).value == judge("images", scores, labels).baseline == 0.75
    signs = np.array([[0.0], [1.0], [1.0]])
    assert judge("texts", np.ones((3, 1)), signs).value == judge("texts", np.ones((3, 1)), signs).baseline
    numbers = np.array([[1.0], [2.0], [6.0]])
    assert judge("sequences", np.full((3, 1), 3.0), numbers).value == judge("sequences", numbers, numbers).baseline


def test_every_batch_is_full_and_every_pass_sees_every_row_once():
    batches = list(shuffled(5, batch_size=2, steps=5, seed=0))
    assert [len(batch) for batch in batches] == [2] * 5
    rows = np.concatenate(batches)
    assert sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4]
    assert list(rows[:5]) != list(rows[5:])
