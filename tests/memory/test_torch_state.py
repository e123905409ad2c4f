"""Optimizer state in few bits, on the host, and updates in place: the same training, to what was stated."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from perfkit import UnsupportedError, backends
from perfkit._chain import chain_of, check
from perfkit._recipe import refusal
from perfkit._variant import apply
from perfkit.memory import torch_offload


def bound(optimizer=torch.optim.AdamW, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2))
    return backends.of(model).bind(
        model,
        None,
        (torch.randn(16, 64),),
        mode="training",
        seed=0,
        loss=lambda out, y: (out - y).square().mean(),
        targets=torch.randn(16, 2),
        optimizer=optimizer(model.parameters(), lr=1e-2, **options),
    )


def steps(work, count=4):
    finished = work.backend.finish(work)
    losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(count)]
    return losses, work.backend.optimizer_state(work, finished).value


def test_eight_bits_hold_a_quarter_of_float32_and_train_alike():
    """2 · 8192 numbers in one byte each and scales; 258 and 130 others in float32."""
    before, held = steps(bound())
    applied = apply(chain_of("low_bit_optimizer"), bound())
    after, held_after = steps(applied.works[-1])
    assert applied.steps[0].effect.touched == ("0.weight",)
    assert held_after < 0.35 * held
    assert after == pytest.approx(before, rel=1e-2)


def test_four_bits_hold_less():
    pairs = [steps(apply(chain_of(f"low_bit_optimizer({bits})"), bound(torch.optim.Adam)).works[-1]) for bits in (8, 4)]
    assert pairs[1][1] < 0.7 * pairs[0][1]


def test_settings_are_kept():
    work = bound(torch.optim.Adam, betas=(0.8, 0.9), eps=1e-6)
    (group,) = apply(chain_of("low_bit_optimizer"), work).works[-1].training.optimizer.param_groups
    assert (group["betas"], group["eps"], float(group["lr"])) == ((0.8, 0.9), 1e-6, pytest.approx(1e-2))


@pytest.mark.parametrize(
    ("recipe", "optimizer", "why"),
    [
        ("low_bit_optimizer", torch.optim.SGD, "the optimizer is SGD"),
        ("low_bit_optimizer('fp8')", torch.optim.Adam, "compute capability 8.9"),
        ("offload", torch.optim.Adam, "the host's memory is the device's"),
    ],
)
def test_what_cannot_be_is_refused(recipe, optimizer, why):
    with pytest.raises(UnsupportedError, match=why):
        check(chain_of(recipe), bound(optimizer))


def test_an_optimizer_that_has_taken_steps_is_refused():
    work = bound()
    steps(work, 1)
    assert "has taken steps" in refusal(*chain_of("low_bit_optimizer"), work)


def test_small_models_are_left_alone():
    effect = apply(chain_of("low_bit_optimizer"), bound(model=nn.Linear(64, 2))).steps[0].effect
    assert effect.status == "NO_EFFECT"


def test_donating_updates_in_place():
    before, _ = steps(bound())
    applied = apply(chain_of("donate"), bound())
    assert applied.steps[0].effect.touched == ("AdamW", "1")
    after, _ = steps(applied.works[-1])
    assert after == pytest.approx(before, rel=1e-5)
    assert applied.works[-1].training.optimizer.param_groups[0]["fused"]


def test_an_activation_after_one_that_needs_its_output_stays():
    model = nn.Sequential(nn.Linear(64, 8), nn.Sigmoid(), nn.ReLU(), nn.Linear(8, 2))
    effect = apply(chain_of("donate"), bound(torch.optim.RMSprop, model=model)).steps[0].effect
    assert effect.touched == ()
    assert "no fused RMSprop" in effect.skipped[0].reason


def test_saved_on_the_host_gradients_are_the_same():
    """The copies are made here too; only that they lie elsewhere needs a GPU."""
    moved = []
    work = bound(model=nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 2)))
    twin = copy.deepcopy(work.model)
    on_host = torch_offload.on_host
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_offload, "on_host", lambda tensor: moved.append(tensor.shape) or on_host(tensor))
        with torch_offload.saving_on_host(work.model, least_bytes=16 * 64 * 4):
            work.model(*work.inputs.args).square().sum().backward()
    twin(*work.inputs.args).square().sum().backward()
    assert torch.Size((16, 128)) in moved
    assert torch.Size((128, 64)) not in moved, "parameters stay"
    for mine, other in zip(work.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_optimizer_state_comes_and_goes():
    before, _ = steps(bound())
    work, effect = torch_offload.offloaded(bound(), activations=True, optimizer=True, least_bytes=1)
    assert effect.touched == ("Sequential", "AdamW")
    assert steps(work)[0] == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_less_is_held():
    model = nn.Sequential(
        *[layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.ReLU())], nn.Linear(1024, 2)
    )
    model, x, y = model.cuda(), torch.randn(4096, 1024, device="cuda"), torch.randn(4096, 2, device="cuda")
    optimizer = torch.optim.Adam(model.parameters())
    work = backends.of(model).bind(
        model, None, (x,), mode="training", seed=0, targets=y, optimizer=optimizer, loss=nn.functional.mse_loss
    )
    (after,) = apply(chain_of("offload"), work).works
    found = []
    for side in (work, after):
        finished = side.backend.finish(side)
        peak = side.backend.tensor_peak(side, finished).value
        found.append((peak, side.backend.optimizer_state(side, finished).value))
    assert found[1][0] < 0.7 * found[0][0]
    assert found[1][1] < 0.1 * found[0][1]
