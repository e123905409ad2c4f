"""Following units through one run of a torch model.

Layers that own units or weights are looked at as wholes (`torch_layers.py`). What happens between them arrives
here as ATen operations: what only moves elements is applied to their labels too, what works element by element unites
its operands', what works along some dimensions passes on labels that do not vary along those. Any other operation fixes
the units that reach it. Nothing is guessed, and the model need not be traceable.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from perfkit.pruning.torch_units import NONE, Units, compact, spread, varies, vector

_SAME = {
    "clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "empty_like", "zeros_like", "ones_like",
    "full_like", "rand_like", "randn_like", "bernoulli", "bernoulli_", "uniform_", "normal_",
}  # fmt: skip
_FRESH = {"new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}  # of sizes that are given as numbers
_MOVES = {
    "permute", "transpose", "t", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "split_with_sizes",
    "unbind", "chunk", "index_select", "gather", "index", "flip", "roll", "repeat", "narrow", "movedim", "cat", "stack",
    "diagonal", "unfold",
}  # fmt: skip
_RESHAPES = {"view", "_unsafe_view", "reshape"}
_POINTWISE = {"hardswish", "hardswish_", "copy_", "_prelu_kernel"}  # beside those that torch tags as such
_ALONG = {
    "mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "logsumexp", "linalg_vector_norm", "any", "all",
    "_softmax", "_log_softmax", "cumsum",
}  # fmt: skip
_SPATIAL = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
    "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
}  # fmt: skip


class Labels:
    """The labels of the tensors that are alive."""

    def __init__(self, units: Units):
        self.units = units
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, tensor: Any) -> torch.Tensor | None:
        return self._of.get(tensor) if isinstance(tensor, torch.Tensor) else None

    def filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """The labels, or NONE throughout."""
        labels = self.of(tensor)
        return torch.full((), NONE).expand(tensor.shape) if labels is None else labels

    def set(self, tensor: torch.Tensor, labels: torch.Tensor | None) -> None:
        if labels is not None and bool((compact(labels) != NONE).any()):
            assert labels.shape == tensor.shape, "labels have the shape of what they label"
            self._of[tensor] = labels
        else:
            self._of.pop(tensor, None)

    def fix(self, tree: Any, reason: str) -> None:
        """All units in these tensors stay."""
        for tensor in tree_leaves(tree):
            if (labels := self.of(tensor)) is not None:
                self.units.fix(labels, reason)

    def along(self, tensor: torch.Tensor, dim: int, reader: str) -> torch.Tensor | None:
        """The units along a dimension of a layer's input, None where there are none."""
        labels = self.of(tensor)
        if labels is None:
            return None
        units = vector(labels, dim)
        if units is None:
            self.units.fix(labels, f"{reader} reads it in more than one place of a row")
        return units


