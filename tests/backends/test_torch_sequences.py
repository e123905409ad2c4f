"""Throughput counts samples, whichever dimension of a torch model's inputs they lie along."""

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import perfkit
from perfkit import backends
from perfkit._batch import Samples

pytestmark = pytest.mark.usefixtures("hasty")

TIME, ROWS = 7, 5


class Tagger(nn.Module):
    """An output for each step of each sequence."""

    def __init__(self, **options):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(4, 6, **options), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


class Turning(Tagger):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Packing(Tagger):
    def forward(self, x):
        packed = pack_padded_sequence(x, torch.full((x.shape[1],), TIME - 1))
        return self.fc(pad_packed_sequence(self.rnn(packed)[0])[0])


class Steps(nn.Module):
    """A loop of the caller's own."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state


def attention():
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=8)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Tagger, Samples(ROWS, 1)),
        (lambda: Tagger(batch_first=True), Samples(TIME, 0)),
        (Turning, Samples(TIME, 0)),
        (Packing, Samples(ROWS, 1)),
        (Steps, Samples(ROWS, 1)),
        (attention, Samples(ROWS, 1)),
        (lambda: nn.Linear(4, 3), Samples(TIME, 0)),
    ],
)
def test_samples_of_a_model(model, expected):
    work = backends.of(model := model(), None).bind(
        model,
        None,
        torch.randn(TIME, ROWS, 4),
        mode="inference",
        loss=None,
        targets=None,
        optimizer=None,
        seed=0,
    )
    assert work.samples == expected
    assert not any(part._forward_pre_hooks for part in work.model.modules())


@pytest.mark.parametrize("dim", [0, 1])
def test_throughput_is_of_samples(dim):
    model, x = Tagger(batch_first=dim == 0), torch.randn(TIME, ROWS, 4)
    report = perfkit.optimize(model, "fused_kernels", example_inputs=(x,)).report
    for side in (report.before, report.after):
        assert side.throughput.value == pytest.approx((TIME, ROWS)[dim] / side.latency.median_ms * 1e3)
    assert ("along dimension 1 of the inputs" in report.before.throughput.method) == (dim == 1)


def test_a_sequence_alone_has_no_throughput():
    report = perfkit.optimize(Tagger(), "fused_kernels", example_inputs=(torch.randn(TIME, 4),)).report
    assert "known to be the batch" in report.before.throughput.unavailable


def test_calibration_counts_samples():
    model, given = Tagger(), {"example_inputs": (torch.randn(TIME, ROWS, 4),)}
    with pytest.raises(perfkit.InvalidInputError, match=f"holds {2 * ROWS} sample"):
        perfkit.optimize(model, "int8", calibration=[torch.randn(TIME, ROWS, 4)] * 2, **given)
