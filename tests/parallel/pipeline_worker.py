"""Run by four processes: models in stages against the same models whole, in float64. Rank 0 prints JSON.

In float64 rounding is 1e-16 of a number; what is computed wrongly is off by its own size.
"""

import copy
import functools
import json
import sys
import warnings
from pathlib import Path

import haste
import torch
import torch.distributed as dist
from pipeline_models import MODELS, Looks, models
from pipeline_training import ALL_AXES, CHAINS, MESHES, PAIRS, STEPS, checkpoints, clipped, train, without_weights
from tensor_worker import applied, infer, loss, off
from torch import nn
from torch.distributed.tensor import DTensor
from written_attention import LENGTH, WIDTH, Products

import perfkit
from perfkit.parallel.torch_mesh import mesh_of
from perfkit.parallel.torch_world import join


def refused(chain, model, inputs, **training):
    try:
        applied(chain, model, inputs, **training)
    except perfkit.PerfkitError as error:
        return str(error)
    return "not refused"


def refusals():
    torch.manual_seed(3)
    x, sgd = torch.randn(8, 4), functools.partial(torch.optim.SGD, lr=0.1)

    def model():
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

    def worst(outputs, targets):
        return (outputs - targets).square().max()

    tied = model()
    tied[3].weight = tied[0].weight
    about = {"targets": torch.randn(8, 4), "optimizer": sgd}
    half = "pipeline_parallel(2)+data_parallel"
    return {
        "patterns": refused("pipeline_parallel(2)+tensor_parallel(2, include='1')", model(), (x,)),
        "precision": refused(f"{half}(2, shard=True, precision='bf16')", model(), (x,), loss=loss, **about),
        "offload": refused(f"{half}(2, shard=True, offload=True)", model(), (x,), loss=loss, **about),
        "gpipe": refused("accumulate(2)+pipeline_parallel(4, schedule='gpipe')", model(), (x,), loss=loss, **about),
        "parts": refused("accumulate(4)+pipeline_parallel(4)", model(), (x,), loss=loss, **about),
        "graphs": refused("compile(mode='reduce-overhead')+pipeline_parallel(4)", model(), (x,), loss=loss, **about),
        "odd": refused("pipeline_parallel(4, micro_batches=3)", model(), (x,)),
        "few": refused("pipeline_parallel(4, schedule='1f1b', micro_batches=2)", model(), (x,)),
        "stages": refused("pipeline_parallel(4, stages=6)", model(), (x,)),
        "many": refused("pipeline_parallel(4)", nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (x,)),
        "tied": refused("pipeline_parallel(4)", tied, (x,)),
        "split": refused("pipeline_parallel(4, split_at=('1', '2', '9'))", model(), (x,)),
        "loss": refused("pipeline_parallel(4)", model(), (x,), loss=worst, **about),
        "looks": refused("pipeline_parallel(4)", Looks(), (torch.randn(8, 8),)),
        "scaled": refused("fp16+pipeline_parallel(4)", model(), (x,), loss=loss, **about),
    }


def further():
    """A sum for a loss, places by name, dropout, precision around the model, batches of other sizes."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    x, targets = torch.randn(8, 4), torch.randn(8, 2)
    sgd = functools.partial(torch.optim.SGD, lr=1e-3)

    def total(outputs, targets):
        return (outputs - targets).square().sum()

    chain = "pipeline_parallel(4, split_at=('1', '2', '3'))"
    done = applied(chain, copy.deepcopy(model), (x,), loss=total, targets=targets, optimizer=sgd)
    work = done.works[-1]
    finished = work.backend.finish(work)
    twin = copy.deepcopy(model)
    for module in [*twin.modules(), *work.model.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    sums = [float(finished.train_step((work.inputs, targets))), float(total(twin(x), targets))]
    low = applied("bf16+pipeline_parallel(4)", copy.deepcopy(model), (x,)).works[-1].model.eval()
    alone = applied("bf16", copy.deepcopy(model), (x,)).works[-1].model.eval()
    with torch.no_grad():
        rows = torch.cat([x, x])
        precise = [off(low(rows), alone(rows)), off(alone(rows), model.eval()(rows))]
    return {"sums": sums, "notes": done.steps[0].effect.notes, "precise": precise, "parts": work.spread.parts}


def alike_in_parts():
    """By how much what is not split differs between processes that hold parts of the same layers, with dropout."""
    torch.manual_seed(6)
    pair = nn.Linear(LENGTH * WIDTH, 16), nn.Dropout(0.4), nn.Linear(16, 16)
    model = nn.Sequential(Products(drop=0.3), nn.Flatten(), *pair, nn.LayerNorm(16), nn.Linear(16, 3))
    x, targets = torch.randn(8, LENGTH, WIDTH), torch.randn(8, 3)
    torch.manual_seed(dist.get_rank())  # the group's first process draws for all
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    chain = "pipeline_parallel(2, split_at='5')+tensor_parallel(2)"
    done = applied(chain, model, (x,), loss=loss, targets=targets, optimizer=sgd)
    work = done.works[-1]
    finished = work.backend.finish(work)
    losses = [float(finished.train_step((work.inputs, targets))) for _ in range(3)]
    group = mesh_of(work.layout, work.device)["tensor"].get_group()
    worst = 0.0
    for parameter in work.model.parameters():
        if not isinstance(parameter, DTensor):
            other = parameter.detach().clone()
            dist.broadcast(other, dist.get_global_rank(group, 0), group=group)
            worst = max(worst, off(parameter.detach(), other))
    effect = done.steps[1].effect
    return {"worst": worst, "losses": losses, "parts": work.spread.parts, "touched": effect.touched}


def compiled():
    """Training in stages that are compiled, and without; and how many programs were made in this process."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    x, targets = torch.randn(8, 6).double(), torch.randn(8, 3).double()
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    chain = "pipeline_parallel(2, split_at='2', micro_batches=2)+data_parallel(2)"
    found = []
    for recipe in (chain, f"compile+{chain}"):
        torch._dynamo.utils.counters.clear()
        done = applied(recipe, copy.deepcopy(model), (x,), loss=loss, targets=targets, optimizer=sgd)
        work = done.works[-1]
        finished = work.backend.finish(work)
        losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(STEPS)]
        found.append({"losses": losses, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]})
    inference = infer("compile+pipeline_parallel(2, split_at='2')+tensor_parallel(2)", model, (x,))["off"]
    return {"without": found[0], "with": found[1], "notes": done.steps[1].effect.notes, "inference": inference}


