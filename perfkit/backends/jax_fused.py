"""perfkit's kernels in JAX models, by rewriting their jaxprs: after every earlier step of a chain, whatever it made.

Scans whose step is a recurrent cell, convolutions with what follows them and, for inference, linear layers in bfloat16
become calls of `perfkit.kernels`, inside of jit, checkpoint, scan, while and cond alike. Which implementation a call
gets is known when it is traced: where it would be the library's, the equations are bound again as they are. Derivative
rules of the caller's are left alone.

Layers are named by the paths of their parameters: "conv1" for "conv1.kernel".
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.fused_layers import LEFT, UNKNOWN, Layer, effect
from perfkit.backends.jax_autocast import trace, untraced
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_fused_conv import groups, reading
from perfkit.backends.jax_fused_linear import linear_groups
from perfkit.backends.jax_fused_rnn import recurrence
from perfkit.backends.jax_fused_steps import Unlike
from perfkit.backends.jax_quantized import is_quantized
from perfkit.backends.jax_rewriting import context_of
from perfkit.backends.jax_trees import array_names, leaves
from perfkit.backends.jax_unread import Unread
from perfkit.kernels._jax import default_device
from perfkit.kernels._op import trace as kernels_called
from perfkit.kernels.rounding.jax_op import rounded, takes

if TYPE_CHECKING:
    from perfkit.recipes.fused_kernels import FusedKernels

INTEGERS = (
    "layers on integers have their kernels from the step that made them, with what follows them: its lines say which; "
    "the model has none else that kernels are for"
)
_CANDIDATES = ("conv_general_dilated", "scan")
_INNER = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "checkpoint": ("jaxpr",),
    "remat2": ("jaxpr",),
    "scan": ("jaxpr",),
    "while": ("body_jaxpr",),
    "cond": ("branches",),
}
_MOVES = ("reshape", "transpose", "convert_element_type", "broadcast_in_dim", "squeeze", "copy", "copy_p", "slice")


def fused(work: Workload, recipe: FusedKernels) -> tuple[Workload, Effect]:
    """The model's function with its recurrent scans and convolutions in perfkit's kernels.

    Raises:
        InvalidInputError: a pattern of include or exclude matches no layer.
    """
    model, inputs = work.model, work.inputs

    def rewritten(chosen: Callable[[str], bool], seen: dict[str, Layer]) -> Callable[[Callable], Callable]:
        return lambda function: _rewritten(function, chosen, seen, work.trains)

    if inputs is None:

        def chosen(name: str) -> bool:
            included = not recipe.include or any(fnmatchcase(name, pattern) for pattern in recipe.include)
            return included and not any(fnmatchcase(name, pattern) for pattern in recipe.exclude)

        return work.replace(model=model.then(rewritten(chosen, {}))), Effect((model.name,), notes=(UNKNOWN,))
    arguments = (model.params, model.rest, *inputs.args), dict(inputs.kwargs)
    everything: dict[str, Layer] = {}
    trace(rewritten(lambda _: False, everything)(model.function()), *arguments)
    wanted = recipe.selected(everything) if everything else set()
    seen: dict[str, Layer] = {}
    trace(rewritten(wanted.__contains__, seen)(model.function()), *arguments)
    swapped = {name for name, layer in seen.items() if not layer.why_not}
    if not seen and any(map(is_quantized, leaves(model.params))):
        return work, Effect(notes=(INTEGERS,))
    if not swapped:
        return work, effect(seen)
    return work.replace(model=model.then(rewritten(swapped.__contains__, {}))), effect(seen)


def _rewritten(function: Callable, chosen: Callable[[str], bool], seen: dict[str, Layer], trains: bool) -> Callable:
    """`function(params, rest, *args, **kwargs)` with the layers that `chosen` names in kernels; `seen` is filled."""
    fuser = _Fuser(chosen, seen, trains)

    @functools.wraps(function, updated=())
    def fused_function(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        jaxpr, values, outputs = trace(function, (params, rest, *args), kwargs)
        names = array_names(params)
        results = fuser.evaluate(jaxpr, values, [*names, *[""] * (len(values) - len(names))])
        return untraced(jaxpr, results, outputs)

    return fused_function


class _Fuser:
    """Evaluates jaxprs with kernels in place of what they compute. One per function; final."""

    def __init__(self, chosen: Callable[[str], bool], seen: dict[str, Layer], trains: bool):
        self.chosen, self.seen, self.trains, self.device = chosen, seen, trains, default_device()
        # JAX compiles a jit once per jaxpr object, so a function that is called twice must meet the same object twice
        self._rewritten: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def evaluate(self, jaxpr: Any, args: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """The outputs of a jaxpr, open or closed; `names` of the parameters among its inputs, "" for others."""
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        named = dict(zip(jaxpr.invars, names, strict=True))
        live, unread = live_in(jaxpr), Unread(jaxpr) if self.device == "cpu" else None
        uses, made_by = reading(jaxpr)
        found, reasons = groups(jaxpr.eqns, uses, made_by, self.trains)
        if not self.trains:
            found |= linear_groups(jaxpr.eqns, uses, made_by)
        inside = {at for group in found.values() for at in group.equations}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        def entering(atom: Any) -> Any:
            """As a kernel reads it: a cast of the program's input is one too."""
            eqn = None if isinstance(atom, Literal) else made_by.get(atom)
            if eqn is not None and not self.trains and _enters(eqn, jaxpr) and not name(eqn.invars[0]):
                x = read(eqn.invars[0])
                return rounded(x) if takes(x) else read(atom)
            return read(atom)

        def name(atom: Any) -> str:
            return "" if isinstance(atom, Literal) else named.get(atom, "")

        def ends(eqn: Any) -> Any:
            return unread and unread.ends(eqn, values)

        for at, eqn in enumerate(jaxpr.eqns):
            operands = [name(atom) for atom in eqn.invars]
            if at in reasons:
                self._layer(operands[1:2], eqn).misses[reasons[at]] = None
            if at in found:
                self._group(found[at], jaxpr.eqns, values, read, entering, name)
            elif at not in inside:
                with context_of(eqn):
                    results = self._apply(eqn, [read(atom) for atom in eqn.invars], operands, live, entering, ends)
                values.update(zip(eqn.outvars, results, strict=True))
            if eqn.primitive.name in _MOVES and operands[0]:
                named[eqn.outvars[0]] = operands[0]
        return [read(atom) for atom in jaxpr.outvars]

    def _layer(self, names: Sequence[str], eqn: Any) -> Layer:
        """The layer that an equation is, named by its parameters."""
        paths = [name.split(".") for name in dict.fromkeys(names) if name]
        if not paths:
            called = f"{eqn.primitive.name} of {', '.join(str(list(atom.aval.shape)) for atom in eqn.invars[:2])}"
        elif len(paths) == 1:
            called = ".".join(paths[0][:-1]) or paths[0][0]
        else:
            alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
            called = ".".join(parts[0] for parts in alike) or ".".join(paths[0])
        return self.seen.setdefault(called, Layer("" if self.chosen(called) else LEFT))

    def _group(
        self, group: Any, eqns: Sequence[Any], values: dict, read: Callable, entering: Callable, name: Callable
    ) -> None:
        first, last = eqns[group.equations[0]], eqns[group.equations[-1]]
        layer = self._layer([name(first.invars[1])], first)
        if not layer.refused:
            with context_of(last), kernels_called() as choices:
                y = group(eqns, entering)
            if layer.saw(str(group), choices):
                values[last.outvars[0]] = y
                return
        for at in group.equations:
            with context_of(eqns[at]):
                values.update(zip(eqns[at].outvars, bind(eqns[at], map(read, eqns[at].invars)), strict=True))

    def _apply(
        self, eqn: Any, operands: list[Any], names: list[str], live: set, entering: Callable, ends: Callable
    ) -> Sequence[Any]:
        holds = eqn.primitive.name in _INNER and _holds_candidates(eqn, not self.trains)
        if eqn.primitive.name == "scan" and not holds:
            return self._scan(eqn, operands, self._layer(names, eqn), live, entering, ends)
        return self._inner(eqn, operands, names) if holds else bind(eqn, operands)

    def _scan(
        self, eqn: Any, operands: list[Any], layer: Layer, live: set, entering: Callable, ends: Callable
    ) -> Sequence[Any]:
        try:
            found = recurrence(eqn, operands, [var in live for var in eqn.outvars])
        except Unlike as reason:
            layer.misses[f"its loop is no recurrent layer that the kernels know: {reason}"] = None
            return bind(eqn, operands)
        if not layer.refused:
            lengths = ends(eqn)
            with kernels_called() as choices:
                results = found(eqn, list(map(entering, eqn.invars)), self.trains, lengths)
            if layer.saw(found.mode if lengths is None else f"{found.mode}, of each row what is read,", choices):
                return results
        return bind(eqn, operands)

    def _inner(self, eqn: Any, operands: list[Any], names: list[str]) -> Sequence[Any]:
        """A call, branch or loop, of rewritten jaxprs."""
        (field,) = _INNER[eqn.primitive.name]
        inner = eqn.params[field]
        if eqn.primitive.name == "cond":
            names = names[1:]
        elif eqn.primitive.name == "while":
            names = names[eqn.params["cond_nconsts"] :]
        new = (
            tuple(self._rewrite(each, names) for each in inner)
            if isinstance(inner, tuple)
            else self._rewrite(inner, names)
        )
        return bind(eqn, operands, **{field: new})

    def _rewrite(self, jaxpr: Any, names: Sequence[str]) -> Any:
        versions = self._rewritten.setdefault(jaxpr, {})
        if (key := tuple(names)) not in versions:
            closed = hasattr(jaxpr, "consts")
            avals = [var.aval for var in getattr(jaxpr, "jaxpr", jaxpr).invars]
            new = jax.make_jaxpr(lambda *args: self.evaluate(jaxpr, args, names))(*avals)
            assert closed or not new.consts, "an open jaxpr receives its constants as arguments"
            versions[key] = new if closed else new.jaxpr
        return versions[key]


def _enters(eqn: Any, jaxpr: Any) -> bool:
    """Whether it casts an input of the jaxpr to bfloat16."""
    cast = eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == jnp.bfloat16
    return cast and any(eqn.invars[0] is var for var in jaxpr.invars)


def live_in(jaxpr: Any) -> set:
    """The variables that outputs depend on, or effects."""
    live = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in live for var in eqn.outvars):
            live.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    return live


def _holds_candidates(eqn: Any, products: bool) -> bool:
    """Whether a convolution, a scan, or if wanted a product is somewhere in the jaxprs of an equation.

    Products in a scan's step do not count: it may be a recurrent layer as a whole.
    """
    products &= eqn.primitive.name != "scan"
    wanted = (*_CANDIDATES, "dot_general") if products else _CANDIDATES
    return any(
        each.primitive.name in wanted or (each.primitive.name in _INNER and _holds_candidates(each, products))
        for inner in _inner_jaxprs(eqn)
        for each in inner.eqns
    )


def _inner_jaxprs(eqn: Any) -> list[Any]:
    (field,) = _INNER[eqn.primitive.name]
    inner = eqn.params[field]
    return [getattr(each, "jaxpr", each) for each in (inner if isinstance(inner, tuple) else (inner,))]
