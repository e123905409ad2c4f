"""Torch models of many kinds to remove units from, and what silences those units in the original."""

import copy

import torch
from sample_models import torch_models
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from perfkit.backends import backend
from perfkit.recipes.prune import Prune


class Recurrent(nn.Module):
    """A recurrent layer whose sequence and states both reach the outputs, through linear layers only."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(5, 12, **options)
        width = 24 if self.rnn.bidirectional else 12
        self.all, self.last = nn.Linear(width, 3), nn.Linear(width, 2)

    def forward(self, x):
        sequence, states = self.rnn(x)
        h = states[0] if isinstance(states, tuple) else states
        last = torch.cat([h[-2], h[-1]], -1) if self.rnn.bidirectional else h[-1]
        return self.all(sequence), self.last(last)


class Cells(nn.Module):
    """Both states of an LSTM are read, and its layers' sum."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 12, 2)
        self.fc, self.memory = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        _, (h, c) = self.rnn(x)
        return self.fc(h[0] + h[1]) + self.memory(c[0])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Linear(6, 8), nn.LSTM(8, 8, 2, bidirectional=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(torch.tanh(self.embed(x)), lengths)
        padded, lengths = pad_packed_sequence(self.rnn(packed)[0])
        return self.fc(padded), lengths


class Gathered(nn.Module):
    """Picks the last valid step, as the text models do."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(9, 5), nn.GRU(5, 12, 2, batch_first=True), nn.Linear(12, 2)

    def forward(self, ids, lengths):
        hidden, _ = self.rnn(self.embed(ids))
        last = (lengths - 1)[:, None, None].expand(-1, 1, hidden.size(2))
        return self.fc(torch.gather(hidden, 1, last).squeeze(1))


class Dense(nn.Module):
    """Concatenations, a split, padding, a transposed convolution, in-place and functional operations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 3, padding=1)
        self.norm, self.mix = nn.BatchNorm2d(19), nn.Conv2d(19, 6, 1)
        self.up, self.out = nn.ConvTranspose2d(6, 12, 2, 2), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        for layer in (self.a, self.b):
            x = torch.cat([x, F.relu6(layer(x), inplace=True)], 1)
        x = F.pad(self.mix(F.gelu(self.norm(x))), (1, 1, 1, 1))
        return self.out(F.avg_pool2d(F.leaky_relu(self.up(x)), 2))


