"""Which parts of a JAX model's parameters must go together: labels carried through its jaxpr.

Every index of every dimension of every parameter starts with a label of its own. The rules in `jax_rules` carry
the labels through the equations and unite those that meet: an output channel of a convolution, its bias, its entry in a
norm and the inputs that it becomes after flattening end up under one label, and are one unit. Labels that reach the
model's inputs or outputs, or an equation that no rule covers, are frozen: their units stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Axes = list
"""What is known of one value: for each dimension the labels of its indices, or None where any size would do."""

GIVEN, CODE = 0, 1
_REASONS = ["its size follows from the inputs", "a constant in the model's code has its size"]


class Labels:
    """Disjoint sets of labels, some of them frozen. Final.

    `version` grows with every change, so that a loop can be repeated until nothing changes.
    """

    def __init__(self):
        self.parent = np.arange(len(_REASONS))
        self.frozen = np.ones(len(_REASONS), bool)  # of the roots; those of the others mean nothing
        self.produced = np.zeros(len(_REASONS), bool)
        self.reason: dict[int, str] = dict(enumerate(_REASONS))  # of the frozen roots
        self.version = 0

    def fresh(self, size: int) -> np.ndarray:
        """New labels, one for each index."""
        start = len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(start, start + size)])
        self.frozen, self.produced = (np.concatenate([x, np.zeros(size, bool)]) for x in (self.frozen, self.produced))
        return np.arange(start, start + size)

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """Which set each label is in."""
        while not np.array_equal(above := self.parent[labels], labels):
            labels = above
        return labels

    def live(self, labels: np.ndarray | None) -> np.ndarray:
        """For each label whether its unit may be cut; nothing is where any size would do."""
        if labels is None:
            return np.zeros(0, bool)
        return ~self.frozen[self.roots(labels)]

    def unite(self, first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
        """Labels that meet index by index become one each; returns what the meeting's result carries."""
        if first is None or second is None:
            return second if first is None else first
        assert len(first) == len(second), "indices that meet have one size"
        pairs = np.stack([self.roots(first), self.roots(second)], 1)
        for one, other in np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0):
            self._unite(int(one), int(other))
        return first

    def _unite(self, one: int, other: int) -> None:
        one, other = int(self.roots(np.array([one]))[0]), int(self.roots(np.array([other]))[0])
        if self.frozen[other]:
            one, other = other, one
        if one != other and not self.frozen[other]:  # two frozen ones keep their own reasons
            self.parent[other] = one
            self.version += 1

    def freeze(self, labels: np.ndarray | None, reason: str) -> None:
        """The units of these labels stay, because of `reason`."""
        if labels is None:
            return
        roots = np.unique(self.roots(labels)[self.live(labels)])
        self.frozen[roots] = True
        self.reason.update(dict.fromkeys(roots.tolist(), reason))
        self.version += len(roots)

    def freeze_all(self, values: Iterable[Axes], reason: str) -> None:
        for axes in values:
            for labels in axes:
                self.freeze(labels, reason)

    def why_frozen(self, labels: np.ndarray) -> str | None:
        """The reason of the first frozen label; None where all are live."""
        found = (self.reason.get(int(root)) for root in self.roots(labels))
        return next((reason for reason in found if reason), None)

    def mark_produced(self, labels: np.ndarray | None) -> None:
        """A matrix product or convolution makes these indices: they are its output features."""
        if labels is not None:
            self.produced[labels] = True

    def is_produced(self, labels: np.ndarray) -> bool:
        return bool(self.produced[labels].all())


def given(size: int) -> np.ndarray:
    """Labels of a dimension that no unit is part of: batch, time, space."""
    return np.full(size, GIVEN)


def given_axes(shape: Sequence[int]) -> Axes:
    return [given(size) for size in shape]


def constant_axes(value: Any) -> Axes:
    """Labels of an array that the code holds: a dimension along which all is equal could have any size."""
    array = np.asarray(value) if np.ndim(value) else np.zeros(())
    return [
        None if size and np.array_equal(array, np.broadcast_to(array.take([0], axis), array.shape)) else
        np.full(size, CODE)
        for axis, size in enumerate(array.shape)
    ]  # fmt: skip
