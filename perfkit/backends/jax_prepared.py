"""Programs that do not compute again at each call what depends on parameters alone.

To XLA parameters are inputs like others: weights that are cast, transposed for a kernel, or scaled by a norm that is
folded into them are so at each call. JAX's arrays never change, so what was made of them holds for as long as they are
the ones that come.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_compile import persistent_cache
from perfkit.backends.jax_inputs import tracing
from perfkit.backends.jax_rewriting import context_of, holds

_MOVES = ("reshape", "transpose", "broadcast_in_dim", "squeeze", "copy", "copy_p", "slice", "rev")
"""Operations that XLA does on the way, as it reads: a copy of their result would gain nothing."""

_LITTLE = 1 << 14
"""Bytes that may always be kept more: biases in a wider dtype, and what stands beside packed weights."""

_KERNELS = ("ffi_call", "pallas_call")
"""Operations that read their operands as they lie."""

_PACKED = 2
"""So many times what it is made of may what a kernel has packed take: small weights are rounded up to whole vectors."""


class Prepared:
    """`function(held, *inputs)` as a program compiled at its first call, and one for what it computes of `held` alone.

    The second one runs where some of the arrays that it reads are others than at the call before. What it makes is
    kept, where that takes no more memory than what it is made of, or was packed by a kernel. Inputs of other shapes,
    and traced calls, go through `jax.jit`.

    Args:
        function: of a tree of arrays that are seldom changed, and of others.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.whole = jax.jit(function)
        self.lowered: jax.stages.Lowered | None = None
        self.compiled: jax.stages.Compiled | None = None
        self._prepare: Callable[..., list[jax.Array]] | None = None
        self._places: list[int] = []  # of what it reads, among the leaves of what is held
        self._form: Any = ()  # what it does
        self._known: tuple[list[Any] | None, list[jax.Array]] = None, []

        def run(kept, held, *inputs):
            traced = _Traced(function, held, inputs)
            same = _equal(traced.form, self._form)
            return traced.run(held, inputs, dict(zip(traced.parts.kept, kept, strict=True)) if same else {})

        self.jitted = jax.jit(run)

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept at present."""
        return sum(array.nbytes for array in self._known[1])

    def __call__(self, held: Any, *inputs: Any) -> Any:
        if self.compiled is None:
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((held, inputs))):
                return self.whole(held, *inputs)
            self._compile(held, inputs)
        try:
            kept = self._kept(held)
        except (TypeError, ValueError):  # other shapes, dtypes or devices, or a trace
            return self.whole(held, *inputs)
        try:
            return self.compiled(kept, held, *inputs)
        except (TypeError, ValueError):  # the same: jit takes them all, or says why not
            return self.jitted(kept, held, *inputs)

    def _kept(self, held: Any) -> list[jax.Array]:
        if self._prepare is None:
            return []
        leaves = jax.tree.leaves(held)
        arrays = [leaves[at] for at in self._places]
        before, kept = self._known
        if before is None or not all(map(operator.is_, arrays, before)):
            kept = self._prepare(*arrays)
            if all(isinstance(array, jax.Array) for array in arrays):  # others, numpy's, may change
                self._known = arrays, kept
        return kept

    def _compile(self, held: Any, inputs: tuple) -> None:
        with persistent_cache(), tracing():
            traced = _Traced(self.function, held, inputs)
            if traced.parts.kept:
                leaves, self._places, self._form = jax.tree.leaves(held), traced.places, traced.form
                self._prepare = jax.jit(traced.prepare).lower(*(leaves[at] for at in self._places)).compile()
            self.lowered = self.jitted.lower(self._kept(held), held, *inputs)
            self.compiled = self.lowered.compile()


class _Traced:
    """A call of a function as a jaxpr in two parts."""

    def __init__(self, function: Callable, held: Any, inputs: tuple):
        closed, results = jax.make_jaxpr(function, return_shape=True)(held, *inputs)
        self.jaxpr, self.structure = closed.jaxpr, jax.tree.structure(results)
        self.constants = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.parts = parted(self.jaxpr, len(jax.tree.leaves(held)))
        self.places = [self.jaxpr.invars.index(var) for var in self.parts.read]

    @property
    def form(self) -> Any:
        """What `prepare` does, to be compared: equal only if it is the same."""
        names = {var: number for number, var in enumerate(self.jaxpr.invars)}

        def name(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return str(atom.aval), np.asarray(atom.val).tobytes()
            return names.setdefault(atom, len(names))

        steps = [
            (eqn.primitive, eqn.params, [name(atom) for atom in eqn.invars], [name(var) for var in eqn.outvars])
            for eqn in between(self.jaxpr, self.parts.read, self.parts.kept)
        ]
        return self.places, steps, [names[var] for var in self.parts.kept]

    def prepare(self, *arrays: Any) -> list[Any]:
        """What is kept, of the arrays that `places` tells."""
        return evaluated(self.jaxpr, dict(zip(self.parts.read, arrays, strict=True)), self.parts.kept)

    def run(self, held: Any, inputs: tuple, kept: Mapping[Any, Any]) -> Any:
        """The function's results."""
        given = dict(zip(self.jaxpr.invars, jax.tree.leaves((held, inputs)), strict=True))
        results = evaluated(self.jaxpr, self.constants | given | kept, self.jaxpr.outvars, effects=True)
        return jax.tree.unflatten(self.structure, results)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except ValueError:  # arrays among what operations are told: nobody knows
        return False


