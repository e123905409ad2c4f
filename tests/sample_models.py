"""Small models in both frameworks, and what they are called with. Frameworks are imported where they are needed."""

from __future__ import annotations

from typing import Any


def torch_models() -> dict[str, Any]:
    """name -> (module, example_inputs): convolutional, recurrent, attention; odd inputs, outputs and weights."""
    import torch
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    torch.manual_seed(0)

    class Cnn(nn.Module):
        """Uses one ReLU twice, as the reference CNN does."""

        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.pool = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2)
            self.norm = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8 * 5 * 5, 10)

        def forward(self, x):
            x = self.pool(self.relu(self.norm(self.conv(x))))
            return self.fc(self.relu(x.reshape(x.size(0), -1)))

    class Residual(nn.Module):
        """A small ResNet: batch norms, residuals, a strided shortcut."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.first, self.second = self._block(8, 8, 1), self._block(8, 16, 2)
            self.shortcut = nn.Conv2d(8, 16, 1, 2)
            self.fc = nn.Linear(16, 10)

        @staticmethod
        def _block(channels, out, stride):
            return nn.Sequential(
                nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(),
                nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out),
            )  # fmt: skip

        def forward(self, x):
            x = self.stem(x)
            x = torch.relu(x + self.first(x))
            x = torch.relu(self.shortcut(x) + self.second(x))
            return self.fc(x.mean((2, 3)))

    class PackedLstm(nn.Module):
        """Takes a packed sequence; bidirectional, two layers."""

        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True)
            self.fc = nn.Linear(16, 3)

        def forward(self, packed):
            out, (h, _) = self.lstm(packed)
            padded, lengths = pad_packed_sequence(out)
            return {"last": self.fc(torch.cat([h[-2], h[-1]], -1)), "all": padded, "lengths": lengths}

    class Tied(nn.Module):
        """Keyword inputs, tied embedding and output, dropout."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.body = nn.GRU(16, 16, batch_first=True)
            self.drop = nn.Dropout(0.2)
            self.out = nn.Linear(16, 50, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids, mask=None):
            hidden, _ = self.body(self.drop(self.embed(ids)))
            logits = self.out(hidden)
            return logits if mask is None else logits * mask.unsqueeze(-1)

    class Nested(nn.Module):
        """One positional dict in, a nested tuple out."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, batch):
            y = self.fc(batch["x"]) + batch["more"][0]
            return y, [y.sum(-1), {"y": y}]

    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    sequences = torch.randn(7, 4, 6)
    ids = torch.randint(0, 50, (4, 9))
    return {
        "cnn": (Cnn(), (torch.randn(4, 1, 12, 12),)),
        "resnet": (Residual(), (torch.randn(2, 3, 16, 16),)),
        "transformer": (encoder, (torch.randn(2, 5, 16),)),
        "packed_lstm": (PackedLstm(), (pack_padded_sequence(sequences, torch.tensor([7, 5, 5, 2])),)),
        "tied": (Tied(), {"ids": ids, "mask": torch.ones(4, 9)}),
        "nested": (Nested(), {"x": torch.randn(3, 4), "more": [torch.randn(4)]}),
    }


def jax_models() -> dict[str, Any]:
    """name -> keyword arguments of optimize: nnx, linen, functions with and without parameters."""
    import jax
    import jax.numpy as jnp
    from flax import linen, nnx

    class Cnn(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 8, (3, 3), padding="VALID", rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(200, 10, rngs=rngs)])

        def __call__(self, x):
            x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
            return self.layers[0](self.drop(x.reshape(x.shape[0], -1)))

    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs))
            self.fc = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, batch):
            return {"last": self.fc(self.rnn(batch["x"])[:, -1])}

    class Dense(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.relu(linen.Dense(8)(x)))

    def mlp(params, x, scale):
        return jnp.tanh(x @ params["w"]) * scale

    keys = jax.random.split(jax.random.key(0), 4)
    weights = {"w": jax.random.normal(keys[3], (6, 3))}
    x = jax.random.normal(keys[0], (4, 6))
    dense = Dense()
    return {
        "nnx_cnn": {"model": Cnn(nnx.Rngs(0)), "example_inputs": (jax.random.normal(keys[1], (4, 12, 12, 1)),)},
        "nnx_lstm": {"model": Recurrent(nnx.Rngs(1)), "example_inputs": {"x": jax.random.normal(keys[2], (4, 5, 6))}},
        "linen": {"model": dense, "params": dense.init(keys[3], x), "example_inputs": (x,)},
        "function": {"model": mlp, "params": weights, "example_inputs": (x, jnp.float32(2.0))},
        "plain": {"model": lambda a, b: {"product": a @ b.T}, "example_inputs": {"a": x, "b": x}},
    }  # fmt: skip


def arguments(framework: str, name: str) -> dict[str, Any]:
    """The arguments of `optimize` for one of the models."""
    if framework == "jax":
        return jax_models()[name]
    model, example_inputs = torch_models()[name]
    return {"model": model, "example_inputs": example_inputs}


def training(framework: str) -> dict[str, Any]:
    """A small classification task as arguments of `optimize(mode="training")`."""
    if framework == "torch":
        import torch
        from torch import nn

        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        return {
            "model": model,
            "example_inputs": (torch.randn(16, 1, 8, 8),),
            "targets": torch.arange(16) % 3,
            "loss": nn.CrossEntropyLoss(),
            "optimizer": torch.optim.Adam(model.parameters(), lr=1e-2),
        }
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.fc = nnx.Linear(144, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x)))
            return self.fc(x.reshape(x.shape[0], -1))

    def loss(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return {
        "model": Net(nnx.Rngs(0)),
        "example_inputs": (jax.random.normal(jax.random.key(1), (16, 8, 8, 1)),),
        "targets": jnp.arange(16) % 3,
        "loss": loss,
        "optimizer": optax.adam(1e-2),
    }
