"""Units: what can be removed from a network as one, and what is tied to what.

A *unit* is one output channel of a convolution, one feature of a linear layer or one hidden unit of a recurrent layer,
as a number. Two units that must go together (the two sides of a residual addition) are united; a unit that must stay
is fixed, with the reason. A tensor's *labels* are an int64 tensor of its shape that holds, for each element, the unit
that it is zero without, or `NONE`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

NONE = -1


@dataclass(frozen=True)
class Slice:
    """Along one dimension of one tensor, the unit that each index belongs to.

    Args:
        module, tensor: "encoder.conv1", "weight"; the model itself is "".
        units: (size of the dimension,), int64; `NONE` where the index always stays.
        produced: the entries make the unit, so with them at zero it is zero; else they only read it.
    """

    module: str
    tensor: str
    dim: int
    units: torch.Tensor
    produced: bool


@dataclass(frozen=True)
class Structure:
    """Which units a model has, and where.

    Args:
        axes: layer -> its outputs' units, (outputs,) each; a recurrent layer has one for each of its layers and
            directions.
        slices: everything to cut.
        fixed: unit -> why it stays.
        skipped: layer -> why none of its units can be told.
        count: units are numbers below it.
    """

    axes: dict[str, tuple[torch.Tensor, ...]]
    slices: tuple[Slice, ...]
    fixed: dict[int, str]
    skipped: dict[str, str]
    count: int

    def free(self, units: torch.Tensor) -> torch.Tensor:
        """Which of these may go: bool, of their shape."""
        stays = torch.zeros(self.count + 1, dtype=torch.bool)  # the last entry is that of NONE
        stays[[*self.fixed, NONE]] = True
        return ~stays[units]


@dataclass
class Units:
    """Units while they are found: union-find with reasons."""

    axes: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    slices: dict[tuple[str, str, int], Slice | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=list)
    _fixed: dict[int, str] = field(default_factory=dict)

    def axis(self, layer: str, size: int, count: int = 1) -> tuple[torch.Tensor, ...]:
        """The units of a layer's outputs: new on its first call, the same on each later one."""
        if layer not in self.axes:
            start = len(self._parents)
            self._parents.extend(range(start, start + size * count))
            self.axes[layer] = torch.arange(start, start + size * count).split(size)
        return self.axes[layer]

    def slice(self, module: str, tensor: str, dim: int, units: torch.Tensor | None, produced: bool = False) -> None:
        """What is known of one dimension of a tensor; what another call of its layer says of it must agree."""
        key = module, tensor, dim
        if key not in self.slices:
            self.slices[key] = None if units is None else Slice(module, tensor, dim, units, produced)
            return
        known = self.slices[key]
        said = [each for each in (known and known.units, units) if each is not None]
        if len(said) == 2:
            self.unite(said, "another call of the layer")
        elif said:
            self.fix(said[0], f"meets values of fixed size in another call of {module}")

    def unite(self, labels: list[torch.Tensor], where: str) -> torch.Tensor:
        """Labels of one shape belong together, element by element; returns them as one.

        A unit that is united with `NONE` has to stay.
        """
        shape = labels[0].shape
        labels = [compact(*labels[index:], *labels[:index]) for index in range(len(labels))]
        for other in labels[1:]:
            pairs = torch.stack([labels[0], other]).reshape(2, -1)
            for first, second in torch.unique(pairs, dim=1).T.tolist():
                if NONE not in (first, second):
                    self._join(first, second)
                elif first != second:
                    self.fix(torch.tensor(max(first, second)), f"meets values of fixed size in {where}")
        return torch.stack(labels).amax(0).expand(shape)

    def fix(self, labels: torch.Tensor, reason: str) -> None:
        """These units stay; the first reason is kept."""
        for unit in torch.unique(compact(labels)).tolist():
            if unit != NONE:
                self._fixed.setdefault(self._root(unit), reason)

    def structure(self) -> Structure:
        """What was found, with united units under one number."""
        roots = torch.tensor([self._root(unit) for unit in range(len(self._parents))] + [NONE])
        axes = {layer: tuple(roots[units] for units in parts) for layer, parts in self.axes.items()}
        slices = tuple(replace(each, units=roots[each.units]) for each in self.slices.values() if each)
        return Structure(axes, slices, dict(self._fixed), dict(self.skipped), len(self._parents))

    def _root(self, unit: int) -> int:
        while self._parents[unit] != unit:
            self._parents[unit] = self._parents[self._parents[unit]]
            unit = self._parents[unit]
        return unit

    def _join(self, first: int, second: int) -> None:
        kept, merged = self._root(first), self._root(second)
        if kept == merged:
            return
        self._parents[merged] = kept
        if (reason := self._fixed.pop(merged, None)) is not None:
            self._fixed.setdefault(kept, reason)


def varies(labels: torch.Tensor, dim: int) -> bool:
    """Whether labels differ along a dimension."""
    if labels.shape[dim] <= 1 or labels.stride(dim) == 0:
        return False
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def compact(labels: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`labels`, cut to length one along the dimensions along which neither they nor the others vary."""
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and not any(varies(each, dim) for each in (labels, *others)):
            labels = labels.narrow(dim, 0, 1)
            others = tuple(other.narrow(dim, 0, 1) for other in others)
    return labels


def vector(labels: torch.Tensor, dim: int) -> torch.Tensor | None:
    """Labels along one dimension, where they vary along no other; else None."""
    dim %= labels.ndim
    for other in range(labels.ndim):
        if other != dim:
            if varies(labels, other):
                return None
            labels = labels.narrow(other, 0, 1)
    return labels.reshape(-1)


def spread(units: torch.Tensor, shape: torch.Size, dim: int) -> torch.Tensor:
    """Labels of `shape` that vary along one dimension only; no memory is taken."""
    view = [1] * len(shape)
    view[dim] = -1
    return units.reshape(view).expand(shape)
