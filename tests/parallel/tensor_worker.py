"""Run by four processes: models split by tensor_parallel against the same models whole, in float64. Rank 0 prints JSON.

In float64 rounding is 1e-16 of a number; what is computed wrongly is off by its own size.
"""

import copy
import functools
import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from perfkit import backends
from perfkit._chain import chain_of, check
from perfkit._variant import apply
from perfkit.backends.torch_surgery import tensors_in
from perfkit.parallel.gathering import gathered
from perfkit.parallel.torch_world import join
from perfkit.reference.torch_models import CNN2, TextLSTM

BATCH = 4


class Mlp(nn.Module):
    """A pair with dropout in between, and a layer whose outputs four devices cannot share."""

    def __init__(self):
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(12, 32), nn.Dropout(0.4), nn.Linear(32, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc3(torch.tanh(self.fc2(self.drop(nn.functional.gelu(self.fc1(x))))))


class Tangled(nn.Module):
    """Linear layers in a row that are no pairs: read twice, reshaped, normed, tied, or called twice."""

    def __init__(self):
        super().__init__()
        self.read1, self.read2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.shape1, self.shape2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm1, self.norm, self.norm2 = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.tied1, self.tied2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied2.weight = self.tied1.weight
        self.direct = nn.Linear(8, 8)
        self.returned1, self.returned2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        read = torch.relu(self.read1(x))
        x = self.read2(read) + read.mean(-1, keepdim=True)
        shape = self.shape1(x)
        x = self.shape2(shape.view(shape.size(0), 2, 4).transpose(1, 2).reshape(-1, 8))
        x = self.norm2(self.norm(self.norm1(x)))
        x = self.again(torch.relu(self.again(x)))
        x = self.tied2(torch.relu(self.tied1(x)))
        x = self.direct(x) @ self.direct.weight.T
        returned = self.returned1(x)
        return self.returned2(returned), returned


def loss(outputs, targets):
    """The mean square of what comes first, which is the mean of those of parts of the batch."""
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    return (first - targets).square().mean()


def cases():
    """name -> (model, inputs): each with BATCH rows."""
    torch.manual_seed(1)
    ids, lengths = torch.randint(0, 60, (BATCH, 6)), torch.tensor([6, 2, 3, 5])
    models = {
        "mlp": (Mlp(), (torch.randn(BATCH, 12),)),
        "cnn2": (CNN2(), (torch.randn(BATCH, 1, 28, 28),)),
        "text_lstm": (TextLSTM(60, 16, 12), (ids, lengths)),
        "transformer": (
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True),
            (torch.randn(BATCH, 5, 16),),
        ),
        "tangled": (Tangled(), (torch.randn(BATCH, 8),)),
    }
    return {name: (model.double(), tuple(map(doubled, inputs))) for name, (model, inputs) in models.items()}


def doubled(x):
    return x.double() if x.is_floating_point() else x


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def off(found, expected):
    """The largest difference, as a share of the largest number."""
    return float((whole(found) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def applied(chain, model, inputs, **training):
    backend, chain = backends.of(model), chain_of(chain)
    mode = "training" if training else "inference"
    given = {"loss": None, "targets": None, "optimizer": None} | training
    work = gathered(backend.bind(model, None, inputs, mode=mode, seed=0, **given), chain)
    check(chain, work)
    return apply(chain, work)


def infer(chain, model, inputs):
    done = applied(chain, model, inputs)
    work = done.works[-1]
    model.eval()
    with torch.no_grad():
        expected, found = model(*inputs), work.model(*work.inputs.args)
    pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
    effect = done.steps[0].effect
    return {
        "off": max(off(*pair) for pair in pairs),
        "touched": effect.touched,
        "notes": effect.notes,
        "skipped": {item.name: item.reason for item in effect.skipped},
        "parts": work.spread.parts,
        "bytes": [work.backend.size(work)[0], work.backend.size(work.replace(model=model))[0]],
        "parameters": [work.backend.size(work)[1], work.backend.size(work.replace(model=model))[1]],
        "same": type(work.model).__mro__[1] is type(model) or type(work.model) is type(model),
    }


def train(chain, model, inputs, draws):
    """Gradients of one step and losses of three.

    Args:
        draws: whether dropout stays in; the whole model draws the random numbers of rank 0.
    """
    rank = dist.get_rank()
    for module in model.modules():
        if not draws and isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.p = module.dropout = 0.0
    twin = copy.deepcopy(model).train()
    first = twin(*inputs)
    torch.manual_seed(2)
    targets = torch.randn_like(first[0] if isinstance(first, tuple) else first)
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=True)
    work = applied(chain, model, inputs, loss=loss, targets=targets, optimizer=sgd).works[-1]
    torch.manual_seed(3)
    loss(twin(*inputs), targets).backward()
    torch.manual_seed(3 + rank)
    loss(work.model(*work.inputs.args), work.training.targets).backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    worst = max(
        off(parameter.grad, gradients[name])
        for name, parameter in work.model.named_parameters()
        if gradients[name] is not None
    )
    finished = work.backend.finish(work)
    held = {name: whole(parameter.detach()).clone() for name, parameter in work.model.named_parameters()}
    torch.manual_seed(4 + rank)
    with finished.keeping_state():
        losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(3)]
    torch.manual_seed(4)
    own = sgd(twin.parameters())
    expected = []
    for _ in range(3):
        own.zero_grad()
        value = loss(twin(*inputs), targets)
        value.backward()
        own.step()
        expected.append(float(value))
    return {
        "gradients": worst,
        "losses": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "fell": expected[0] / expected[-1],
        "restored": max(off(parameter.detach(), held[name]) for name, parameter in work.model.named_parameters()),
        "parts": work.spread.parts,
        "parameters": len(list(work.model.parameters())),
        "held": sum(len(group["params"]) for group in work.training.optimizer.param_groups),
    }


def averaged(model, inputs):
    """Parameters after three steps of pairs that are averaged at every step, against those of the whole model.

    SGD is linear in its gradients, so that averages of parameters are what averages of gradients lead to.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin, targets = copy.deepcopy(model).train(), torch.linspace(-1, 1, BATCH * 3).view(BATCH, 3).double()
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    chain = "local_sgd(2, sync_every=1)+tensor_parallel(2)"
    work = applied(chain, model, inputs, loss=loss, targets=targets, optimizer=sgd).works[-1]
    finished, own = work.backend.finish(work), sgd(twin.parameters())
    for _ in range(3):
        finished.train_step((work.inputs, work.training.targets))
        own.zero_grad()
        loss(twin(*inputs), targets).backward()
        own.step()
    expected = dict(twin.named_parameters())
    moved = max(off(expected[name].detach(), value) for name, value in model.named_parameters())
    found = {name: off(value.detach(), expected[name]) for name, value in work.model.named_parameters()}
    return {"off": max(found.values()), "moved": moved, "parts": work.spread.parts}


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join()
    told = {}
    for name, (model, inputs) in cases().items():
        told[name] = {"inference": infer("tensor_parallel(4)", copy.deepcopy(model), inputs)}
        told[name]["training"] = train("tensor_parallel(4)", copy.deepcopy(model), inputs, draws=True)
        both = "data_parallel(2, shard=True)+tensor_parallel(2)"
        told[name]["both"] = train(both, copy.deepcopy(model), inputs, draws=False)
    told["mlp"]["averaged"] = averaged(*cases()["mlp"])
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, told)
    if dist.get_rank() == 0:
        print(json.dumps(everywhere))


if __name__ == "__main__":
    sys.exit(main())
