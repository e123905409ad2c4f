"""Ranges of activations: what is seen, the grid that is chosen, which layer takes whose output."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from sample_models import arguments
from torch import nn

from perfkit import InvalidInputError, UnsupportedError, backends
from perfkit._workload import Inputs
from perfkit.quantization.torch_ranges import Affine, Observed, calibrate, linked


def workload(model, *batches):
    work = backends.of(model).bind(
        model, None, batches[0], mode="inference", loss=None, targets=None, optimizer=None, seed=0
    )
    return work.replace(calibration=tuple(Inputs((batch,)) for batch in batches))


@pytest.mark.parametrize("top", [127, 255])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 1e-6)])
def test_a_grid_holds_zero_exactly_and_its_range_to_half_a_step(low, high, top):
    grid = Affine.spanning(low, high, top)
    x = torch.linspace(low, high, 1001)
    assert 0 <= grid.zero <= top
    assert grid.rounded(torch.zeros(1)).item() == 0.0
    # The zero point is rounded too, which moves the ends by up to half a step more.
    assert (grid.rounded(x) - x).abs().max() <= grid.scale * (1 + 1e-5)
    assert len(torch.unique(grid.rounded(x))) <= top + 1


def test_extremes_and_histogram_over_all_batches():
    model = nn.Sequential(nn.Linear(3, 3))
    first, second = torch.full((16, 3), -2.0), torch.linspace(0, 5, 48).view(16, 3)
    work = workload(model, first, second)
    seen, samples = calibrate(work, {"0": work.model[0]})
    assert (seen["0"].low, seen["0"].high, seen["0"].calls) == (-2.0, 5.0, 2)
    assert seen["0"].counts.sum() == 96
    assert samples == 32


def test_an_outlier_is_clipped_where_that_lowers_the_error_and_its_share_is_told():
    counts = np.zeros(2048)
    counts[1024:1034] = 1e6  # nearly everything within the hundredth part of the range above 0
    counts[-1] = 1
    grid, clipped = Observed(-100.0, 100.0, 1, counts).grid(255)
    assert grid.scale < 0.5 * 200 / 255
    assert clipped == pytest.approx(1 / counts.sum())
    even, nothing = Observed(-100.0, 100.0, 1, np.ones(2048)).grid(255)
    assert even.scale == pytest.approx(200 / 255)
    assert nothing == 0


def test_dead_layers_say_why():
    assert "never called" in Observed().dead
    assert "0 throughout" in Observed(0.0, 0.0, 3).dead
    assert Observed(0.0, 1.0, 3).dead == ""


def test_a_batch_that_does_not_fit_or_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    good = torch.randn(16, 3)
    with pytest.raises(InvalidInputError, match=r"calibration batch 2.*float32\[16, 4\]"):
        calibrate(workload(model, good, torch.randn(16, 4)), {})
    work = workload(model, good, good / 0)
    with pytest.raises(InvalidInputError, match="NaN or infinite values to layer '0'"):
        calibrate(work, {"0": work.model[0]})


class Within(nn.Module):
    """Calls a layer on tensors that are not plain ones."""

    def __init__(self, call):
        super().__init__()
        self.inner, self.call = nn.Linear(3, 3), call

    def forward(self, x):
        return self.call(self.inner, x)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda layer, x: layer(torch.nested.as_nested_tensor([x], layout=torch.jagged)).values(), "a nested tensor"),
        (lambda layer, x: torch.func.vmap(layer)(x), "a tensor of torch.func's"),
    ],
)
def test_a_layer_that_is_given_no_plain_tensor_is_named(call, kind):
    work = workload(nn.Sequential(Within(call)), torch.randn(16, 3))
    with pytest.raises(UnsupportedError, match=rf"layer '0\.inner' is given {kind}"):
        calibrate(work, {"0.inner": work.model[0].inner})


class Branching(nn.Module):
    """Two pools: one feeds one layer through a reshape, one feeds two; one norm right behind its convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.shared = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.fc, self.left, self.right = nn.Linear(100, 4), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.relu(self.norm(self.conv(x)))
        z = self.shared(y)
        return self.fc(self.pool(y).view(len(x), -1)), self.left(z) + self.right(z)


def test_layers_are_linked_by_the_memory_of_their_inputs():
    model = Branching().eval()
    layers = {name: model.get_submodule(name) for name in ("conv", "fc", "left", "right")}
    work = workload(model, torch.randn(16, 1, 12, 12))
    links = linked(work, {name: work.model.get_submodule(name) for name in layers})
    assert links.followers == {"pool": "fc"}
    assert links.norms == {"norm": "conv"}


def test_an_inplace_change_in_between_breaks_the_link():
    model = nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 2)).eval()
    work = workload(model, torch.randn(16, 1, 4, 4))
    assert linked(work, {"3": work.model[3]}).followers == {}


def test_the_sample_models_are_watched_without_changing_them():
    model = arguments("torch", "packed_lstm")["model"].eval()
    packed = arguments("torch", "packed_lstm")["example_inputs"]
    before = model(*packed)["last"]
    work = backends.of(model).bind(
        model, None, packed, mode="inference", loss=None, targets=None, optimizer=None, seed=0
    )
    calibrate(work, {"fc": work.model.fc})
    assert not work.model.fc._forward_pre_hooks
    assert torch.equal(work.model(*packed)["last"], before)
