"""Single weights of torch models set to zero: shares, patterns, and masks that hold in training."""

import copy
from functools import partial

import pytest

pytest.importorskip("torch")

import torch
from sample_models import torch_models
from torch import nn

from perfkit import NoEffectError, optimize
from perfkit.backends import backend
from perfkit.backends.torch_training import Trainer
from perfkit.pruning.torch_masks import smallest
from perfkit.recipes.prune import Prune

BACKEND = backend("torch")


def inference(model, example_inputs):
    settings = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
    return BACKEND.bind(model, None, example_inputs, **settings)


def matrices(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("name", ["cnn", "resnet", "packed_lstm"])
def test_the_smallest_of_each_matrix_go(name):
    work = inference(*torch_models()[name])
    new, effect = Prune(structure="unstructured", amount=0.3).torch(BACKEND.copy(work))
    assert effect.simulated
    assert "not get faster" in effect.notes[0]
    for key, weight in matrices(new.model).items():
        old = matrices(work.model)[key]
        gone = weight == 0
        assert int(gone.sum()) == round(0.3 * weight.numel())
        assert old[gone].abs().max() <= old[~gone].abs().min()
        assert torch.equal(weight[~gone], old[~gone])
    for key, tensor in new.model.state_dict().items():
        if tensor.ndim < 2:
            assert torch.equal(tensor, work.model.state_dict()[key])


def test_pattern_along_inputs():
    """At most 2 of any 4 consecutive inputs of an output, and of a convolution at the same place of its window."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3), nn.Linear(3, 2))
    work = inference(model, (torch.randn(2, 8, 4, 4),))
    new, effect = Prune(structure="2:4").torch(BACKEND.copy(work))
    assert effect.touched == ("0", "2")
    assert effect.skipped[0].name == "3"
    assert "no multiple of 4" in effect.skipped[0].reason
    for index in (0, 2):
        weight, old = new.model[index].weight, work.model[index].weight
        groups = weight.movedim(1, -1).unflatten(-1, (-1, 4))
        assert bool(((groups != 0).sum(-1) == 2).all())
        before = old.movedim(1, -1).unflatten(-1, (-1, 4)).abs()
        assert torch.equal(groups.abs().sum(-1), before.topk(2).values.sum(-1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_sparse_kernels_are_used_where_they_exist():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 3)).cuda().to(torch.bfloat16)
    work = inference(model, (torch.randn(64, 256, device="cuda", dtype=torch.bfloat16),))
    new, effect = Prune(structure="2:4").torch(BACKEND.copy(work))
    assert type(new.model[0].weight.data).__name__.startswith("SparseSemiStructuredTensor")
    assert effect.simulated, "three outputs are too few for a kernel"
    assert effect.notes[0].startswith("2: ")


def test_without_sparse_kernels_it_is_simulated():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    _, effect = Prune(structure="2:4").torch(inference(model, (torch.randn(2, 4, 4, 4),)))
    assert effect.simulated
    assert "(there are sparse kernels for linear layers only)" in effect.notes[0]
    assert "(sparse kernels need an NVIDIA GPU)" in effect.notes[1]


def test_one_of_four():
    gone = smallest(torch.tensor([[3.0, 1, 2, 4, 9, 9, 8, 10]]), 0.5, (1, 4))
    assert gone.tolist() == [[True, True, True, False, True, True, True, False]]


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_masks_hold_in_training(structure):
    """Though momentum and weight decay go on pulling at the weights."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(9, 8), torch.randn(9, 4)
    given = {"loss": nn.functional.mse_loss, "targets": y, "seed": 0, "mode": "training"}
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    work = BACKEND.bind(model, None, (x,), optimizer=optimizer, **given)
    before = Trainer(work)
    for _ in range(4):
        before.step(work.inputs, y)
    new, effect = Prune(structure=structure, amount=0.5).torch(work)
    assert effect.simulated
    trainer = Trainer(new)
    losses = [float(trainer.step(new.inputs, y)) for _ in range(50)]
    assert losses[-1] < losses[0]
    saved, zeros = new.model.state_dict(), {}
    for key, weight in matrices(new.model).items():
        zeros[key] = saved[key] == 0
        assert int(zeros[key].sum()) == weight.numel() // 2
    trainer.step(new.inputs, y)
    saved = copy.deepcopy(new.model).state_dict()
    assert all(torch.equal(saved[key] == 0, where) for key, where in zeros.items())


def test_amount_grows_with_the_steps():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(9, 8), torch.randn(9, 4)
    given = {"loss": nn.functional.mse_loss, "targets": y, "seed": 0, "mode": "training"}
    work = BACKEND.bind(model, None, (x,), optimizer=partial(torch.optim.Adam, lr=1e-2), **given)
    new, _ = Prune(structure="unstructured", amount=0.75, schedule=6).torch(work)
    trainer, counts = Trainer(new), []
    for _ in range(8):
        trainer.step(new.inputs, y)
        counts.append(int((new.model.state_dict()["0.weight"] == 0).sum()))
    assert counts == [round(128 * 0.75 * (1 - (1 - min(t / 6, 1)) ** 3)) for t in range(8)]


def test_tied_and_computed_weights_stay():
    model, example_inputs = torch_models()["tied"]
    _, effect = Prune(structure="unstructured").torch(inference(model, example_inputs))
    assert effect.touched == ("body",)
    assert "shares a weight" in effect.skipped[0].reason
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)))
    with pytest.raises(NoEffectError, match="computed from other parameters"):
        optimize(normed, recipe="prune(structure='unstructured')", example_inputs=(torch.randn(2, 4),), strict=True)


def test_without_example_inputs():
    model, _ = torch_models()["cnn"]
    result = optimize(model, recipe="prune(structure='unstructured', include='fc')")
    assert int((result.model.fc.weight == 0).sum()) == 1000
    assert int((result.model.conv.weight == 0).sum()) == 0
