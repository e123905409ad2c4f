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
from tensor_worker import applied, cases, infer, loss, off, whole
from torch import nn
from torch.distributed.tensor import DTensor
from written_attention import LENGTH, WIDTH, Causal, Products

import perfkit
from perfkit.backends.torch_surgery import local, tensors_in
from perfkit.parallel import torch_checkpoint
from perfkit.parallel.torch_mesh import mesh_of
from perfkit.parallel.torch_world import join

STEPS = 3
CHAINS = {
    "1f1b": "pipeline_parallel(4)",
    "gpipe": "pipeline_parallel(4, schedule='gpipe', micro_batches=2)",
    "data": "pipeline_parallel(2)+data_parallel(2)",
    "interleaved": "pipeline_parallel(2, schedule='interleaved')+data_parallel(2)",
}
MESHES = {
    "shard": "pipeline_parallel(2)+data_parallel(2, shard=True)",
    "interleaved shard": "pipeline_parallel(2, schedule='interleaved')+data_parallel(2, shard=True)",
    "tensor": "pipeline_parallel(2)+tensor_parallel(2)",
    "accumulate": "accumulate(2)+pipeline_parallel(2)+tensor_parallel(2)",
}
ALL_AXES = "pipeline_parallel(2)+tensor_parallel(2)+data_parallel(2, shard=True)"
PAIRS = (  # weights of layers that are called, weights that are read, and those of neither
    ("cnn2", "shard"),
    ("text_lstm", "shard"),
    ("skips", "shard"),
    ("text_lstm", "interleaved shard"),
    ("cnn2", "tensor"),
    ("transformer", "tensor"),
    ("attention", "tensor"),
    ("text_lstm", "accumulate"),
)
MODELS = ("cnn2", "text_lstm", "transformer", "skips")


class Skips(nn.Module):
    """Values that go past a stage, a weight of no layer's, a change in place, a submodule that looks at values."""

    def __init__(self):
        super().__init__()
        self.scale, self.spare = nn.Parameter(torch.randn(8)), nn.Linear(2, 2)
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), Looks()
        self.last = nn.Linear(8, 5)

    def forward(self, x, by=1.0):
        start = torch.tanh(self.first(x)) * self.scale
        hidden = self.second(start)
        hidden += start * by
        hidden = torch.tanh_(hidden)
        return self.last(self.third(hidden) + start), {"hidden": hidden.mean(1)}


class Looks(nn.Module):
    """Cannot be traced: it is one operation."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x) if x.shape[-1] == 8 and float(x.detach().sum()) < 1e9 else x


def models():
    """name -> (model, inputs), without dropout: each process draws its own."""
    found = cases()
    torch.manual_seed(1)
    found["skips"] = Skips().double(), (torch.randn(4, 8).double(),)
    written = nn.Sequential(Products(), Causal(), nn.Flatten(), nn.Linear(LENGTH * WIDTH, 3))
    found["attention"] = written.double(), (torch.randn(4, LENGTH, WIDTH).double(),)
    for model, _ in found.values():
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
                module.p = module.dropout = 0.0
    return {name: found[name] for name in (*MODELS, "attention")}


def clipped(parameters):
    """SGD that bounds the norm of the whole gradient below what it is."""
    sgd = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)

    def clip(sgd, *_):
        nn.utils.clip_grad_norm_([p for group in sgd.param_groups for p in group["params"]], 0.01)

    sgd.register_step_pre_hook(clip)
    return sgd


def train(chain, model, inputs, optimizer):
    """Losses and parameters of some steps, and those of the whole model in one process."""
    twin = copy.deepcopy(model).train()
    first = twin(*inputs)
    torch.manual_seed(2)
    targets = torch.randn_like(first[0] if isinstance(first, tuple) else first)
    done = applied(chain, model, inputs, loss=loss, targets=targets, optimizer=optimizer)
    work = done.works[-1]
    finished = work.backend.finish(work)
    held = {name: parameter.detach().clone() for name, parameter in work.model.named_parameters()}
    with finished.keeping_state():
        losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(STEPS)]
        own = optimizer(twin.parameters())
        expected = []
        for _ in range(STEPS):
            own.zero_grad()
            value = loss(twin(*inputs), targets)
            value.backward()
            own.step()
            expected.append(float(value))
        rows = work.inputs.args
        work.model.eval()
        with torch.no_grad():
            pairs = zip(tensors_in(work.model(*rows)), tensors_in(twin.eval()(*rows)), strict=True)
            outputs = max(off(*pair) for pair in pairs)
        work.model.train()
        alone = dict(twin.named_parameters())
        worst = max((off(each.detach(), alone[name]) for name, each in work.model.named_parameters()), default=0.0)
    return {
        "losses": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "fell": expected[0] / expected[-1],
        "parameters": worst,
        "outputs": outputs,
        "numbers": [sum(each(p).numel() for p in work.model.parameters()) for each in (local, lambda p: p)],
        "held": sorted(held),
        "restored": max((off(p.detach(), whole(held[name])) for name, p in work.model.named_parameters()), default=0.0),
        "optimized": sum(len(group["params"]) for group in work.training.optimizer.param_groups),
        "spread": [work.spread.parts, work.spread.balance, work.spread.bubble],
        "notes": [note for step in done.steps for note in step.effect.notes],
    }


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


def checkpoints(folder):
    """The next losses where a checkpoint of a sharded pipeline goes on in others, and in itself."""
    model, inputs = models()["text_lstm"]
    targets = torch.ones(4, 1, dtype=torch.float64)
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    chains = (MESHES["shard"], CHAINS["1f1b"], MESHES["tensor"])
    given = {"loss": loss, "targets": targets, "optimizer": adam}
    works = [applied(chain, copy.deepcopy(model), inputs, **given).works[-1] for chain in chains]
    every = [(work, work.backend.finish(work)) for work in works]
    first = every[0][0]
    for _ in range(2):
        every[0][1].train_step((first.inputs, first.training.targets))
    torch_checkpoint.write(folder, every[0][1])
    for _, finished in every[1:]:
        torch_checkpoint.read(folder, finished)
    return [
        float(finished.train_step((work.inputs, work.training.targets))) for work, finished in every for _ in range(2)
    ]


def without_weights(folder):
    """The losses after a checkpoint of a pipeline with two stages without weights: of its writer and its reader."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sigmoid(), nn.Linear(8, 5)).double()
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    given = {"loss": loss, "targets": torch.randn(8, 5).double(), "optimizer": adam}
    inputs, chain = (torch.randn(8, 8).double(),), "pipeline_parallel(4, split_at=('1', '2', '3'))"
    works = [applied(chain, copy.deepcopy(model), inputs, **given).works[-1] for _ in range(2)]
    writer, reader = (work.backend.finish(work) for work in works)
    batch = works[0].inputs, works[0].training.targets
    writer.train_step(batch)
    torch_checkpoint.write(folder, writer)
    torch_checkpoint.read(folder, reader)
    return [float(finished.train_step(batch)) for finished in (writer, reader)]


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
