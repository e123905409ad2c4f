"""Run by two or four processes: attention split by heads against the same whole, in float64. Rank 0 prints JSON.

attention_worker.py FOLDER     checkpoints go there: four processes write, and two read those and write their own
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import written_attention
from tensor_worker import BATCH, applied, doubled, infer, loss, off, train, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from perfkit import UnsupportedError
from perfkit.backends.torch_surgery import tensors_in
from perfkit.parallel import torch_checkpoint
from perfkit.parallel.torch_world import join

WIDTH, HEADS, LENGTH, KEYS = 16, 4, 5, 7
BOTH = "data_parallel(2, shard=True)+tensor_parallel(2)"


class Attending(nn.Module):
    """One attention behind a norm, whose gradients show those of its inputs; weights that it gives count for the loss.

    Args:
        how: keywords of the call.
        learned: the shape of a mask that is learned.
    """

    def __init__(self, attention, how=None, learned=None):
        super().__init__()
        self.attention, self.norm, self.how = attention, nn.LayerNorm(WIDTH), how or {}
        self.mask = None if learned is None else nn.Parameter(torch.randn(learned))

    def forward(self, query, key=None, value=None):
        query = self.norm(query)
        key = query if key is None else key
        how = self.how if self.mask is None else self.how | {"attn_mask": self.mask}
        y, weights = self.attention(query, key, key if value is None else value, **how)
        return (y, None) if weights is None else (y * (1 + weights.square().mean()), weights)


class Padded(nn.Module):
    """An encoder of padded sequences, which the whole one packs for inference."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(WIDTH))

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


def attention(**options):
    return nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True} | options)


def randomized(model):
    """Biases begin at 0, where a wrong one does not show."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return model


def cases():
    """name -> (model, inputs)."""
    torch.manual_seed(1)
    x, y = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, KEYS, WIDTH)
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [2], [3], [5]])
    keys_padding = torch.arange(KEYS) >= torch.tensor([[7], [1], [4], [6]])
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    each = torch.randn(BATCH * HEADS, LENGTH, LENGTH)
    quietly = {"need_weights": False}
    wide = {"kdim": 6, "vdim": 9}
    alone = {
        "itself": (Attending(attention()), (x,)),
        "quietly": (Attending(attention(), quietly), (x,)),
        "time first": (Attending(attention(batch_first=False)), (x,)),
        "each head's weights": (Attending(attention(), {"average_attn_weights": False}), (x,)),
        "one sequence": (Attending(attention(batch_first=False)), (x[0],)),
        "another": (Attending(attention(), {"key_padding_mask": keys_padding}), (x, y)),
        "three": (Attending(attention(), quietly), (x, y, torch.randn(BATCH, KEYS, WIDTH))),
        "other widths": (
            Attending(attention(**wide), {"attn_mask": torch.rand(LENGTH, KEYS) > 0.7}),
            (x, torch.randn(BATCH, KEYS, 6), torch.randn(BATCH, KEYS, 9)),
        ),
        "no bias": (Attending(attention(bias=False), quietly | {"attn_mask": causal, "is_causal": True}), (x,)),
        "causal": (Attending(attention(), {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding}), (x,)),
        "a mask for each head": (Attending(attention(), quietly | {"attn_mask": each}), (x,)),
        "a learned mask": (Attending(attention(), None, (LENGTH, LENGTH)), (x,)),
        "learned masks": (Attending(attention(), quietly, each.shape), (x,)),
        "dropout": (Attending(attention(dropout=0.3)), (x,)),
        "quiet dropout": (
            Attending(attention(dropout=0.3), quietly | {"attn_mask": causal, "is_causal": True}),
            (x,),
        ),
        "nowhere to look": (Attending(attention(dropout=0.3), quietly | {"attn_mask": causal - 1e400}), (x,)),
    }
    layer = {"batch_first": True, "dropout": 0.2}
    blocks = {
        "encoder layer": (nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **layer), (x,)),
        "encoder": (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, HEADS, 32, norm_first=True, **layer), 2, None, False
            ),
            (x, causal, padding.double() * -1e9),
        ),
        "padded": (Padded(), (x, padding)),
        "decoder layer": (nn.TransformerDecoderLayer(WIDTH, HEADS, 32, **layer), (x, y, causal)),
    }
    by_hand = {name: (model, (x,)) for name, model in written_attention.models().items()}
    for model, _ in alone.values():
        model.how = {name: doubled(value) if torch.is_tensor(value) else value for name, value in model.how.items()}
    return {
        name: (randomized(model).double(), tuple(map(doubled, inputs)))
        for name, (model, inputs) in (alone | blocks | by_hand).items()
    }


BLOCKS = ("encoder layer", "encoder", "padded", "decoder layer")


def left_whole(size):
    """Reasons, by what is the matter."""
    x = torch.randn(BATCH, LENGTH, WIDTH).double()
    models = {
        "own keys": nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True),
        "zeros": nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
        "one head": nn.MultiheadAttention(WIDTH, 1),
        "computed": attention(),
    }
    nn.utils.parametrizations.weight_norm(models["computed"].out_proj)
    found = {
        name: infer(f"tensor_parallel({size})", Then(one).double(), (x,))["skipped"] for name, one in models.items()
    }
    tied = nn.Sequential(nn.Linear(WIDTH, WIDTH), Then(attention())).double()
    tied[1].fc.weight = tied[1].attention.out_proj.weight
    return found | {"tied": infer(f"tensor_parallel({size})", tied, (x,))["skipped"]}


class Then(nn.Module):
    """An attention and a linear layer, which can be split whatever the attention is."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.fc = attention, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(self.attention(x, x, x)[0])


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, foreach=True)


