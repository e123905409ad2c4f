"""Hooks of parameters and optimizers, and schedulers, work on the copy as on the original, or are refused."""

import functools

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import perfkit
from perfkit import InvalidInputError

pytestmark = pytest.mark.filterwarnings("ignore::perfkit.PerfkitWarning")


def with_hook(hook, once_added=False):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    weight = model[0].weight
    (weight.register_post_accumulate_grad_hook if once_added else weight.register_hook)(hook)
    return model


def keep_first_column(parameter):
    parameter.grad[:, 1:] = 0


def trained(model, recipe, steps=1):
    """The model after training, and what the recipe left alone."""
    result = perfkit.apply(
        model,
        recipe,
        mode="training",
        example_inputs=(torch.ones(4, 4),),
        targets=torch.ones(4, 2),
        loss=nn.functional.mse_loss,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
    )
    for _ in range(steps):
        result.train_step(((torch.ones(4, 4),), torch.ones(4, 2)))
    return result.model, [item.name for item in result.report.steps[0].effect.skipped]


@pytest.mark.parametrize("recipe", ["bf16", "half", "prune(amount=0.5, round_to=1)", "low_rank(energy=0.5)"])
@pytest.mark.parametrize("once_added", [False, True])
def test_hooks_of_parameters_mask_gradients_as_before(recipe, once_added):
    mask = torch.tensor([1.0, 0, 0, 0])
    model = with_hook(keep_first_column if once_added else lambda gradient: gradient * mask, once_added)
    before = model[0].weight.detach().clone()
    result, left_alone = trained(model, recipe)
    after = result[0].weight
    assert torch.equal(after[:, 1:], before[:, 1:])
    assert not torch.equal(after[:, 0], before[:, 0])
    assert ("0" in left_alone) == recipe.startswith(("prune", "low_rank"))


class Masking(nn.Module):
    """Masks a gradient in a method, with what is its own."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(4, 2), 0
        self.fc.weight.register_hook(self.masked)

    def masked(self, gradient):
        self.seen += 1
        return gradient * 0

    def forward(self, x):
        return self.fc(x)


def test_hooks_of_parameters_that_are_methods_are_the_copys():
    model = Masking()
    result, _ = trained(model, "half")
    assert torch.equal(result.fc.weight, model.fc.weight)
    assert result.seen > model.seen == 0


class Decay:
    """A gradient hook that is an object, and holds the parameter that it decays."""

    def __init__(self, parameter):
        self.parameter, self.calls = parameter, 0

    def __call__(self, gradient):
        self.calls += 1
        return 0 * gradient + self.parameter.detach()  # at a rate of 0.1, a tenth of it is gone after each step


@pytest.mark.parametrize("partial", [False, True])
def test_hooks_of_parameters_that_are_objects_hold_the_copys(partial):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    weight = model[0].weight
    hook = functools.partial(Decay.__call__, Decay(weight)) if partial else Decay(weight)
    weight.register_hook(hook)
    before = weight.detach().clone()
    result, _ = trained(model, "bf16", steps=2)
    torch.testing.assert_close(result[0].weight, 0.9**2 * before)
    assert torch.equal(weight, before)
    assert (hook.args[0] if partial else hook).calls == 0


class Shared(Decay):
    """The same, which cannot be copied."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    "make", [Shared, lambda weight: functools.partial(Shared(weight)), lambda weight: Kept(weight)]
)
def test_objects_among_the_hooks_that_go_on_using_the_original_are_refused(make):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].weight.register_hook(make(model[0].weight))
    with pytest.raises(InvalidInputError, match=r"a gradient hook of parameter '0\.weight' holds .* is called, which"):
        trained(model, "bf16")
    called = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    called[0].register_forward_hook(Watching(called))
    with pytest.raises(InvalidInputError, match=r"_forward_hooks of 0 holds a Watching that is called"):
        trained(called, "bf16")


class Kept:
    """Holds the original in a slot, and is not copied."""

    __slots__ = ("parameter",)

    def __init__(self, parameter):
        self.parameter = parameter

    def __call__(self, gradient):
        return gradient + self.parameter

    def __deepcopy__(self, memo):
        return self


class Watching:
    """A hook of a module's calls that has the model in a list, and is not copied."""

    def __init__(self, model):
        self.models = [model]

    def __call__(self, module, arguments, output):
        return output

    def __deepcopy__(self, memo):
        return self


def test_hooks_of_parameters_that_would_train_the_original_are_refused():
    model = with_hook(lambda _parameter: optimizers["first"].step(), once_added=True)
    optimizers = {"first": torch.optim.SGD(model.parameters(), 0.1)}
    before = model[0].weight.detach().clone()
    with pytest.raises(InvalidInputError, match=r"a gradient hook of parameter '0\.weight' holds the function"):
        trained(model, "bf16")
    assert torch.equal(model[0].weight, before)


def sgd(model, hooked=lambda optimizer, scheduler: None, scheduled=True):
    """An optimizer of a model of two layers, its scheduler, and what is hooked to it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if (
        hook := hooked(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if scheduled else None)
    ) is not None:
        optimizer.register_step_post_hook(hook)
    return optimizer


def prepared(model, optimizer):
    return perfkit.apply(
        model,
        "bf16",
        mode="training",
        example_inputs=(torch.ones(4, 4),),
        targets=torch.ones(4, 2),
        loss=nn.functional.mse_loss,
        optimizer=optimizer,
    )


@pytest.mark.parametrize(
    "hooked",
    [
        lambda optimizer, scheduler: lambda *_: scheduler.step(),
        lambda optimizer, scheduler: (lambda step: lambda *_: step())(scheduler.step),
        lambda optimizer, scheduler: lambda *_: [group.update(lr=0) for group in optimizer.param_groups],
    ],
    ids=["a scheduler", "its method", "the optimizer"],
)
def test_hooks_of_optimizers_that_would_change_the_original_are_refused(hooked):
    model = nn.Linear(4, 2)
    optimizer = sgd(model, hooked)
    with pytest.raises(InvalidInputError, match=r"a hook of SGD .* make a scheduler over result.optimizer"):
        prepared(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_hooks_of_optimizers_may_use_what_they_are_given():
    def halved(optimizer, _args, _kwargs):
        optimizer.param_groups[0]["lr"] /= 2

    model = nn.Linear(4, 2)
    optimizer = sgd(model, lambda *_: halved, scheduled=False)
    result = prepared(model, optimizer)
    for lr in (0.25, 0.125):
        result.train_step(((torch.ones(4, 4),), torch.ones(4, 2)))
        assert result.optimizer.param_groups[0]["lr"] == lr
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_scheduler_is_made_over_the_optimizer_of_the_result():
    model = nn.Linear(4, 2)
    with pytest.warns(perfkit.PerfkitWarning, match=r"a learning-rate scheduler steps SGD.* over result\.optimizer"):
        result = prepared(model, sgd(model))
    scheduler = torch.optim.lr_scheduler.StepLR(result.optimizer, 1, 0.0)
    moved = []
    for _ in range(2):
        before = result.model.weight.detach().clone()
        result.train_step(((torch.ones(4, 4),), torch.ones(4, 2)))
        scheduler.step()
        moved.append(not torch.equal(result.model.weight, before))
    assert moved == [True, False]


def test_an_optimizer_that_computes_the_loss_itself_is_refused():
    with pytest.raises(InvalidInputError, match=r"LBFGS.step asks for closure, .* take an optimizer that does without"):
        prepared(nn.Linear(4, 2), torch.optim.LBFGS)
