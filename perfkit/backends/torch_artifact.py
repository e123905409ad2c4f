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
from perfkit.backends.torch_checks import check_initialized
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import is_composed

PACKED = "PackedSequence"


def weights(model: nn.Module, _params: None) -> dict[str, Tensor]:
    """Parameters and buffers by name.

    Raises:
        InvalidInputError: some of the state is no plain tensor, or has no shape yet.
    """
    check_initialized(model)
    state = model.state_dict()
    for name, held in state.items():
        if not _is_plain(held):
            raise InvalidInputError(
                f"{name} of {type(model).__name__}'s state_dict() is a {_kind(held)}, which a file of plain "
                "tensors cannot hold: save it in your own way, and use perfkit.apply(model, result.recipe, …)"
            )
    return state


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not is_composed(value)
        and value.layout == torch.strided
        and not value.is_quantized
    )


def _kind(value: Any) -> str:
    return (
        f"{type(value).__name__} ({value.layout}, {value.dtype})" if isinstance(value, Tensor) else type(value).__name__
    )


def with_weights(model: nn.Module, params: None, held: Mapping[str, Tensor]) -> tuple[nn.Module, None]:
    """A copy of the model with these weights."""
    model = copied(model)
    model.load_state_dict(dict(held))
    return model, params


def identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory read in the same way, as tied weights are."""
    read = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), read


def form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def one(leaf: Any) -> Tensor | None:
    """A leaf of the inputs as a tensor of a file; None for what is none.

    Raises:
        InvalidInputError: it is a tensor of another kind.
    """
    if isinstance(leaf, Tensor) and not _is_plain(leaf):
        raise InvalidInputError(
            f"the inputs hold a {_kind(leaf)}, which a file of plain tensors cannot hold: let the model take those, or "
            "save result.recipe and use perfkit.apply where it is loaded"
        )
    return leaf if isinstance(leaf, Tensor) else None


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
    there = {name: tensor.detach().cpu().resolve_conj().resolve_neg() for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in there.items()}, path, metadata)


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path)
