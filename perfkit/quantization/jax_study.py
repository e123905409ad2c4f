"""Finding out what a model does with its weights, and how large the activations are that they meet."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._workload import Inputs
from perfkit.backends.jax_autocast import trace
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_model import JaxModel
from perfkit.backends.jax_trees import array_names, leaves_with_names
from perfkit.quantization.jax_products import product_reason
from perfkit.quantization.jax_rewrite import MARK, Follower, contracted
from perfkit.quantization.jax_views import Faked, PackedView, View, plain, view


@dataclasses.dataclass
class Uses:
    """What happens to one parameter.

    Args:
        summed: dimensions that some product sums over.
        products: names of the primitives whose products it enters.
        looked_up: dimensions that a lookup takes whole rows along, where it is a table.
        reasons: why products with it cannot run in integers.
        others: names of primitives that take it in floating point.
        bits: what it was trained for with fake quantization; None where it was not.
        limit: the largest magnitude of the activations that it met in calibration; None without one.
    """

    summed: frozenset[int] = frozenset()
    products: tuple[str, ...] = ()
    looked_up: frozenset[int] = frozenset()
    reasons: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    bits: int | None = None
    limit: float | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The dimensions along which entries share a scale."""
        return tuple(sorted(self.summed or self.looked_up))


def candidates(params: Any) -> dict[str, Any]:
    """The parameters that may be a layer's weights: floating point, two dimensions or more, with numbers in them."""

    def may(leaf: Any) -> bool:
        return getattr(leaf, "ndim", 0) >= 2 and bool(leaf.size) and jnp.issubdtype(leaf.dtype, jnp.floating)

    return {name: leaf for name, leaf in leaves_with_names(params)[0] if may(leaf)}


def uses(model: JaxModel, inputs: Inputs) -> dict[str, Uses]:
    """What the model does with each of its candidates when it is called with these inputs. Nothing is computed."""
    rule = _Studying()
    jax.eval_shape(*_followed(model, inputs, rule))
    return {name: rule.found[name] for name in candidates(model.params)}


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What was seen of the activations that each weight meets.

    Args:
        largest: weight → largest magnitude.
        beyond: weight → share of the entries that lie beyond the ranges given.
    """

    largest: Mapping[str, float]
    beyond: Mapping[str, float]


def ranges(model: JaxModel, batches: Iterable[Inputs], limits: Mapping[str, float] | None = None) -> Ranges:
    """Call the model with each batch and see how large the activations are that meet its weights.

    Works inside loops and branches, where the maxima are reported by a callback.

    Args:
        model: in floating point.
        batches: what it is called with.
        limits: weight → range; entries beyond it are counted.
    """
    rule = _Observing(limits or {})
    programs: dict[Any, Callable] = {}
    for inputs in batches:
        run, values = _followed(model, inputs, rule)
        jax.block_until_ready(programs.setdefault(_signature(inputs), jax.jit(run))(values))
    jax.effects_barrier()
    beyond = {name: count / rule.seen[name] for name, count in rule.beyond.items()}
    return Ranges(dict(rule.largest), beyond)


def _followed(model: JaxModel, inputs: Inputs, rule: Any) -> tuple[Callable[[list[Any]], list[Any]], list[Any]]:
    """The model's call under a rule as a function of all arrays in it, and these arrays."""
    jaxpr, values, _ = trace(model.function(), (model.params, model.rest, *inputs.args), inputs.kwargs)
    names, wanted = array_names(model.params), candidates(model.params)

    def run(values: list[Any]) -> list[Any]:
        arriving = [view(n, v) if n in wanted else v for n, v in zip(names, values, strict=False)]
        return list(map(plain, Follower(rule).evaluate(jaxpr, [*arriving, *values[len(names) :]])))

    return run, values


def _signature(inputs: Inputs) -> Any:
    leaves, structure = jax.tree.flatten((inputs.args, dict(inputs.kwargs)))
    return structure, tuple((leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves)


class _Studying:
    """The rule that notes every use."""

    keeps_derivatives = False

    def __init__(self):
        self.found: dict[str, Uses] = collections.defaultdict(Uses)

    def product(self, eqn: Any, x: Any, weight: View, at: int) -> Any:
        reason = product_reason(eqn, at)
        for name, axes in weight.origin(contracted(eqn, at)).items():
            if reason is None:
                self._note(name, summed=axes, products=(eqn.primitive.name,))
            else:
                self._note(name, reasons=(reason,))
        operands = [plain(x), plain(weight)]
        return bind(eqn, operands if at == 1 else operands[::-1])[0]

    def used(self, eqn: Any, weight: View | PackedView, at: int) -> None:
        if eqn.primitive.name == "gather" and at == 0:
            along = eqn.params["dimension_numbers"].start_index_map
            rows = [dim for dim in range(weight.values.ndim) if dim not in along]
            for name, axes in weight.origin(rows).items():
                self._note(name, looked_up=axes)
            return
        for name in weight.names:
            self._note(name, others=(eqn.primitive.name,))

    def marked(self, eqn: Any, operands: list[Any]) -> list[Any]:
        (x,) = operands
        if not isinstance(x, View):
            return [Faked(x, eqn)]
        for name in x.names:
            self.found[name].bits = int(eqn.params["name"].removeprefix(MARK + "weight_"))
        return [x]

    def _note(self, name: str, **more: Any) -> None:
        found = self.found[name]
        for field, value in more.items():
            old = getattr(found, field)
            setattr(found, field, old | value if isinstance(old, frozenset) else (*old, *value))


class _Observing:
    """The rule that reports the maxima of what weights are multiplied with."""

    keeps_derivatives = False

    def __init__(self, limits: Mapping[str, float]):
        self.limits = limits
        self.largest: dict[str, float] = {}
        self.beyond: collections.Counter = collections.Counter()
        self.seen: collections.Counter = collections.Counter()

    def product(self, eqn: Any, x: Any, weight: View, at: int) -> Any:
        x = plain(x)
        if product_reason(eqn, at) is None:
            magnitude = jnp.abs(x).astype(jnp.float32)
            limit = max((self.limits.get(name, np.inf) for name in weight.names), default=np.inf)
            report = functools.partial(self._report, weight.names, x.size)
            jax.debug.callback(report, jnp.max(magnitude, initial=0.0), jnp.sum(magnitude > limit))
        operands = [x, plain(weight)]
        return bind(eqn, operands if at == 1 else operands[::-1])[0]

    def used(self, eqn: Any, weight: View | PackedView, at: int) -> None:
        """Only products are observed."""

    def marked(self, eqn: Any, operands: list[Any]) -> None:
        """As it is."""

    def _report(self, names: tuple[str, ...], size: int, largest: Any, beyond: Any) -> None:
        for name in names:
            # Not max(): a NaN must be seen, and stay.
            self.largest[name] = float(np.maximum(self.largest.get(name, 0.0), largest))
            self.beyond[name] += int(beyond)
            self.seen[name] += size
