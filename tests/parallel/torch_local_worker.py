"""What two processes find of local_sgd: run by test_torch_local.py, told as JSON by rank 0."""

import copy
import json
import shutil
import sys
from pathlib import Path

import haste
import torch
import torch.distributed as dist
from torch import nn
from torch_data_worker import Block

import perfkit
from perfkit import reference
from perfkit._chain import chain_of
from perfkit.backends import backend
from perfkit.parallel import torch_world, world
from perfkit.parallel.gathering import gathered

STEPS, WIDTH = 7, 6
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}
CASES = {
    "every step": ("local_sgd(sync_every=1)", "sgd"),
    "every third": ("local_sgd(sync_every=3)", "adam"),
    "warm-up": ("local_sgd(sync_every=2, warmup_steps=3)", "momentum"),
    "weights": ("local_sgd(sync_every=3, weights=(3, 1))", "sgd"),
    "state": ("local_sgd(sync_every=3, average_state=True)", "adam"),
    "diloco": ("local_sgd(sync_every=3, diloco=True)", "adam"),
    "diloco after warm-up": ("local_sgd(sync_every=2, diloco=True, warmup_steps=2, outer_momentum=0.0)", "sgd"),
}


class Small(nn.Module):
    """Two layers and a running mean."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x):
        self.norm(x @ self.first.weight.detach().t())
        return self.second(self.first(x).tanh())


def given(kind, model=None):
    torch.manual_seed(1)
    model, x, y = model or Small(), torch.randn(8, WIDTH), torch.randn(8, 2)
    about = {"targets": y, "loss": nn.MSELoss(), "optimizer": OPTIMIZERS[kind](model.parameters())}
    return {"model": model, "example_inputs": (x,), **about}


def simulated(recipe, about):
    """The same by one process: both models, one after the other; written from the papers' formulas."""
    (x,), y, shares = about["example_inputs"], about["targets"], recipe.shares(2)
    sides = [copy.deepcopy((about["model"], about["optimizer"])) for _ in range(2)]
    anchors = [p.detach().clone() for p in sides[0][0].parameters()]
    velocity = [torch.zeros_like(anchor) for anchor in anchors]
    losses, since = [], 0

    def mean(tensors):
        return shares[0] * tensors[0] + shares[1] * tensors[1]

    for step in range(STEPS):
        told = []
        for place, (model, optimizer) in enumerate(sides):
            model.train()
            optimizer.zero_grad()
            loss = about["loss"](model(x.chunk(2)[place]), y.chunk(2)[place])
            loss.backward()
            told.append(float(loss.detach()))
        losses.append(told)
        warm = step < recipe.warmup_steps
        if warm:
            for pair in zip(*(model.parameters() for model, _ in sides), strict=True):
                gradient = mean([p.grad for p in pair])
                for p in pair:
                    p.grad = gradient.clone()
        for _, optimizer in sides:
            optimizer.step()
        since = 0 if warm else since + 1
        if warm:
            anchors = [p.detach().clone() for p in sides[0][0].parameters()]
        if since == recipe.sync_every:
            since = 0
            together(sides, recipe, mean, anchors, velocity)
    return losses, sides


