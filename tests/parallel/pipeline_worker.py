"""Run by four processes: models in stages against the same models whole, in float64. Rank 0 prints JSON.

In float64 rounding is 1e-16 of a number; what is computed wrongly is off by its own size.
"""

import copy
import functools
import json
import sys
import warnings

import torch
import torch.distributed as dist
from tensor_worker import applied, cases, infer, loss, off
from torch import nn

import perfkit
from perfkit.parallel.torch_world import join

STEPS = 3
CHAINS = {
    "1f1b": "pipeline_parallel(4)",
    "gpipe": "pipeline_parallel(4, schedule='gpipe', micro_batches=2)",
    "data": "pipeline_parallel(2)+data_parallel(2)",
    "interleaved": "pipeline_parallel(2, schedule='interleaved')+data_parallel(2)",
}
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
    for model, _ in found.values():
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
                module.p = module.dropout = 0.0
    return {name: found[name] for name in MODELS}


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
        whole = dict(twin.named_parameters())
        worst = max((off(each.detach(), whole[name]) for name, each in work.model.named_parameters()), default=0.0)
    return {
        "losses": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "fell": expected[0] / expected[-1],
        "parameters": worst,
        "held": sorted(held),
        "restored": max((off(p.detach(), held[name]) for name, p in work.model.named_parameters()), default=0.0),
        "optimized": sum(len(group["params"]) for group in work.training.optimizer.param_groups),
        "spread": [work.spread.parts, work.spread.balance, work.spread.bubble],
        "notes": done.steps[0].effect.notes,
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
    model = lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))  # noqa: E731
    tied = model()
    tied[3].weight = tied[0].weight
    about = {"targets": torch.randn(8, 4), "optimizer": sgd}
    worst = lambda outputs, targets: (outputs - targets).square().max()  # noqa: E731
    return {
        "tensor": refused("pipeline_parallel(2)+tensor_parallel(2)", model(), (x,)),
        "shard": refused("pipeline_parallel(2)+data_parallel(2, shard=True)", model(), (x,), loss=loss, **about),
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
    total = lambda outputs, targets: (outputs - targets).square().sum()  # noqa: E731
    sgd = functools.partial(torch.optim.SGD, lr=1e-3)
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


def reported():
    """`optimize` from its way in to its report."""
    torch.manual_seed(5)
    model, x = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)), torch.randn(8, 6)
    given = {"targets": torch.randn(8, 3), "loss": nn.functional.mse_loss, "optimizer": torch.optim.SGD}
    chain = "pipeline_parallel(2, split_at='2', micro_batches=2)+data_parallel(2)"
    result = perfkit.optimize(model, chain, example_inputs=(x,), mode="training", budget_s=0.1, **given)
    report = result.report
    part = x.chunk(2)[dist.get_rank() % 2]
    result.model.eval()
    with torch.no_grad():
        same = off(result.model(part), model(part))
    return {"parallel": report.to_dict()["parallel"], "text": str(report), "fidelity": report.fidelity.relative_error,
            "same": same, "isinstance": isinstance(result.model, nn.Sequential)}  # fmt: skip


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join()
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True)
    told = {}
    for name, (model, inputs) in models().items():
        told[name] = {"inference": infer("pipeline_parallel(4)", copy.deepcopy(model), inputs)}
        for how, chain in CHAINS.items():
            told[name][how] = train(chain, copy.deepcopy(model), inputs, sgd)
    told["clipped"] = train(CHAINS["data"], *models()["text_lstm"], clipped)
    told |= {"refusals": refusals(), "further": further(), "reported": reported()}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, told)
    if dist.get_rank() == 0:
        print(json.dumps(everywhere))


if __name__ == "__main__":
    sys.exit(main())
