"""What the reference models need of PyTorch: making one, feeding it, fitting it, asking it."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._catalog import Card, Kind
from .torch_models import BY_NAME

LOSSES = {
    "images": nn.functional.cross_entropy,
    "sequences": nn.functional.mse_loss,
    "texts": nn.functional.binary_cross_entropy_with_logits,
}


def build(name: str, *, seed: int) -> nn.Module:
    """A new model, in training mode. The caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return BY_NAME[name]()


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Switch between training and inference."""
    model.train(training)


def model_inputs(kind: Kind, arrays: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
    """Rows of a data set, laid out as the models read them."""
    if kind == "images":
        arrays = [arrays[0][:, None]]  # (B, 28, 28) to (B, 1, 28, 28)
    if kind == "sequences":
        arrays = [arrays[0].swapaxes(0, 1)]  # (B, T, F) to (T, B, F)
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def model_targets(array: np.ndarray) -> Tensor:
    """Targets of a data set, as the losses read them."""
    return torch.from_numpy(array)


def optimizer(card: Card) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer of a model's parameters."""
    if card.max_norm is None:
        return functools.partial(torch.optim.Adam, lr=card.learning_rate)
    return functools.partial(clipped_adam, lr=card.learning_rate, max_norm=card.max_norm)


def clipped_adam(parameters: Iterable[nn.Parameter], *, max_norm: float, **options: Any) -> torch.optim.Adam:
    """Adam that first scales the whole gradient down to a 2-norm of `max_norm`; `options` are Adam's own."""
    adam = torch.optim.Adam(parameters, **options)

    def clip(adam: torch.optim.Adam, _args: tuple, _kwargs: dict) -> None:
        every = [parameter for group in adam.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(every, max_norm)

    adam.register_step_pre_hook(clip)
    return adam


def fit(
    model: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    batches: Iterable[tuple[tuple[Tensor, ...], Tensor]],
    report: Callable[[int, Tensor], None],
) -> None:
    """Train `model` in place, one step for each batch; `report` is told each step's number and loss."""
    stepper = optimizer(model.parameters())
    for step, (inputs, targets) in enumerate(batches, start=1):
        stepper.zero_grad()
        value = loss(model(*inputs), targets)
        value.backward()
        stepper.step()
        report(step, value.detach())


def predictor(model: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """A function from the model's inputs to its outputs as float32 numpy, on the device of the model's parameters."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device

    def predict(*inputs: Tensor) -> np.ndarray:
        with torch.no_grad():
            return model(*(each.to(device) for each in inputs)).float().cpu().numpy()

    return predict
