"""The variables of an nnx module and its other arrays, found without splitting it.

Splitting a module takes longer than running a small one.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from perfkit.backends.jax_inputs import NUMBERS


@dataclass(frozen=True)
class _Attribute:
    """A module's array, or number, that is no variable: `holder.name`, or `holder[name]`."""

    holder: Any
    name: Any

    def get_raw_value(self) -> Any:
        return vars(self.holder)[self.name] if _is_node(self.holder) else self.holder[self.name]

    def set_raw_value(self, value: Any) -> None:
        if _is_node(self.holder):
            setattr(self.holder, self.name, value)
        else:
            self.holder[self.name] = value


class Gathered:
    """A module's variables, each once, its other arrays, and everything else that a compiled program depends on.

    Attributes:
        module: whose they are.
        variables: nnx variables, and what takes the place of one for arrays that are none.
        structure: the rest, to be compared.
    """

    def __init__(self, module: nnx.Module):
        self.module = module
        self.variables: list[Any] = []
        self.structure: list = []
        self._objects: list[Any] = []
        self._contents: list[Iterable[Any]] = []  # of containers that can change
        self._gather(module, {})
        self._seen = list(self._now())

    def holds(self) -> bool:
        """Whether nothing was put into the module or taken out of it since; far quicker than gathering again."""
        return all(map(operator.is_, self._now(), self._seen))

    def _now(self) -> Iterator[Any]:
        kinds = map(type, self._objects)
        return itertools.chain(kinds, itertools.chain.from_iterable(self._contents), (_END,))

    def _gather(self, node: Any, seen: dict[int, int]) -> None:
        place = seen.get(id(node))
        if place is not None:
            self.structure.append(place)
            return
        if isinstance(node, nnx.Variable):
            seen[id(node)] = len(seen)
            self.variables.append(node)
            self.structure.append(type(node))
            self._objects.append(node)
            return
        if _is_node(node):
            seen[id(node)] = len(seen)
            self.structure.append(type(node))
            self._objects.append(node)
            self._contents += [vars(node), vars(node).values()]
            items = [item for item in vars(node).items() if not item[0].startswith("_pytree__")]
        elif isinstance(node, dict):
            self._contents += [node, node.values()]
            items = list(node.items())
        elif isinstance(node, (list, tuple)):
            self._contents.append(node)
            self.structure.append(len(node))
            items = list(enumerate(node))
        else:
            self.structure.append(node if isinstance(node, (bool, int, float, str, type(None))) else id(node))
            return
        data = getattr(node, "_pytree__nodes", {})  # what nnx holds to be state: numbers too, where they are nnx.data
        for name, value in items:
            self.structure.append(name)
            if isinstance(value, (jax.Array, np.ndarray)) or (isinstance(value, NUMBERS) and data.get(name, False)):
                self.variables.append(_Attribute(node, name))
                self.structure.append(jax.Array)
            else:
                self._gather(value, seen)


_END = object()
"""Comes last: what is compared has as many items then."""


def _is_node(value: Any) -> bool:
    return isinstance(value, (nnx.Module, nnx.Pytree))


def _place(variable: Any) -> Any:
    """What tells a gathered variable or array from the others."""
    return (id(variable.holder), str(variable.name)) if isinstance(variable, _Attribute) else id(variable)


def indices(state: nnx.State, module: nnx.Module, variables: list[Any]) -> tuple[list[int], Any]:
    """For each variable of `state`, which of the gathered ones it is; and the tree to put their values back into."""
    index_of = {_place(variable): index for index, variable in enumerate(variables)}
    order = []
    for path, _ in nnx.to_flat_state(state):
        holder, node = None, module
        for key in path:
            holder = node
            node = vars(node)[str(key)] if _is_node(node) else node[key]
        order.append(index_of[id(node) if isinstance(node, nnx.Variable) else (id(holder), str(path[-1]))])
    whole = jax.tree.map(lambda leaf: leaf.replace(0) if _is_variable(leaf) else leaf, state, is_leaf=_is_variable)
    return order, jax.tree.structure(whole)


def values_of(state: nnx.State) -> list[Any]:
    """The value of each variable: an array, or whatever tree of them it holds."""
    return [leaf.get_raw_value() if _is_variable(leaf) else leaf for _, leaf in nnx.to_flat_state(state)]


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
