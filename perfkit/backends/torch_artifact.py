"""What a file holds of a torch model: its `state_dict`, and tensors of its inputs, as safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from perfkit._errors import InvalidInputError
from perfkit.backends.torch_bind import device_of
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import is_composed

PACKED = "PackedSequence"


def weights(model: nn.Module, _params: None) -> dict[str, Tensor]:
    """Parameters and buffers by name.

    Raises:
        InvalidInputError: some of the state is no plain tensor.
    """
    state = model.state_dict()
    for name, held in state.items():
        if not isinstance(held, Tensor) or is_composed(held):
            raise InvalidInputError(
                f"{name} of {type(model).__name__}'s state_dict() is a {type(held).__name__}, which a file of plain "
                "tensors cannot hold: save it in your own way, and use perfkit.apply(model, result.recipe, …)"
            )
    return state


def with_weights(model: nn.Module, params: None, held: Mapping[str, Tensor]) -> tuple[nn.Module, None]:
    """A copy of the model with these weights."""
    model = copied(model)
    model.load_state_dict(dict(held))
    return model, params


def identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory, as tied weights are."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def one(leaf: Any) -> Tensor | None:
    """A leaf of the inputs as a tensor of a file; None for what is none."""
    return leaf if isinstance(leaf, Tensor) and not is_composed(leaf) and leaf.layout == torch.strided else None


def parts(value: Any) -> tuple[str, Iterable] | None:
    return (PACKED, value) if isinstance(value, PackedSequence) else None


def made(_kind: str, items: list) -> PackedSequence:
    return PackedSequence(*items)


def beside(model: nn.Module, leaf: Tensor) -> Tensor:
    """A leaf of the inputs where the model lies."""
    return leaf.to(device_of(model, None))


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.numpy()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, path, metadata)


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path)
