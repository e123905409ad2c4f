"""A process in which torch models take large tensors, with and without `keep_memory`; prints what it saw, as JSON."""

import copy
import ctypes
import gc
import json
import sys
import threading

import haste
import torch
from torch import nn

import perfkit
from perfkit.measure import kept_memory

MIB = 1 << 20
NO_HUGE_PAGES = 41
"""Of prctl: each of them would count as one page."""
X = torch.ones(1)


class Large(nn.Module):
    """Takes `mib` twice, and as much again where it is trained."""

    def __init__(self, mib):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.mib = mib
        self.fails = False

    def forward(self, x):
        found = (self.weight * torch.ones(self.mib << 18)).mul(2)
        if self.fails:
            raise KeyError("of the model's own")
        return (found + x).mean()


def counted(call):
    """MiB that a call takes anew, once another one has been made."""
    call()
    before = kept_memory.touched()
    call()
    return round((kept_memory.touched() - before) / MIB)


def calling(model):
    def call():
        with torch.no_grad():
            return model(X)

    return lambda: counted(call)


def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def training():
    model = Large(40)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    given = {"targets": torch.zeros(()), "loss": nn.functional.mse_loss, "optimizer": optimizer}
    result = perfkit.optimize(model, "keep_memory", mode="training", example_inputs=(X,), **given)
    plain = perfkit.optimize(model, "nothing", mode="training", example_inputs=(X,), **given)
    batch = (X,), given["targets"]
    return [counted(lambda side=side: side.train_step(batch)) for side in (result, plain, result, plain)]


def main():
    ctypes.CDLL(None).prctl(NO_HUGE_PAGES, 1, 0, 0, 0)
    haste.begin()
    original = Large(40).eval()
    plain = calling(original)
    found = {"before": plain()}
    result = perfkit.optimize(original, "keep_memory", example_inputs=(X,))
    kept, twin = calling(result.model), calling(copy.deepcopy(result.model))
    found["notes"], found["report"] = result.report.steps[0].effect.notes, result.report.notes
    found["in turns"] = [(kept(), plain()) for _ in range(3)]
    found["in a thread"] = in_a_thread(kept), in_a_thread(plain)
    found["twin"], found["part of another"] = twin(), calling(nn.Sequential(result.model))()
    found["is"] = isinstance(result.model, Large), result.model.state_dict().keys() == original.state_dict().keys()
    around = calling(torch.compile(result.model, backend="eager"))
    found["compiled around"] = around(), plain()
    found["exported"] = calling(torch.export.export(result.model, (X,)).module())()
    result.model.fails = True
    try:
        result.model(X)
    except KeyError:
        result.model.fails = False
    found["after raising"] = kept(), plain()
    held = kept_memory.held_bytes()
    other = perfkit.apply(Large(36), "keep_memory", example_inputs=(X,))
    found["another"], found["shared"] = calling(other.model)(), kept_memory.held_bytes() <= 1.5 * held
    little = perfkit.optimize(Large(1), "keep_memory", example_inputs=(X,))
    found["nothing to keep"] = little.report.steps[0].effect.notes
    found["training"], found["after training"] = training(), (kept(), plain())
    del result, other, kept, twin, around
    torch.compiler.reset()
    gc.collect()
    found["held"], found["then"] = kept_memory.held_bytes(), plain()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