def averaged():
    """Two pipelines that are averaged every other step, against two models that are."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, targets = torch.randn(8, 6).double(), torch.randn(8, 3).double()
    sgd = functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9)
    chain = "pipeline_parallel(2)+local_sgd(2, sync_every=2)"
    work = applied(chain, copy.deepcopy(model), (x,), loss=loss, targets=targets, optimizer=sgd).works[-1]
    finished = work.backend.finish(work)
    losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(4)]
    twins = [(twin, sgd(twin.parameters())) for twin in (copy.deepcopy(model), copy.deepcopy(model))]
    expected = []
    for step in range(4):
        for place, (twin, own) in enumerate(twins):
            own.zero_grad()
            value = loss(twin(x.chunk(2)[place]), targets.chunk(2)[place])
            value.backward()
            own.step()
            if place == dist.get_rank() % 2:
                expected.append(float(value))
        if step % 2:
            with torch.no_grad():
                for one, other in zip(*(twin.parameters() for twin, _ in twins), strict=True):
                    mean = (one + other) / 2
                    one.copy_(mean)
                    other.copy_(mean)
    alone = dict(twins[0][0].named_parameters())
    return {
        "losses": [losses, expected],
        "parameters": max(off(each.detach(), alone[name]) for name, each in work.model.named_parameters()),
    }


def reported():
    """`optimize` from its way in to its report."""
    torch.manual_seed(5)
    model, x = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)), torch.randn(8, 6)
    given = {"targets": torch.randn(8, 3), "loss": nn.functional.mse_loss, "optimizer": torch.optim.SGD}
    chain = "pipeline_parallel(2, split_at='2', micro_batches=2)+data_parallel(2)"
    result = perfkit.optimize(model, chain, example_inputs=(x,), mode="training", **given)
    report = result.report
    part = x.chunk(2)[dist.get_rank() % 2]
    result.model.eval()
    with torch.no_grad():
        same = off(result.model(part), model(part))
    return {"parallel": report.to_dict()["parallel"], "text": str(report), "fidelity": report.fidelity.relative_error,
            "same": same, "isinstance": isinstance(result.model, nn.Sequential)}  # fmt: skip


def main():
    """Everything, by four processes, with a folder for checkpoints; or by eight "all axes"."""
    warnings.simplefilter("ignore")
    haste.begin()
    torch.set_num_threads(1)
    join()
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True)
    told = train(ALL_AXES, *models()["cnn2"], sgd) if sys.argv[1] == "all axes" else every(sgd)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, told)
    if dist.get_rank() == 0:
        print(json.dumps(everywhere))


def every(sgd):
    told = {}
    told["attention"] = {}
    for name in MODELS:
        model, inputs = models()[name]
        told[name] = {"inference": infer("pipeline_parallel(4)", copy.deepcopy(model), inputs)}
        for how, chain in CHAINS.items():
            told[name][how] = train(chain, copy.deepcopy(model), inputs, sgd)
    for name, how in PAIRS:
        model, inputs = models()[name]
        told[name][how] = train(MESHES[how], model, inputs, sgd)
    for how, chain in (("whole", CHAINS["data"]), ("shard", MESHES["shard"])):
        told[f"clipped {how}"] = train(chain, *models()["text_lstm"], clipped)
    told |= {"refusals": refusals(), "further": further(), "reported": reported(), "parts": alike_in_parts()}
    folder = Path(sys.argv[1])
    told |= {"checkpoints": checkpoints(folder / "meshes"), "without weights": without_weights(folder / "without")}
    return told | {"compiled": compiled(), "averaged": averaged()}


if __name__ == "__main__":
    sys.exit(main())
