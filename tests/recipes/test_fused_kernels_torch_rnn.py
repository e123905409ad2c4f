"""The recipe `fused_kernels` on torch recurrent layers: every form of input, and what is left alone."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from fused_torch import assert_same, kernels_in, reasons, small, swapped, workload
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from perfkit import reference
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit.backends import torch_fused_rnn

RECURRENT = [
    (nn.LSTM, {}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_a_recurrent_layer_in_every_form_of_input(kind, options):
    torch.manual_seed(0)
    model = kind(5, 7, **options).eval()
    directions = model.num_layers * (2 if model.bidirectional else 1)
    padded = torch.randn(4, 6, 5)
    result, effect = swapped(model, padded)
    assert effect.touched == (kind.__name__,)
    assert type(result).__name__ == kind.__name__
    assert isinstance(result, kind)
    packed = pack_sequence([torch.randn(length, 5) for length in (3, 6, 1)], enforce_sorted=False)
    batch = padded.size(0 if model.batch_first else 1)

    def state(*shape):
        states = tuple(torch.randn(directions, *shape, 7) for _ in range(2))
        return states if kind is nn.LSTM else states[0]

    cases = [(padded, None), (padded, state(batch)), (packed, None), (packed, state(3)), (padded[0], None),
             (padded[0], state()), (padded.transpose(0, 1), None)]  # fmt: skip
    with torch.no_grad():
        for given, hx in cases:
            assert kernels_in(result, given, hx) == ["cpu"]
            assert_same(result(given, hx), model(given, hx))
        assert_same(result(padded, hx=state(batch))[0].shape, model(padded)[0].shape)
    wide = copy.deepcopy(result).double()
    assert_same(wide(padded.double())[0], copy.deepcopy(model).double()(padded.double())[0])
    for wrong in (padded[..., :3], padded[None], torch.ones(2, 2, 5, dtype=torch.int64)):
        with pytest.raises((ValueError, RuntimeError)):
            result(wrong)


def test_weights_are_read_at_each_call():
    torch.manual_seed(0)
    model, x = nn.LSTM(5, 7), torch.randn(4, 6, 5)
    result, _ = swapped(model, x)
    other = nn.LSTM(5, 7)
    result.load_state_dict(other.state_dict())
    assert_same(result(x), other(x))
    with torch.no_grad():
        result.weight_hh_l0.zero_()
        other.weight_hh_l0.zero_()
    assert_same(result(x), other(x))
    assert_same(copy.deepcopy(result)(x), other(x))
    third = nn.LSTM(5, 7)
    assert_same(torch.func.functional_call(result, dict(third.named_parameters()), (x,)), third(x))


def test_dropout_between_layers_only_in_training():
    torch.manual_seed(0)
    model, x = nn.LSTM(5, 7, num_layers=2, dropout=0.5), torch.randn(4, 6, 5)
    result, _ = swapped(model, x)
    result.train()
    assert not torch.equal(result(x)[0], result(x)[0])
    assert_same(result.eval()(x), model.eval()(x))


class OwnForward(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(x * 2, hx)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_reasons_why_a_recurrent_layer_stays():
    x = torch.randn(4, 6, 5)
    parametrized = nn.LSTM(5, 7)
    torch.nn.utils.parametrizations.orthogonal(parametrized, "weight_hh_l0")
    cases = {
        OwnForward(5, 7): "forward of its own",
        nn.LSTM(5, 7, proj_size=3): "proj_size=3",
        parametrized: "parametrization",
        nn.LSTM(5, 7).double(): "float64",
    }
    for model, reason in cases.items():
        given = x.double() if "64" in reason else x
        result, effect = swapped(nn.Sequential(model).eval(), given)
        assert reason in reasons(effect)["0"]
        assert_same(result(given), model.eval()(given))


def test_bf16_reaches_the_kernels():
    _, inputs, _ = small("lstm")
    done = apply(chain_of("bf16+fused_kernels"), workload(reference.load("lstm")[0].eval(), inputs))
    seen, run = [], torch_fused_rnn.run

    def noted(*args):
        y, hn, cn = run(*args)
        seen.append(y.dtype)
        return y, hn, cn

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch_fused_rnn, "run", noted)
        done.works[-1].model(*inputs)
    assert seen == [torch.bfloat16]
