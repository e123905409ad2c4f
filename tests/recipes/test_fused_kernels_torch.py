"""The recipe `fused_kernels` in PyTorch: whole models, in training, behind other recipes and compiled."""

import pytest

pytest.importorskip("torch")

import torch
from fused_torch import TOLERANCE, assert_same, kernels_in, reasons, small, swapped, workload
from torch import nn

from perfkit import reference
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit._workload import Inputs, Training, Workload
from perfkit.backends.torch_backend import BACKEND


def test_what_the_library_would_run_is_not_swapped(monkeypatch):
    monkeypatch.setattr("perfkit.kernels._native.find_compiler", lambda: None)
    from perfkit.kernels import _op

    _op._choose.cache_clear()
    _, effect = swapped(nn.LSTM(6, 9), torch.randn(3, 2, 6))
    _op._choose.cache_clear()
    assert not effect.touched
    assert "library" in reasons(effect)["LSTM"]
    assert "compiler" in reasons(effect)["LSTM"]


def test_without_inputs_everything_that_could_be_is_swapped():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    _, effect = swapped(model, None)
    assert effect.touched == ("0", "2")
    assert "not known" in effect.notes[0]
    _, effect = swapped(nn.GRU(2, 3), None)
    assert effect.touched == ("GRU",)


@pytest.mark.parametrize("name", ["cnn", "cnn2", "lstm", "rnn", "text_lstm"])
def test_training_the_reference_models_gives_the_same_gradients_and_losses(name):
    task, inputs, targets = small(name)
    result, effect = swapped(task.model, inputs, trains=True)
    assert effect.touched
    assert all("is the library's here" in item.reason for item in effect.skipped)
    gradients = []
    for each in (task.model.train(), result):
        each.zero_grad()
        loss = task.loss(each(*inputs), targets)
        loss.backward()
        gradients.append((loss, [parameter.grad for parameter in each.parameters()]))
    assert_same(gradients[1][0], gradients[0][0])
    for new, old in zip(gradients[1][1], gradients[0][1], strict=True):
        # sums over the batch, the steps and the pixels: relative to the largest entry
        torch.testing.assert_close(new, old, rtol=0, atol=float(old.abs().max()) * 4 * TOLERANCE["rtol"])
    optimizer = torch.optim.SGD(task.model.parameters(), 1e-2)  # not Adam, which makes steps of roundings
    work = workload(task.model, inputs, Training(task.loss, targets, optimizer))
    done = apply(chain_of("fused_kernels"), work)
    curves = [BACKEND.losses(each, BACKEND.finish(each), 10, 0) for each in (work, done.works[-1])]
    assert curves[0][-1] != curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=10 * TOLERANCE["rtol"])


CHAINS = [
    ("bf16+fused_kernels", "cnn", ("conv1",)),
    ("bf16+fused_kernels", "lstm", ("lstm",)),
    ("half+fused_kernels", "text_lstm", ("lstm",)),
    ("channels_last+fused_kernels", "cnn", ("conv1",)),
    ("int8+fused_kernels", "lstm", ()),
    ("int8+fused_kernels", "cnn", ("conv1",)),
    ("int8_weight_only+fused_kernels", "cnn", ("conv1",)),
]


@pytest.mark.parametrize(("chain", "name", "touched"), CHAINS)
def test_chains(chain, name, touched):
    """What earlier steps put around a forward stays around it, and layers that they changed stay theirs."""
    _, inputs, _ = small(name)
    model = reference.load(name)[0].eval()
    chain = chain_of(chain)
    done = apply(chain, workload(model, inputs))
    effect = done.steps[-1].effect
    linear = [name for name in effect.touched if isinstance(model.get_submodule(name), nn.Linear)]
    assert tuple(name for name in effect.touched if name not in linear) == touched
    if not touched:
        assert "forward of its own" in effect.skipped[0].reason
    result = done.works[-1].model
    along = sum("by one call with the layer before it" in note for note in effect.notes)
    alone = sum("runs on integers by itself" in item.reason for item in effect.skipped)
    assert kernels_in(result, *inputs).count("cpu") == len(effect.touched) - along + alone
    with torch.no_grad():
        new, old = result(*inputs), model(*inputs)
    assert new.dtype == old.dtype
    assert float((new - old).norm() / old.norm()) < chain.tolerance + TOLERANCE["rtol"]


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_compiled_whole(name):
    _, inputs, _ = small(name)
    model = reference.load(name)[0].eval()
    done = apply(chain_of("fused_kernels+compile(fullgraph=True)"), workload(model, inputs))
    with BACKEND.watching_compiles() as log:
        result = done.works[-1].model(*inputs)
    assert (log().graphs, log().breaks) == (1, ())
    assert not torch._dynamo.config.allow_rnn, "the setting is torch's"
    assert_same(result, model(*inputs))
    other = nn.LSTM(3, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        torch.compile(other, fullgraph=True, backend="eager")(torch.ones(2, 1, 3))


def test_auto_may_try_it():
    from perfkit._search import sensible

    model, inputs = reference.load("lstm")
    chains, left_out = sensible(Workload(BACKEND, model.eval(), Inputs(inputs), "inference", "cpu"))
    assert any("fused_kernels" in str(chain) for chain in chains)
    chains, left_out = sensible(
        Workload(BACKEND, nn.Linear(3, 2).eval(), Inputs((torch.ones(1, 3),)), "inference", "cpu")
    )
    assert "fused_kernels" in [item.recipe for item in left_out]
