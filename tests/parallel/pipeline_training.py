"""Training in stages against the same models whole; and from checkpoints."""

import copy
import functools

import torch
from pipeline_models import models
from tensor_worker import applied, loss, off, whole
from torch import nn

from perfkit.backends.torch_surgery import local, tensors_in
from perfkit.parallel import torch_checkpoint

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