@torch.no_grad()
def together(sides, recipe, mean, anchors, velocity):
    for index, pair in enumerate(zip(*(model.parameters() for model, _ in sides), strict=True)):
        new = mean(pair)
        if recipe.diloco:
            change, m = anchors[index] - new, recipe.outer_momentum
            velocity[index] = m * velocity[index] + change
            new = anchors[index] - recipe.outer_lr * (change + m * velocity[index])
            anchors[index] = new.clone()
        for p in pair:
            p.copy_(new)
    for name in ("running_mean", "running_var"):
        pair = [getattr(model.norm, name) for model, _ in sides]
        new = mean(pair)
        for buffer in pair:
            buffer.copy_(new)
    if recipe.average_state:
        states = [list(optimizer.state.values()) for _, optimizer in sides]
        for pair in zip(*states, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                new = mean([state[name] for state in pair])
                for state in pair:
                    state[name].copy_(new)


def applied(recipe, about):
    """The model as the caller gets it, and what the recipe did; nothing is measured."""
    chain = chain_of(recipe)
    work = backend("torch").bind(params=None, mode="training", seed=0, **about)
    work = gathered(work, chain)
    for step in chain:
        assert step.refusal(work) is None
        work, effect = step.torch(work)
    return work.backend.finish(work), effect


def compared(recipe, kind):
    about = given(kind)
    result, effect = applied(recipe, about)
    (x,), y, rank = about["example_inputs"], about["targets"], dist.get_rank()
    batch = (x.chunk(2)[rank],), y.chunk(2)[rank]
    losses = [float(result.train_step(batch)) for _ in range(STEPS)]
    (plain,) = chain_of(recipe)
    expected, sides = simulated(plain, about)
    own = dict(sides[rank][0].state_dict())
    held = result.model.state_dict()
    off = max(float((held[name] - own[name]).double().norm() / own[name].double().norm()) for name in own)
    differ = max(float((a - b).abs().max()) for a, b in zip(*(side[0].parameters() for side in sides), strict=True))
    before_settling = world.of("torch").gather(losses)
    result.rounds.settle()
    ends = world.of("torch").gather([p.tolist() for p in result.model.parameters()])
    return {
        "losses": before_settling,
        "expected": expected,
        "off": max(world.of("torch").gather(off)),
        "differed": differ,
        "settled": ends[0] == ends[1],
        "notes": effect.notes,
    }


def reported():
    """What `optimize` tells of it."""
    result = perfkit.optimize(**given("adam"), recipe="local_sgd(sync_every=2)", mode="training", tolerance=1e9)
    report = result.report
    result.settle()
    return {
        "parallel": report.to_dict()["parallel"],
        "parameters": report.after.parameters,
        "losses": [report.losses.before, report.losses.after],
        "lag": report.fidelity.relative_error,
        "text": str(report),
    }


def as_plain():
    """Parameters after some steps with k = 1, and those of one process on the whole batch."""
    about = given("sgd")
    result, _ = applied("local_sgd(sync_every=1)", about)
    (x,), y, rank = about["example_inputs"], about["targets"], dist.get_rank()
    model, optimizer = about["model"], about["optimizer"]
    model.train()
    for _ in range(STEPS):
        result.train_step(((x.chunk(2)[rank],), y.chunk(2)[rank]))
        optimizer.zero_grad()
        about["loss"](model(x), y).backward()
        optimizer.step()
    held = dict(result.model.named_parameters())
    return max(float((held[name] - p).detach().norm() / p.detach().norm()) for name, p in model.named_parameters())


def unused():
    block = Block()
    about = given("adam", block)
    about |= {"example_inputs": (torch.randn(8, 5, 32),), "targets": torch.randn(8, 32)}
    result, effect = applied("local_sgd(sync_every=2, warmup_steps=1)", about)
    for _ in range(3):
        result.train_step((about["example_inputs"], about["targets"]))
    grown = [p.grad is not None for p in result.model.spare.parameters()]
    return {"skipped": [item.name for item in effect.skipped], "grown": grown}


def resumed(folder):
    """Losses of a training with a checkpoint in the middle of a round, and of those that go on from there."""
    how = {"recipe": "local_sgd(sync_every=4, diloco=True)", "batch_size": 16}
    straight = reference.train("rnn", steps=12, checkpoint=folder / "a", checkpoint_every=6, **how)
    if dist.get_rank() == 0:
        for name in "bc":
            shutil.copytree(folder / "a" / "step-00000006", folder / name / "step-00000006")
    dist.barrier()
    again = reference.train("rnn", steps=12, checkpoint=folder / "b", resume=True, **how)
    plain = reference.train("rnn", steps=8, checkpoint=folder / "c", resume=True, **how | {"recipe": "data_parallel"})
    back = reference.train("rnn", steps=10, checkpoint=folder / "c", resume=True, **how)
    losses = {"straight": straight, "again": again, "plain": plain, "back": back}
    told = {name: trained.losses for name, trained in losses.items()}
    return world.of("torch").gather(told), [straight.value, again.value]


def main():
    haste.begin(TRAINING_STEPS=5)
    torch.set_num_threads(1)
    torch_world.join()
    found = {name: compared(*case) for name, case in CASES.items()}
    found |= {"as plain": as_plain(), "unused": unused(), "reported": reported()}
    found["resumed"] = resumed(Path(sys.argv[1]))
    if dist.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
