"""Updates in one pass: the same training, whichever optimizer it is and whatever it has learnt so far."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from perfkit import UnsupportedError, backends
from perfkit._chain import chain_of, check
from perfkit._recipe import refusal
from perfkit._variant import apply
from perfkit.backends.torch_profiler import profiled

KINDS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    "adam on a tensor": (torch.optim.Adam, {"lr": torch.tensor(1e-2)}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.9), "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


def bound(kind="adam", taken=0, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    kind, options = KINDS[kind] if isinstance(kind, str) else (kind, {})
    groups = [{"params": [parameter], "weight_decay": 0.1 / at} for at, parameter in enumerate(model.parameters(), 1)]
    optimizer = kind(groups, **({"lr": 1e-2} | options))
    x, y = torch.randn(4, 6), torch.randn(4, 2)
    for _ in range(taken):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    about = {"loss": nn.functional.mse_loss, "targets": y, "optimizer": optimizer}
    return backends.of(model).bind(model, None, (x,), mode="training", seed=0, **about)


def losses(work):
    finished = work.backend.finish(work)
    return [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(5)]


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_optimizer_trains_alike(kind, taken):
    before = losses(bound(kind, taken))
    work = bound(kind, taken)
    given = copy.deepcopy(work.training.optimizer.state_dict())
    applied = apply(chain_of("fused_optimizer"), work)
    made = applied.works[-1].training.optimizer
    assert all(group["fused"] and not group["foreach"] for group in made.param_groups)
    assert losses(applied.works[-1]) == pytest.approx(before, rel=1e-5)
    assert applied.steps[0].effect.touched == (type(made).__name__,)
    assert str(work.training.optimizer.state_dict()) == str(given), "the caller's is as it was"


@pytest.fixture
def wide():
    """Under it optimizers count their steps in float64, and GPUs' fused updates read float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_steps_that_were_counted_are_counted_on(kind, wide):
    work = bound(kind, taken=3)
    made = apply(chain_of("fused_optimizer"), work).works[-1]
    assert {state["step"].dtype for state in made.training.optimizer.state.values()} == {torch.float32}
    assert losses(made) == pytest.approx(losses(bound(kind, taken=3)), rel=1e-5)
    assert {int(state["step"]) for state in made.training.optimizer.state.values()} == {8}


def test_parameters_are_updated_by_the_fused_kernel():
    work = apply(chain_of("fused_optimizer"), bound()).works[-1]
    with profiled() as profile:
        losses(work)
    assert "aten::_fused_adam_" in {event.key for event in profile.key_averages()}


def test_groups_that_are_added_later_and_gradient_scalers_find_it_fused():
    made = apply(chain_of("fused_optimizer"), bound("adamw")).works[-1].training.optimizer
    made.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert made.param_groups[-1]["fused"]
    assert not made.param_groups[-1]["foreach"]
    asked_for = torch.optim.AdamW(nn.Linear(1, 1).parameters(), fused=True)
    assert made._step_supports_amp_scaling == asked_for._step_supports_amp_scaling


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 6, sparse=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(x + self.table(x.long().clamp(0, 4)[:, 0]))


class Turned(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def forward(self, x):
        return (super().forward(x) * self.turn).abs()


def test_what_cannot_be_fused_is_refused():
    recipe = chain_of("fused_optimizer").recipes[0]
    assert "no fused RMSprop" in refusal(recipe, bound(torch.optim.RMSprop))
    assert "fused already" in refusal(recipe, apply(chain_of("fused_optimizer"), bound()).works[-1])
    capturable = bound()
    capturable.training.optimizer.param_groups[1]["capturable"] = True
    assert "capturable" in refusal(recipe, capturable)
    assert "gradient of table is sparse" in refusal(recipe, bound(torch.optim.SGD, model=Words()))
    assert "floating-point" in refusal(recipe, bound(model=Turned(6, 2)))
    model = Words()
    nothing = dict.fromkeys(("loss", "targets", "optimizer"))
    inference = backends.of(model).bind(model, None, (torch.ones(4, 6),), mode="inference", seed=0, **nothing)
    with pytest.raises(UnsupportedError, match="which inference does not have"):
        check(chain_of("fused_optimizer"), inference)
