"""A process in which torch models take large tensors, with and without `keep_memory`; prints what it saw, as JSON."""

import copy
import ctypes
import gc
import json
import sys

import haste
import torch
from torch import nn

import perfkit
from perfkit.measure import kept_memory, kept_region, memory

MIB = 1 << 20
NO_HUGE_PAGES = 41
"""Of prctl: each of them would count as one page."""


class Large(nn.Module):
    """Takes `mib` twice, and as much again where it is trained."""

    def __init__(self, mib):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.mib = mib
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise KeyError("of the model's own")
        return ((self.weight * torch.ones(self.mib << 18)).mul(2) + x).mean()


def counted(call):
    """The least that one of a few calls takes anew: where small pieces have cut the room, the next ones get more."""
    taken = []
    for _ in range(5):
        before = kept_memory.touched()
        call()
        taken.append((kept_memory.touched() - before) // MIB)
    return min(taken)


def calling(model):
    def call():
        with torch.no_grad():
            return model(X)

    return lambda: counted(call)


X = torch.ones(1)


def training():
    model = Large(40)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    given = {"targets": torch.zeros(()), "loss": nn.functional.mse_loss, "optimizer": optimizer}
    result = perfkit.optimize(model, "keep_memory", mode="training", example_inputs=(X,), **given)
    plain = perfkit.optimize(model, "nothing", mode="training", example_inputs=(X,), **given)
    batch = (X,), given["targets"]
    sides = [(result, plain)[number % 2] for number in range(6)]
    return [counted(lambda side=side: side.train_step(batch)) for side in sides][-2:]


def main():
    ctypes.CDLL(None).prctl(NO_HUGE_PAGES, 1, 0, 0, 0)
    haste.begin()
    original = Large(40).eval()
    plain = calling(original)
    found = {"before": plain()}
    result = perfkit.optimize(original, "keep_memory", example_inputs=(X,))
    kept, twin = calling(result.model), calling(copy.deepcopy(result.model))
    found["notes"] = result.report.steps[0].effect.notes + result.report.notes
    found["in turns"] = [(kept(), plain()) for _ in range(3)]
    found["twin"], found["part of another"] = twin(), calling(nn.Sequential(result.model))()
    found["is"] = isinstance(result.model, Large), result.model.state_dict().keys() == original.state_dict().keys()
    around = calling(torch.compile(result.model, backend="eager"))
    found["compiled around"] = [around() for _ in range(3)][-1], plain()
    exported = torch.export.export(result.model, (X,)).module()
    found["exported"] = calling(exported)()
    result.model.fails = True
    try:
        result.model(X)
    except KeyError:
        result.model.fails = False
    found["after raising"] = kept(), plain()
    room = kept_region.size()
    other = perfkit.apply(Large(36), "keep_memory(100)", example_inputs=(X,))
    found["another"], found["room for both"] = calling(other.model)(), kept_region.size() == room
    found["nothing to keep"] = (
        perfkit.optimize(Large(1), "keep_memory", example_inputs=(X,)).report.steps[0].effect.notes
    )
    found["training"], found["after training"] = training(), (kept(), plain())
    before = memory.resident_bytes()
    del result, other, kept, twin, exported, around
    torch.compiler.reset()
    gc.collect()
    found["freed"] = (before - memory.resident_bytes()) // MIB
    found["then"] = plain()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
