"""What two processes find of data_parallel: run by test_torch_data.py, told as JSON by rank 0."""

import json
import sys

import haste
import torch
import torch.distributed as dist
from torch import nn

import perfkit
from perfkit import reference
from perfkit.parallel import torch_world, world

STEPS = 5


class Block(nn.Module):
    """A transformer block, with a parameter that no loss uses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.spare = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).mean(1)


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def task(name):
    if name in reference.MODELS:
        found = reference.task(name, framework="torch", batch_size=8)
        fields = ("model", "example_inputs", "targets", "loss", "optimizer")
        return {field: getattr(found, field) for field in fields}
    torch.manual_seed(0)
    model, x = (Block(), torch.randn(8, 5, 32)) if name == "block" else (Shared(), torch.randn(8, 8))
    targets = torch.randn(8, 32 if name == "block" else 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return {"model": model, "example_inputs": (x,), "targets": targets, "loss": nn.MSELoss(), "optimizer": optimizer}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compared(name, recipe):
    """Losses and parameters of some steps, of one process on the whole batch and of both on their parts."""
    given = task(name)
    result = perfkit.optimize(**given, recipe=recipe, mode="training", tolerance=1.0)
    x, targets = given["example_inputs"], given["targets"]
    rank, dim = dist.get_rank(), 1 if name == "lstm" else 0
    part = [tensor.chunk(2, dim if len(tensor) != len(targets) else 0)[rank] for tensor in x]
    losses = [float(result.train_step((tuple(part), targets.chunk(2)[rank]))) for _ in range(STEPS)]
    model, optimizer = given["model"], given["optimizer"]
    optimizer = optimizer if hasattr(optimizer, "step") else optimizer(model.parameters())
    alone = []
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = given["loss"](model(*x), targets)
        loss.backward()
        optimizer.step()
        alone.append(float(loss.detach()))
    old, new = dict(model.named_parameters()), dict(result.model.named_parameters())
    far = max(float((whole(new[name].detach()) - old[name]).norm() / old[name].norm().clamp_min(1e-3)) for name in old)
    outputs = result.model(*part)
    everyone = world.of("torch").gather(losses)
    report, step = result.report, result.report.steps[-1].effect
    return {
        "losses": losses,
        "alone": alone,
        "same_on_both": everyone[0] == everyone[1],
        "parameters_off": far,
        "dtypes": sorted({str(p.dtype) for p in result.model.parameters()} | {str(outputs.dtype)}),
        "isinstance": isinstance(result.model, type(model)),
        "skipped": {item.name: item.reason for item in step.skipped},
        "notes": step.notes,
        "report": report.to_dict()["parallel"],
        "throughput": report.after.throughput.value,
        "latency_ms": report.after.latency.median_ms,
        "text": str(report),
    }


def threads_of(recipe):
    """How many threads compute the loss in a step of both processes, and how many torch is set to after it."""
    seen = []

    def loss(outputs, targets):
        seen.append(torch.get_num_threads())
        return nn.functional.mse_loss(outputs, targets)

    given = task("shared") | {"loss": loss}
    result = perfkit.optimize(**given, recipe=recipe, mode="training", tolerance=1.0)
    seen.clear()
    rank = dist.get_rank()
    result.train_step(((given["example_inputs"][0].chunk(2)[rank],), given["targets"].chunk(2)[rank]))
    return [*seen, torch.get_num_threads()]


def refused(name, recipe, **changes):
    try:
        perfkit.optimize(**(task(name) | changes), recipe=recipe, mode="training")
    except perfkit.PerfkitError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def main():
    haste.begin(TRAINING_STEPS=STEPS)
    torch.set_num_threads(1)
    torch_world.join()
    rank = dist.get_rank()
    other = nn.Sequential(nn.Linear(8, 8 + rank), nn.Linear(8 + rank, 8))
    odd = torch.randn(7, 8), torch.randn(7, 8)
    found = {
        "cnn2": compared("cnn2", "data_parallel"),
        "text_lstm": compared("text_lstm", "data_parallel(shard=True)"),
        "lstm": compared("lstm", "data_parallel(batch_dim=1, compress=True)"),
        "block": compared("block", "data_parallel(2)"),
        "block sharded": compared("block", "data_parallel(shard=True)"),
        "block bf16": compared("block", "data_parallel(shard=True, precision='bf16')"),
        "block in parts": compared("block", "accumulate(2)+data_parallel"),
        "block sharded in parts": compared("block", "accumulate(2)+data_parallel(shard=True)"),
        "shared": compared("shared", "data_parallel(shard=True)"),
        "threads": threads_of("threads(2)+data_parallel"),
        "threads to choose": refused("shared", "threads+data_parallel"),
        "three": refused("shared", "data_parallel(3)"),
        "odd": refused("shared", "data_parallel", example_inputs=odd[:1], targets=odd[1]),
        "other model": refused("shared", "data_parallel", model=other, optimizer=torch.optim.SGD),
        "other seed": refused("shared", "data_parallel", seed=rank),
    }
    if rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
