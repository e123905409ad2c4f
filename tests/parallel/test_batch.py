"""Which part of a whole batch is whose."""

from types import SimpleNamespace

import pytest

from perfkit._chain import Chain, chain_of
from perfkit.parallel import batch
from perfkit.parallel.layout import Layout

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("axes", [("pipeline", "data", "tensor"), ("data", "tensor"), ("pipeline", "data"), ("data",)])
def test_places_are_those_of_torchs_mesh(axes):
    """`init_device_mesh` lays ranks out as `arange` does."""
    mesh = Layout(axes, (2, 3, 2)[: len(axes)])
    ranks = torch.arange(torch.tensor(mesh.sizes).prod()).reshape(mesh.sizes)
    for rank in ranks.flatten():
        found = [mesh.place(axis, int(rank)) for axis in axes]
        assert found == (ranks == rank).nonzero()[0].tolist()
    assert mesh.place("elsewhere", 5) == 0


def dealt(monkeypatch, recipe, whole, framework="torch"):
    """What each of two processes takes of a batch."""
    parts = []
    for rank in (0, 1):
        here = SimpleNamespace(rank=rank, size=2, devices=2)
        monkeypatch.setattr(batch.world, "of", lambda framework, here=here: here)
        parts.append(batch.dealer((recipe and chain_of(recipe)) or Chain(()), framework)(whole))
    return parts


def test_each_takes_its_part_of_inputs_and_targets(monkeypatch):
    images, targets = torch.arange(12.0).reshape(4, 3), torch.arange(4)
    first, second = dealt(monkeypatch, "data_parallel", ((images,), targets))
    assert torch.equal(torch.cat([first[0][0], second[0][0]]), images)
    assert (first[1].tolist(), second[1].tolist()) == ([0, 1], [2, 3])


def test_sequences_are_shared_along_their_batch_and_not_along_time(monkeypatch):
    sequences, targets = torch.arange(24.0).reshape(6, 4, 1), torch.arange(4)
    first, second = dealt(monkeypatch, "data_parallel(batch_dim=1)", ((sequences,), targets))
    assert first[0][0].shape == (6, 2, 1)
    assert torch.equal(torch.cat([first[0][0], second[0][0]], 1), sequences)
    assert (first[1].tolist(), second[1].tolist()) == ([0, 1], [2, 3])


@pytest.mark.parametrize(("recipe", "framework"), [(None, "torch"), ("bf16", "torch"), ("data_parallel", "jax")])
def test_others_take_the_whole(monkeypatch, recipe, framework):
    whole = ((torch.zeros(4),), torch.zeros(4))
    assert all(part is whole for part in dealt(monkeypatch, recipe, whole, framework))
