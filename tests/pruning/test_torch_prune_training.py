"""Pruning torch models in training: optimizers that go on, masks that grow, and what is removed afterwards."""

import copy
from functools import partial

import pytest

pytest.importorskip("torch")

import torch
from sample_models import training
from torch import nn

import perfkit
from perfkit import UnsupportedError, reference
from perfkit.backends import backend
from perfkit.backends.torch_training import Trainer
from perfkit.recipes.prune import Prune
from perfkit.reference import _in_torch as in_torch
from perfkit.reference._catalog import card, dataset
from perfkit.reference._train import shuffled

pytestmark = pytest.mark.usefixtures("hasty")

BACKEND = backend("torch")


def bound(model, x, targets, optimizer, steps=0):
    """A training workload, trained for some steps."""
    given = {"loss": nn.functional.mse_loss, "targets": targets, "optimizer": optimizer, "seed": 0}
    work = BACKEND.bind(model, None, (x,), mode="training", **given)
    trainer = Trainer(work)
    for _ in range(steps):
        trainer.step(work.inputs, targets)
    return work


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(5, 8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


def mlp():
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def small_task(make=mlp):
    torch.manual_seed(0)
    rows = (7, 6, 5) if make is Tagger else (24, 5)
    return make(), torch.randn(rows), torch.randn(*rows[:-1], 2)


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("make", [mlp, Tagger])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_goes_on(make, optimizer):
    """Of each parameter, what is left of it and of its state stood at the same places before."""
    model, x, y = small_task(make)
    work = bound(model, x, y, OPTIMIZERS[optimizer], steps=3)
    new, effect = Prune(round_to=1).torch(BACKEND.copy(work))
    assert effect.touched
    held = {id(p) for group in new.training.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in new.model.parameters()}
    before = dict(work.model.named_parameters())
    cut = 0
    for name, parameter in new.model.named_parameters():
        old, states = before[name], new.training.optimizer.state[parameter]
        old_states = work.training.optimizer.state[old]
        assert states.keys() == old_states.keys()
        for key, value in states.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert value.shape == parameter.shape
                places = torch.isin(old.detach(), parameter.detach())
                if places.sum() == parameter.numel():  # all values different, so that their places can be told
                    assert torch.equal(value.flatten(), old_states[key][places])
                    cut += value.shape != old.shape
    assert cut or optimizer == "sgd"
    trainer = Trainer(new)
    losses = [float(trainer.step(new.inputs, y)) for _ in range(200)]
    assert losses[-1] < losses[0]


def test_unknown_state_is_refused():
    """Adafactor keeps the second moments of rows and columns."""
    make = partial(torch.optim.Adafactor, lr=1e-2)
    model, x, y = small_task()
    with pytest.raises(UnsupportedError, match=r"Adafactor keeps for 0.weight \(shape .*before training"):
        Prune(round_to=1).torch(bound(model, x, y, make, steps=1))
    new, _ = Prune(round_to=1).torch(bound(model, x, y, make))
    assert new.model[0].out_features == 8, "without a state there is nothing to refuse"


def test_taylor_keeps_what_the_loss_needs():
    """Units with large weights that nobody reads have no gradient."""
    model, x, y = small_task()
    with torch.no_grad():
        model[0].weight[:8] *= 10
        model[3].weight[:, :8] = 0
    work = bound(model, x, y, OPTIMIZERS["sgd"])
    new, _ = Prune(round_to=1, criterion="taylor").torch(BACKEND.copy(work))
    assert torch.equal(new.model[0].weight, work.model[0].weight[8:])
    new, _ = Prune(round_to=1).torch(BACKEND.copy(work))
    assert torch.equal(new.model[0].weight, work.model[0].weight[:8])


def test_distillation_keeps_the_original_as_teacher():
    model, x, y = small_task()
    work = bound(model, x, y, OPTIMIZERS["adam"], steps=3)
    new, _ = Prune(round_to=1, distill=True).torch(BACKEND.copy(work))
    with torch.no_grad():
        torch.testing.assert_close(new.training.teacher(x), copy.deepcopy(work.model).eval()(x))
    assert new.model[0].out_features == 8
    again, _ = Prune(round_to=1, distill=True).torch(BACKEND.copy(new))
    assert again.training.teacher is new.training.teacher, "not what was pruned before"


def zero_units(model):
    """Features of the first layer whose weights are all zero."""
    return int((model[0].weight == 0).all(1).sum())


def test_schedule_grows_as_published():
    """round(16 · 0.5 · (1 − (1 − t/8)³)) units at step t, whatever momentum does."""
    model, x, y = small_task()
    work = bound(model, x, y, OPTIMIZERS["momentum"], steps=5)
    new, effect = Prune(round_to=1, schedule=8).torch(BACKEND.copy(work))
    assert effect.simulated
    assert effect.touched == ("0",)
    trainer, counts, before = Trainer(new), [], set()
    for _ in range(12):
        trainer.step(new.inputs, y)
        new.model.state_dict()  # as when saving: masks hold in what is saved
        counts.append(zero_units(new.model))
        gone = set((new.model[0].weight == 0).all(1).nonzero().flatten().tolist())
        assert before <= gone, "what is gone stays gone"
        before = gone
        with torch.no_grad():  # as an optimizer's momentum may
            new.model[0].weight[list(gone)] = 9
    expected = [16 - round(16 * (1 - 0.5 * (1 - (1 - min(t / 8, 1)) ** 3))) for t in range(12)]
    assert counts == expected


def test_keeping_state_keeps_masks():
    model, x, y = small_task()
    work = bound(model, x, y, OPTIMIZERS["adam"])
    new, _ = Prune(round_to=1, schedule=6).torch(BACKEND.copy(work))
    trainer = Trainer(new)
    with trainer.keeping_state():
        first = [float(trainer.step(new.inputs, y)) for _ in range(10)]
    assert zero_units(new.model) == 0
    assert first == [float(trainer.step(new.inputs, y)) for _ in range(10)]


def test_evaluation_counts_no_steps():
    model, x, y = small_task()
    new, _ = Prune(round_to=1, schedule=2).torch(bound(model, x, y, OPTIMIZERS["adam"]))
    with torch.no_grad():
        for _ in range(5):
            new.model(x)
    new.model.eval()
    new.model(x)
    assert zero_units(new.model) == 0


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
@pytest.mark.parametrize("make", [mlp, Tagger])
def test_masks_then_removal(make, criterion):
    """After the schedule, pruning in inference removes what is zero, and the outputs stay equal."""
    model, x, y = small_task(make)
    result = perfkit.optimize(
        model, recipe=Prune(round_to=1, schedule=20, criterion=criterion), example_inputs=(x,), targets=y,
        loss=nn.functional.mse_loss, optimizer=torch.optim.Adam(model.parameters(), lr=1e-2), mode="training",
    )  # fmt: skip
    assert result.report.steps[0].effect.simulated
    assert result.report.losses.before[0] == pytest.approx(result.report.losses.after[0]), "it starts where it was"
    for _ in range(30):
        result.train_step(((x,), y))
    masked = result.model.eval()
    smaller = perfkit.optimize(masked, recipe="prune(round_to=1)", example_inputs=(x,))
    effect = smaller.report.steps[0].effect
    assert effect.touched
    assert not effect.simulated
    assert smaller.report.after.parameters < smaller.report.before.parameters
    with torch.no_grad():
        torch.testing.assert_close(smaller.model(x), masked(x))
    plain = make()
    plain.load_state_dict(masked.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), masked(x))
    assert not [name for name, _ in smaller.model.named_buffers() if "perfkit" in name]