class Following(TorchDispatchMode):
    """Within it every operation passes labels on."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [(tensor, self.labels.of(tensor)) for tensor in _tensors((args, kwargs))]
        outputs = func(*args, **kwargs)
        if any(labels is not None for _, labels in given):
            name = func._schema.name.partition("::")[2]
            if not self._passed_on(name, func, args, kwargs, outputs):
                self.labels.fix((args, kwargs), f"is used by {name}, through which units are not followed")
        return outputs

    def _passed_on(self, name: str, func: Any, args: tuple, kwargs: dict, outputs: Any) -> bool:
        """Label the outputs; False where the operation is not understood."""
        labels = self.labels
        if name in _SAME:
            labels.set(outputs, labels.of(args[0]))
        elif name in _FRESH:
            pass
        elif name == "native_dropout":
            labels.set(outputs[0], labels.of(args[0]))
        elif name in _RESHAPES:
            labels.set(outputs, labels.filled(args[0]).reshape(outputs.shape))
        elif name in _MOVES:
            return self._moved(name, func, args, kwargs, outputs)
        elif name in _POINTWISE or torch.Tag.pointwise in func.tags:
            return self._pointwise(name, list(_tensors((args, kwargs))), outputs)
        elif name in _ALONG:
            return self._along(func, args, kwargs, outputs)
        elif name in _SPATIAL:
            return self._spatial(_SPATIAL[name], args[0], outputs)
        elif name == "constant_pad_nd":
            return self._padded(outputs, *args)
        elif name in ("mm", "bmm") and len(args) == 2:
            return self._product(*args, outputs)
        elif name == "_pack_padded_sequence":
            return self._packed(args[0], outputs[0])
        else:
            return False
        return True

    def _moved(self, name: str, func: Any, args: tuple, kwargs: dict, outputs: Any) -> bool:
        moved, *others = args
        if any(self.labels.of(tensor) is not None for tensor in _tensors((others, kwargs))):
            return False  # units pick what is taken
        if name in ("index", "gather", "index_select"):
            others = tree_map(lambda item: item.cpu() if isinstance(item, torch.Tensor) else item, others)
        found = func(tree_map(self._filled, moved), *others, **kwargs)
        for output, labels in zip(tree_leaves(outputs), tree_leaves(found), strict=True):
            self.labels.set(output, labels)
        return True

    def _filled(self, tensor: Any) -> Any:
        return self.labels.filled(tensor) if isinstance(tensor, torch.Tensor) else tensor

    def _pointwise(self, name: str, operands: list[torch.Tensor], outputs: Any) -> bool:
        if not isinstance(outputs, torch.Tensor):
            return False
        shape = outputs.shape
        found = [labels.expand(shape) for each in operands if (labels := self.labels.of(each)) is not None]
        varied = [dim for dim in range(len(shape)) if any(varies(labels, dim) for labels in found)]
        for operand in operands:
            full = (1,) * (len(shape) - operand.ndim) + tuple(operand.shape)
            if self.labels.of(operand) is None and any(full[dim] > 1 for dim in varied):
                found.append(torch.full((), NONE).expand(shape))
        self.labels.set(outputs, self.labels.units.unite(found, name))
        return True

    def _along(self, func: Any, args: tuple, kwargs: dict, outputs: Any) -> bool:
        labels = self.labels.of(args[0])
        if labels is None:
            return False
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims) if dims else range(labels.ndim)
        dims = sorted({dim % labels.ndim for dim in dims})
        if any(varies(labels, dim) for dim in dims):
            return False
        for output in _tensors(outputs):
            kept = labels
            if output.shape != labels.shape:
                for dim in reversed(dims):
                    kept = kept.select(dim, 0)
                if output.ndim == labels.ndim:
                    for dim in dims:
                        kept = kept.unsqueeze(dim)
            self.labels.set(output, kept)
        return True

    def _spatial(self, count: int, image: torch.Tensor, outputs: Any) -> bool:
        labels = self.labels.of(image)
        if labels is None:
            return False
        for dim in range(labels.ndim - count, labels.ndim):
            if varies(labels, dim):
                return False
            labels = labels.narrow(dim, 0, 1)
        for output in _tensors(outputs):
            self.labels.set(output, labels.expand(output.shape))
        return True

    def _padded(self, outputs: torch.Tensor, padded: torch.Tensor, pad: list[int], value: float = 0) -> bool:
        labels = self.labels.of(padded)
        if value:
            return False
        for index in range(len(pad) // 2):
            dim, sides = labels.ndim - 1 - index, pad[2 * index : 2 * index + 2]
            if not varies(labels, dim):
                shape = [*labels.shape]
                shape[dim] += sum(sides)
                labels = labels.narrow(dim, 0, 1).expand(shape)
            elif any(sides):
                labels = torch.constant_pad_nd(labels, [0, 0] * index + list(sides), NONE)
        self.labels.set(outputs, labels)
        return True

    def _product(self, left: torch.Tensor, right: torch.Tensor, outputs: torch.Tensor) -> bool:
        """A matrix product that sums over something else than units, such as attention's over time."""
        known = [self.labels.of(left), self.labels.of(right)]
        if all(labels is not None for labels in known):
            return False
        labels, summed = (known[0], -1) if known[0] is not None else (known[1], -2)
        if varies(labels, labels.ndim + summed):
            return False
        self.labels.set(outputs, labels.narrow(summed, 0, 1).expand(outputs.shape))
        return True

    def _packed(self, padded: torch.Tensor, data: torch.Tensor) -> bool:
        units = vector(self.labels.of(padded), -1) if padded.ndim == 3 else None
        if units is None:
            return False
        self.labels.set(data, spread(units, data.shape, 1))
        return True


class Unpacking(TorchFunctionMode):
    """`pad_packed_sequence` as one operation: below it is a copy into a buffer, row by row."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        labels = self.labels.of(args[0]) if getattr(func, "__name__", "") == "_pad_packed_sequence" else None
        units = None if labels is None or labels.ndim != 2 else vector(labels, 1)
        if units is None:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            outputs = func(*args, **(kwargs or {}))
        self.labels.set(outputs[0], spread(units, outputs[0].shape, 2))
        return outputs


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
