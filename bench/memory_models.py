"""A deep convolutional network in both frameworks: 18 layers of convolution, batch norm and ReLU on 32×32 images."""

from __future__ import annotations

from typing import Any

DEPTH, WIDTH, SIDE, CLASSES = 18, 16, 32, 10


def deep_cnn(framework: str, batch_size: int) -> dict[str, Any]:
    """The arguments of `perfkit.optimize(mode="training")`; images of noise, whose labels can be learned by heart."""
    return _in_torch(batch_size) if framework == "torch" else _in_jax(batch_size)


def _in_torch(batch_size: int) -> dict[str, Any]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(DEPTH):
        layers += [nn.Conv2d(WIDTH if index else 3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * WIDTH, CLASSES))
    return {
        "model": model,
        "example_inputs": (torch.randn(batch_size, 3, SIDE, SIDE),),
        "targets": torch.arange(batch_size) % CLASSES,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.02),
    }


def _in_jax(batch_size: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    class Layer(nnx.Module):
        def __init__(self, channels: int, rngs: nnx.Rngs):
            self.conv = nnx.Conv(channels, WIDTH, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.conv(x)))

    class DeepCNN(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([Layer(WIDTH if index else 3, rngs) for index in range(DEPTH)])
            self.fc = nnx.Linear(16 * WIDTH, CLASSES, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            x = nnx.avg_pool(x, (SIDE // 4, SIDE // 4), (SIDE // 4, SIDE // 4))
            return self.fc(x.reshape(x.shape[0], -1))

    def loss(scores, labels):
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    return {
        "model": DeepCNN(nnx.Rngs(0)),
        "example_inputs": (jax.random.normal(jax.random.key(0), (batch_size, SIDE, SIDE, 3)),),
        "targets": jnp.arange(batch_size) % CLASSES,
        "loss": loss,
        "optimizer": optax.sgd(0.02),
    }