class Separable(nn.Module):
    """Depthwise convolutions with a multiplier, instance norm, PReLU and a gate per channel."""

    def __init__(self):
        super().__init__()
        self.first, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8)
        self.norm, self.act = nn.InstanceNorm2d(16, affine=True), nn.PReLU(16)
        self.squeeze, self.excite = nn.Linear(16, 6), nn.Linear(6, 16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.act(self.norm(self.depth(self.first(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.fc((x * gate[:, :, None, None]).amax((2, 3)))


class Attended(nn.Module):
    """Recurrent units summed over time with weights of their own, and a residual around a linear layer."""

    def __init__(self):
        super().__init__()
        self.rnn, self.weigh = nn.RNN(5, 12, batch_first=True), nn.Linear(12, 1)
        self.more, self.fc = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x):
        hidden, _ = self.rnn(x)
        shares = torch.softmax(self.weigh(hidden), 1)
        pooled = (shares.transpose(1, 2) @ hidden).squeeze(1)
        return self.fc(pooled + torch.tanh(self.more(pooled)))


class Repeated(nn.Module):
    """One layer is called twice, on what the first call made."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.out = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.out(torch.relu(self.again(torch.relu(self.again(x)))))


class Normed(nn.Module):
    """Channels last, a batch norm over features, unflatten, stack and index."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(24, 2)

    def forward(self, x):
        x = self.norm(self.a(x).movedim(-1, 1)).movedim(1, -1)
        both = torch.stack([x[:, 0], x[:, [1, 2, 3]].amax(1)])
        return self.b(both.transpose(0, 1).flatten(1).unsqueeze(1))


def cases():
    torch.manual_seed(0)
    images, steps, rows = torch.randn(3, 3, 8, 8), torch.randn(7, 4, 5), torch.randn(4, 7, 5)
    known = torch_models()
    ids, lengths = torch.randint(0, 9, (4, 7)), torch.tensor([7, 5, 5, 2])
    return {
        "cnn": (*known["cnn"], {"conv"}),
        "resnet": (*known["resnet"], {"stem", "first.0", "first.3", "shortcut", "second.0", "second.3"}),
        "transformer": (*known["transformer"], {"layers.0.linear1", "layers.1.linear1"}),
        "lstm": (Recurrent(nn.LSTM), (steps,), {"rnn"}),
        "lstm without biases": (Recurrent(nn.LSTM, bias=False), (steps,), {"rnn"}),
        "bidirectional 2-layer gru": (Recurrent(nn.GRU, num_layers=2, bidirectional=True), (steps,), {"rnn"}),
        "bidirectional 2-layer lstm": (
            Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5), (rows,), {"rnn"},
        ),
        "3-layer rnn": (Recurrent(nn.RNN, num_layers=3), (steps,), {"rnn"}),
        "relu rnn, one sequence": (Recurrent(nn.RNN, nonlinearity="relu"), (steps[:, 0],), {"rnn"}),
        "both states": (Cells(), (steps,), {"rnn"}),
        "packed": (Packed(), (torch.randn(7, 4, 6), lengths), {"embed", "rnn"}),
        "gathered": (Gathered(), (ids, lengths), {"rnn"}),
        "concatenations": (Dense(), (images,), {"a", "b", "mix", "up"}),
        "depthwise and gate": (Separable(), (images,), {"first", "depth", "squeeze", "excite"}),
        "pooled over time": (Attended(), (rows,), {"rnn", "more"}),
        "one layer twice": (Repeated(), (rows[0],), {"first", "again"}),
        "moved dimensions": (Normed(), (rows,), {"a"}),
        "1d": (
            nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(24, 3)),
            (torch.randn(2, 3, 8),), {"0"},
        ),
    }  # fmt: skip


def bound(model, example_inputs):
    """A workload on a copy of the model whose parameters and statistics are all different from each other."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.6).mul_(torch.sign(torch.randn_like(tensor)) if tensor.ndim > 1 else 1)
    settings = {"loss": None, "targets": None, "optimizer": None, "seed": 0}
    return backend("torch").bind(model, None, example_inputs, mode="inference", **settings)


def pruned(work, **options):
    return Prune(**options).torch(work.backend.copy(work))


def silenced(original, smaller):
    """The original with those outputs of its layers at zero that are missing in `smaller`.

    Which ones is read off the biases (where there are none, the rows of the recurrent weights), all different.
    """
    silent, parts = copy.deepcopy(original), dict(smaller.named_modules())
    for name, module in silent.named_modules():
        rows = {}
        for key, tensor in module.named_parameters(recurse=False):
            kind, _, end = key.partition("_l") if isinstance(module, nn.RNNBase) else (key, "", "")
            if kind in ("bias", "bias_hh") or (isinstance(module, nn.RNNBase) and not module.bias and "hh" in kind):
                columns = tensor if tensor.ndim == 1 else tensor.abs().amax(1)
                others = getattr(parts[name], key)
                left = others if others.ndim == 1 else None
                rows[end] = ~torch.isin(columns, left) if left is not None else missing_rows(tensor, others)
        with torch.no_grad():
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                end = key.partition("_l")[2] if isinstance(module, nn.RNNBase) else ""
                if end in rows and not key.startswith(("running_var", "num_batches_tracked", "weight_hr")):
                    dim = 1 if getattr(module, "transposed", False) and tensor.ndim > 1 else 0
                    tensor.movedim(dim, 0)[rows[end]] = 0
    return silent


def missing_rows(weight, smaller):
    """Rows of a recurrent weight of which no part is left; a row that lost columns keeps most of its values."""
    return torch.stack([~torch.isin(row, smaller).any() for row in weight])


def outputs(work):
    with torch.no_grad():
        model = copy.deepcopy(work.model).double().eval()
        given = [x.double() if x.is_floating_point() else x for x in work.inputs.args]
        return list(work.backend.leaves(model(*given, **work.inputs.kwargs)))