def block():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    return randomized(layer).double(), torch.randn(BATCH, LENGTH, WIDTH).double()


def stepped(chain, steps):
    """A block after some steps under a chain; and the workload."""
    model, x = block()
    work = applied(chain, model, (x,), loss=loss, targets=x.flip(0), optimizer=adam).works[-1]
    finished = work.backend.finish(work)
    for _ in range(steps):
        finished.train_step((work.inputs, work.training.targets))
    return work, finished


def state_of(finished):
    """Weights and moments, whole."""
    trainer = finished.trainer
    found = {name: whole(value.detach()) for name, value in trainer.model.named_parameters()}
    for name, value in trainer.model.named_parameters():
        found[f"{name}.moment"] = whole(trainer.optimizer.state[value]["exp_avg"])
    return found


def written(chain, folder):
    work, finished = stepped(chain, 2)
    torch_checkpoint.write(folder, finished)
    state = state_of(finished)
    if dist.get_rank() == 0:
        torch.save(state, folder.with_suffix(".pt"))
    dist.barrier()
    weight = work.model.self_attn.in_proj_weight
    return {
        "placements": list(map(str, weight.placements)),
        "moment": list(map(str, work.training.optimizer.state[weight]["exp_avg"].placements)),
        "keys": list(work.model.state_dict()) == list(block()[0].state_dict()),
    }


def read(chain, folder):
    _, finished = stepped(chain, 1)
    torch_checkpoint.read(folder, finished)
    expected = torch.load(folder.with_suffix(".pt"))
    found = state_of(finished)
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def handed_out(chain):
    """How far off a whole state is that every process has; and what is said where rank 0 shall hand it out."""
    model, x = block()
    work = applied(chain, copy.deepcopy(model), (x,)).works[-1]
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        dist.broadcast(parameter.data, 0)
    set_model_state_dict(work.model, model.state_dict(), options=StateDictOptions(full_state_dict=True))
    expected = dict(model.named_parameters())
    far = max(off(value.detach(), expected[name].detach()) for name, value in work.model.named_parameters())
    try:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(work.model, model.state_dict(), options=options)
    except UnsupportedError as error:
        return far, str(error)
    return far, "no error"


def clipped(chain):
    """The norm of the gradients of what is split, against that of the whole model."""
    model, x = block()
    work = applied(chain, copy.deepcopy(model), (x,), loss=loss, targets=x.flip(0), optimizer=adam).works[-1]
    loss(work.model(*work.inputs.args), work.training.targets).backward()
    loss(model(x), x.flip(0)).backward()
    split = {name: value for name, value in work.model.named_parameters() if isinstance(value, DTensor)}
    found = whole(nn.utils.get_total_norm([value.grad for value in split.values()]))
    expected = nn.utils.get_total_norm([value.grad for name, value in model.named_parameters() if name in split])
    return abs(float(found / expected) - 1)


def counted(chain, model, inputs):
    """The operations of a forward call and of a backward pass, by kind."""
    target = torch.zeros(1).double()
    work = applied(chain, model, inputs, loss=loss, targets=target, optimizer=adam).works[-1]
    with CommDebugMode() as forward:
        value = loss(work.model(*work.inputs.args), work.training.targets)
    with CommDebugMode() as backward:
        value.backward()
    return [{str(kind): n for kind, n in mode.get_comm_counts().items()} for mode in (forward, backward)]


def compiled(chain, name):
    """Outputs and gradients of a split attention as one graph of torch.compile's, against those without it."""
    model, (x,) = cases()[name]
    work = applied(chain, model, (x,), loss=loss, targets=x.flip(0), optimizer=adam).works[-1]
    expected, *_ = tensors_in(work.model(x))
    loss(expected, x).backward()
    gradients = {name: whole(value.grad) for name, value in work.model.named_parameters()}
    work.model.zero_grad()
    found, *_ = tensors_in(torch.compile(work.model, backend="aot_eager", fullgraph=True)(x))
    loss(found, x).backward()
    after = max(off(value.grad, gradients[name]) for name, value in work.model.named_parameters())
    return max(after, off(found, expected))


def otherwise(chain):
    """What a model gives that goes another way than on the example inputs, against the whole one's."""
    model, (x,) = cases()["otherwise"]
    work = applied(chain, copy.deepcopy(model), (x,)).works[-1]
    model.normed = work.model.normed = True
    with torch.no_grad():
        return off(work.model(x), model(x))


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    join()
    size, folder = dist.get_world_size(), Path(sys.argv[1])
    chain = f"tensor_parallel({size})"
    told = {"cases": {}, "left whole": left_whole(size), "clipped": clipped(chain), "otherwise": otherwise(chain)}
    told["handed out"] = handed_out(chain)
    for name, (model, inputs) in cases().items():
        found = {"inference": infer(chain, copy.deepcopy(model), inputs)}
        found["sent"] = counted(chain, copy.deepcopy(model), inputs)
        found["training"] = train(chain, copy.deepcopy(model), inputs, draws=True)
        if (name in BLOCKS or name in written_attention.models()) and size == 4:
            given = inputs if name != "encoder" else inputs[:2]
            found["both"] = train(BOTH, copy.deepcopy(model), given, draws=False)
        told["cases"][name] = found
    if size == 4:
        told["written"] = written(BOTH, folder / "four")
    else:
        told["compiled"] = {name: compiled(chain, name) for name in ("quietly", "indexed", "beside")}
        told["read"] = read(chain, folder / "four")
        told["written"] = written(chain, folder / "two")
    everywhere = [None] * size
    dist.all_gather_object(everywhere, told)
    if dist.get_rank() == 0:
        print(json.dumps(everywhere))


if __name__ == "__main__":
    sys.exit(main())
