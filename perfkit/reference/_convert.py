"""The same weights in the other framework.

A model is a list of links, one for each flax parameter, saying which torch parameters hold its values and how their
axes turn. Torch keeps outputs first (out, in), flax inputs first (in, out).
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from ._catalog import MODELS
from ._checks import known, unfit
from ._load import framework_side

if TYPE_CHECKING:
    import torch
    from flax import nnx


@dataclass(frozen=True, kw_only=True)
class Link:
    """One flax parameter and where its values are in torch.

    Attributes:
        flax: dotted path of the parameter.
        torch: names of the parameters whose sum it is. On the way back the first takes all, the others become zero.
        to_flax: turns torch's axes into flax's.
        to_torch: turns them back.
    """

    flax: str
    torch: tuple[str, ...]
    to_flax: Callable[[np.ndarray], np.ndarray] = np.transpose
    to_torch: Callable[[np.ndarray], np.ndarray] = np.transpose


def linear(layer: str) -> list[Link]:
    """(out, in) and (in, out)."""
    return [
        Link(flax=f"{layer}.kernel", torch=(f"{layer}.weight",)),
        Link(flax=f"{layer}.bias", torch=(f"{layer}.bias",)),
    ]


def conv(layer: str) -> list[Link]:
    """(out, in, height, width) and (height, width, in, out)."""
    kernel = Link(
        flax=f"{layer}.kernel",
        torch=(f"{layer}.weight",),
        to_flax=lambda weight: weight.transpose(2, 3, 1, 0),
        to_torch=lambda kernel: kernel.transpose(3, 2, 0, 1),
    )
    return [kernel, Link(flax=f"{layer}.bias", torch=(f"{layer}.bias",))]


def linear_after_pool(layer: str, *, channels: int, side: int) -> list[Link]:
    """A linear layer on a flattened image: (channels, side, side) in torch, (side, side, channels) in flax."""
    kernel = Link(
        flax=f"{layer}.kernel",
        torch=(f"{layer}.weight",),
        to_flax=lambda w: w.reshape(-1, channels, side, side).transpose(2, 3, 1, 0).reshape(channels * side * side, -1),
        to_torch=lambda k: (
            k.reshape(side, side, channels, -1).transpose(3, 2, 0, 1).reshape(-1, channels * side * side)
        ),
    )
    return [kernel, Link(flax=f"{layer}.bias", torch=(f"{layer}.bias",))]


def recurrent(layer: str, torch_layer: str, *, number: int, bias: str) -> list[Link]:
    """One recurrent layer. Torch has a bias for the input and one for the state; flax has one, in the sublayer `bias`.

    An LSTM's gates are side by side in both, in the order input, forget, cell, output.
    """
    return [
        Link(flax=f"{layer}.cell.dense_i.kernel", torch=(f"{torch_layer}.weight_ih_l{number}",)),
        Link(flax=f"{layer}.cell.dense_h.kernel", torch=(f"{torch_layer}.weight_hh_l{number}",)),
        Link(
            flax=f"{layer}.cell.{bias}.bias",
            torch=(f"{torch_layer}.bias_ih_l{number}", f"{torch_layer}.bias_hh_l{number}"),
        ),
    ]


def embedding(layer: str) -> list[Link]:
    """(words, features) in both."""
    return [Link(flax=f"{layer}.embedding", torch=(f"{layer}.weight",), to_flax=np.asarray, to_torch=np.asarray)]


LINKS = {
    "cnn": [*conv("conv1"), *linear_after_pool("fc1", channels=32, side=13), *linear("fc2")],
    "cnn2": [*conv("conv1"), *conv("conv2"), *linear_after_pool("fc1", channels=64, side=7), *linear("fc2")],
    "rnn": [*recurrent("rnn", "rnn", number=0, bias="dense_i"), *linear("fc")],
    "lstm": [*recurrent("lstm", "lstm", number=0, bias="dense_h"), *linear("fc")],
    "text_rnn": [
        *embedding("embedding"),
        *recurrent("rnn1", "rnn", number=0, bias="dense_i"),
        *recurrent("rnn2", "rnn", number=1, bias="dense_i"),
        *linear("fc"),
    ],
    "text_lstm": [
        *embedding("embedding"),
        *recurrent("lstm1", "lstm", number=0, bias="dense_h"),
        *recurrent("lstm2", "lstm", number=1, bias="dense_h"),
        *linear("fc"),
    ],
}


def to_jax(name: str, torch_model: "torch.nn.Module") -> "nnx.Module":
    """Make the flax model with the weights of a torch model.

    Args:
        name: the reference model that `torch_model` is, one of `MODELS`.
        torch_model: its torch form in float32, on any device; it is not changed.

    Returns:
        The flax model in inference mode. Its outputs equal the torch model's to float32 rounding.

    Raises:
        ValueError: An unknown name, or parameters that are not this model's.
        ImportError: A framework is not installed.

    Example:
        >>> torch_model, (x,) = load("lstm")
        >>> to_jax("lstm", torch_model)(x.numpy()).shape
        (64, 1)
    """
    flax_model = _blank(name, "jax")
    given = {key: tensor.detach().cpu().numpy() for key, tensor in torch_model.state_dict().items()}
    expected = {key: tuple(tensor.shape) for key, tensor in _blank(name, "torch").state_dict().items()}
    _check_shapes(name, given, expected)
    for link in LINKS[name]:
        attrgetter(link.flax)(flax_model)[...] = link.to_flax(sum(given[key] for key in link.torch))
    return flax_model


def to_torch(name: str, nnx_model: "nnx.Module") -> "torch.nn.Module":
    """Make the torch model with the weights of a flax model.

    Args:
        name: the reference model that `nnx_model` is, one of `MODELS`.
        nnx_model: its flax form in float32, on any device; it is not changed.

    Returns:
        The torch model in inference mode, on the CPU. Its outputs equal the flax model's to float32 rounding. Of the
        two biases of a recurrent layer the state's is zero.

    Raises:
        ValueError: An unknown name, or parameters that are not this model's.
        ImportError: A framework is not installed.

    Example:
        >>> flax_model, (x,) = load("lstm", framework="jax")
        >>> to_torch("lstm", flax_model).lstm.weight_ih_l0.shape
        torch.Size([200, 10])
    """
    torch_model = _blank(name, "torch")
    given = _flax_parameters(nnx_model)
    _check_shapes(name, given, {path: array.shape for path, array in _flax_parameters(_blank(name, "jax")).items()})
    import torch

    weights = {}
    for link in LINKS[name]:
        first, *others = link.torch
        weights[first] = torch.tensor(link.to_torch(given[link.flax]))
        weights |= {other: torch.zeros_like(weights[first]) for other in others}
    torch_model.load_state_dict(weights)
    return torch_model


def _blank(name: str, framework: str) -> "torch.nn.Module | nnx.Module":
    known(name, MODELS, what="reference model")
    side = framework_side(framework)
    model = side.build(name, seed=0)
    side.set_mode(model, training=False)
    return model


def _flax_parameters(model: "nnx.Module") -> dict[str, np.ndarray]:
    from flax import nnx

    return {".".join(path): np.asarray(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _check_shapes(name: str, given: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    shapes = {key: array.shape for key, array in given.items()}
    if shapes != expected:
        differing = sorted(key for key in shapes | expected if shapes.get(key) != expected.get(key))
        raise unfit(
            f"the model's parameters {', '.join(f'{key} {shapes.get(key)}' for key in differing)}",
            expected=", ".join(f"{key} {expected.get(key)}" for key in differing),
            remedy=f"convert an unchanged {name!r}; quantized, pruned and wrapped models have other parameters",
        )