def test_schedule_in_a_chain():
    given = training("torch")
    result = perfkit.optimize(**given, recipe="prune(schedule=10, round_to=1)+half", mode="training")
    batch = given["example_inputs"], given["targets"]
    for _ in range(15):
        result.train_step(batch)
    result.model.state_dict()
    assert int((result.model[0].weight == 0).flatten(1).all(1).sum()) == 2


class Auxiliary(nn.Module):
    """A second head that is there in training only, and reads what evaluation never shows it."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aside = nn.Linear(5, 16), nn.Linear(16, 2), nn.Linear(16, 2)
        self.drop, self.columns = nn.Dropout(0.2), nn.Dropout1d(0.2)

    def forward(self, x):
        x = nn.functional.dropout(self.drop(torch.relu(self.body(x))), 0.1, self.training)
        x = self.columns(x[:, :, None])[:, :, 0]
        return self.head(x) + self.aside(x) if self.training else self.head(x)


def test_paths_of_training_are_followed():
    model, x, y = small_task(Auxiliary)
    new, effect = Prune(round_to=1).torch(bound(model, x, y, OPTIMIZERS["adam"], steps=2))
    assert effect.touched == ("body",)
    assert new.model.aside.in_features == 8
    trainer = Trainer(new)
    losses = [float(trainer.step(new.inputs, y)) for _ in range(100)]
    assert losses[-1] < losses[0]


def score(judged):
    """Accuracy, or the share of the variance that a regression explains."""
    return judged.value if judged.metric == "accuracy" else 1 - judged.value / judged.baseline


@pytest.mark.parametrize(
    ("name", "steps", "more", "notes"),
    [
        ("cnn2", 40, 40, ("conv1: 32 → 16 channels", "conv2: 64 → 32 channels", "fc1: 128 → 64 features")),
        ("lstm", 500, 150, ("lstm: 50 → 24 hidden units",)),
    ],
)
def test_quality_after_fine_tuning(name, steps, more, notes):
    """At least 2.5 times fewer parameters, and within a point of the original, on held-out rows of the real task."""
    original, task = reference.train(name, steps=steps), reference.task(name)
    result = perfkit.optimize(
        original.model, recipe="prune(amount=0.5)", example_inputs=task.example_inputs, targets=task.targets,
        loss=task.loss, optimizer=task.optimizer, mode="training", tolerance=1,
    )  # fmt: skip
    report, kind = result.report, card(name).kind
    assert report.steps[0].effect.notes == notes
    assert report.before.parameters >= 2.5 * report.after.parameters
    rows = dataset(name, None).train
    for indices in shuffled(len(rows), batch_size=64, steps=more, seed=1):
        inputs, targets = rows.rows(indices)
        result.train_step((in_torch.model_inputs(kind, inputs), in_torch.model_targets(targets)))
    assert score(reference.evaluate(name, result.model.eval())) >= score(original) - 0.01