@dataclass(frozen=True)
class Parts:
    """What is computed apart: variables of a jaxpr.

    Args:
        read: inputs that it is computed of.
        kept: what the rest reads of it.
    """

    read: tuple[Any, ...]
    kept: tuple[Any, ...]


def parted(jaxpr: Any, count: int) -> Parts:
    """What of an open jaxpr depends on its first `count` inputs alone and is worth keeping."""
    origins: dict[Any, frozenset] = {var: frozenset([var]) for var in jaxpr.invars[:count]}
    worked, packed, alone = set(), set(), []
    for eqn in jaxpr.eqns:
        read = _read(eqn)
        if eqn.effects or not all(var in origins for var in read):
            continue
        alone.append(eqn)
        of = frozenset().union(*(origins[var] for var in read))
        origins.update(dict.fromkeys(eqn.outvars, of))
        if eqn.primitive.name not in _MOVES or worked.intersection(read):
            worked.update(eqn.outvars)
        if holds(eqn, _KERNELS):
            packed.update(eqn.outvars)
    apart = set(map(id, alone))
    rest = [eqn for eqn in jaxpr.eqns if id(eqn) not in apart]
    outside = {var for eqn in rest for var in _read(eqn)}.union(_variables(jaxpr.outvars))
    by_kernels = {var for eqn in rest if holds(eqn, _KERNELS) for var in _read(eqn)}

    def worth(var: Any) -> bool:
        gains = origins[var] and (var in worked or var in by_kernels)
        return gains and _bytes([var]) <= _bytes(origins[var]) * (_PACKED if var in packed else 1) + _LITTLE

    kept: list[Any] = []
    for eqn in reversed(alone):
        wanted = [var for var in eqn.outvars if var in outside]
        if all(map(worth, wanted)):
            kept += wanted
        else:
            outside.update(_read(eqn))
    needed = frozenset().union(*(origins[var] for var in kept))
    return Parts(tuple(var for var in jaxpr.invars[:count] if var in needed), tuple(kept))


def between(jaxpr: Any, given: Container[Any], wanted: Sequence[Any], *, effects: bool = False) -> list[Any]:
    """The equations of an open jaxpr that it takes to get from some variables to others.

    Args:
        effects: those too that do something else, such as printing.
    """
    needed, found = {var for var in _variables(wanted) if var not in given}, []
    for eqn in reversed(jaxpr.eqns):
        if (effects and eqn.effects) or needed.intersection(eqn.outvars):
            found.append(eqn)
            needed.update(var for var in _read(eqn) if var not in given)
    return found[::-1]


def evaluated(jaxpr: Any, given: Mapping[Any, Any], wanted: Sequence[Any], *, effects: bool = False) -> list[Any]:
    """The values of variables of an open jaxpr from those of others; as `between` has it."""
    values = dict(given)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in between(jaxpr, given, wanted, effects=effects):
        with context_of(eqn):
            results = bind(eqn, map(read, eqn.invars))
        values.update((var, value) for var, value in zip(eqn.outvars, results, strict=True) if var not in given)
    return list(map(read, wanted))


def _read(eqn: Any) -> list[Any]:
    return _variables(eqn.invars)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _bytes(variables: Iterable[Any]) -> int:
    return sum(var.aval.size * var.aval.dtype.itemsize for var in variables)
