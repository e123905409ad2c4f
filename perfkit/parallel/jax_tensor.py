"""Tensor parallelism in JAX: weights lie in parts on the devices of a mesh, and XLA finds what must be sent.

How a weight is cut changes what is sent, and never what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.jax_compile import persistent_cache
from perfkit.backends.jax_quantized import is_quantized
from perfkit.backends.jax_trees import layer_of, leaves_with_names, with_leaves
from perfkit.parallel.jax_collectives import collectives, told
from perfkit.parallel.jax_mesh import OnMesh, mesh_of, put, replicated
from perfkit.parallel.jax_uses import Use, Uses, uses
from perfkit.parallel.spread import Spread, split_in_words

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function
    from perfkit.recipes.tensor_parallel import TensorParallel

AXIS = "tensor"


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut: along which dimension, and how that is told."""

    dim: int
    told: str


def tensor_parallel(work: Workload, recipe: TensorParallel) -> tuple[Workload, Effect]:
    """Weights in parts on the devices along "tensor"; inputs and outputs whole on each.

    Raises:
        InvalidInputError: a pattern of the recipe matches no layer.
    """
    parts, model = work.layout.size(AXIS), work.model
    if parts == 1:
        return work, Effect(notes=("one device along the tensor axis: nothing to split",))
    mesh = mesh_of(work.layout)
    cuts, skipped = _cuts(work, recipe, parts)
    if not cuts:
        return work, Effect(skipped=tuple(skipped), notes=("no layer can be split: the model stays whole",))
    named, structure = leaves_with_names(model.params)
    placed = [
        put(leaf, _sharding(mesh, cuts[name])) if name in cuts else replicated(leaf, mesh) for name, leaf in named
    ]
    model = model.with_state(with_leaves(structure, placed), replicated(model.rest, mesh))
    model = replace(model, placement=OnMesh(mesh))
    if not work.trains:
        model = model.then(_whole_outputs(mesh)).compiled_ahead()
    line, spread = _told(cuts, parts), work.spread or Spread()
    work = work.replace(model=model, spread=replace(spread, parts=(*spread.parts, line)))
    return work, Effect(tuple(cuts), tuple(skipped), (line, f"one program; a forward call sends {_sent(work)}"))


def _cuts(work: Workload, recipe: TensorParallel, parts: int) -> tuple[dict[str, Cut], list[Skipped]]:
    """How each parameter is cut, by name; and why others are not."""
    named, _ = leaves_with_names(work.model.params)
    reason = "quantized: its numbers and its scales belong together"
    skipped = [Skipped(name, reason) for name, leaf in named if is_quantized(leaf)]
    plain = [(name, leaf) for name, leaf in named if not is_quantized(leaf)]
    shapes = [leaf.shape for _, leaf in plain]
    biases = {name: leaf.shape for name, leaf in plain if name.rpartition(".")[2] == "bias"}
    weights = [index for index, (name, leaf) in enumerate(plain) if leaf.ndim >= 2 and name not in biases]
    wanted = recipe.selected(dict.fromkeys(layer_of(plain[index][0]) for index in weights))
    found = _uses(work, shapes)
    cuts: dict[str, Cut] = {}
    outgoing: dict[int, int] = {}
    places = {index: place for place, index in enumerate(found.first)}
    for index in sorted(weights, key=lambda index: places.get(index, len(places))):
        name, shape = plain[index][0], shapes[index]
        cut: Cut | str = "excluded"
        if layer_of(name) in wanted:
            cut = _cut(index, name, found, outgoing, parts, recipe.recurrent)
        if isinstance(cut, str):
            skipped.append(Skipped(name, cut))
            continue
        cuts[name] = cut
        if cut.told in ("columns", "channels"):
            out = found.first[index].out
            outgoing[index] = out.index(cut.dim)
            bias = f"{layer_of(name)}.bias"
            if biases.get(bias) == tuple(shape[dim] for dim in out):
                cuts[bias] = Cut(outgoing[index], cut.told)
    return cuts, skipped


def _cut(index: int, name: str, found: Uses, outgoing: dict[int, int], parts: int, recurrent: bool) -> Cut | str:
    """How a weight is cut; or why it is not.

    Args:
        outgoing: by weight that is cut by its outputs, which of these dimensions.
        recurrent: whether to cut what loops read, too.
    """
    shape, use = found.shapes[index], found.first.get(index)
    if index in found.looped:
        if not recurrent:
            rounds = found.looped[index]
            times = "in every round" if rounds is None else f"{rounds} times a call, once a round"
            return f"a loop reads it: split, its products would be gathered {times}; recurrent=True splits it"
        dims: tuple[int, ...] = (len(shape) - 1,)
        told = "columns in a loop"
    elif use is not None:
        cut_before = _cut_before(found, use, shape, outgoing, parts)
        if cut_before is not None:
            return Cut(use.contracted[cut_before], "rows")
        dims, told = use.out, "channels" if use.convolves else "columns"
    elif name.rpartition(".")[2] == "embedding":
        dims, told = (len(shape) - 1,), "features"
    else:
        return "no input is multiplied by it alone"
    dim = next((dim for dim in dims if shape[dim] % parts == 0), None)
    if dim is None:
        sizes = " × ".join(str(shape[dim]) for dim in dims)
        return f"{sizes} output(s) cannot be shared by {parts} devices evenly"
    return Cut(dim, told)


def _cut_before(found: Uses, use: Use, shape: tuple[int, ...], outgoing: dict[int, int], parts: int) -> int | None:
    """Along which of its dimensions what a weight multiplies is in parts already; None where it is whole.

    Where that was reshaped, as heads are, or is made of queries, keys and values of one weight, its first dimension is
    taken for the one in parts.
    """
    if not use.of or not use.of <= outgoing.keys():
        return None
    comes = {tuple(found.shapes[index][dim] for dim in found.first[index].out) for index in use.of}
    cut = {outgoing[index] for index in use.of}
    taken = tuple(shape[dim] for dim in use.contracted)
    if len(cut) == 1 and comes == {taken}:
        return next(iter(cut))
    sizes = {math.prod(dims) for dims in comes}
    reshaped = sizes <= {math.prod(taken), 3 * math.prod(taken)}
    return 0 if reshaped and taken[0] % parts == 0 else None


def _uses(work: Workload, shapes: list[tuple[int, ...]]) -> Uses:
    """What the model does with its weights on the example inputs."""
    model, inputs = work.model, work.inputs
    leaves, structure = jax.tree.flatten(model.params, is_leaf=is_quantized)
    whole = [index for index, leaf in enumerate(leaves) if not is_quantized(leaf)]
    others = [leaf for leaf in leaves if is_quantized(leaf)]

    def call(weights, others, rest, args, kwargs):
        given = iter(weights), iter(others)
        merged = [next(given[0] if index in whole else given[1]) for index in range(len(leaves))]
        return model.function()(jax.tree.unflatten(structure, merged), rest, *args, **kwargs)

    given = ([leaves[index] for index in whole], others, model.rest, inputs.args, dict(inputs.kwargs))
    jaxpr = jax.make_jaxpr(call)(*given)
    return uses(jaxpr, shapes, len(jaxpr.in_avals) - len(whole))


def _sharding(mesh: Mesh, cut: Cut) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(None,) * cut.dim, AXIS))


def _whole_outputs(mesh: Mesh) -> Callable[[Function], Function]:
    whole = NamedSharding(mesh, PartitionSpec())

    def wrap(function: Function) -> Function:
        def on_all(params, rest, *args, **kwargs):
            outputs, new_rest = function(params, rest, *args, **kwargs)
            return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, whole), outputs), new_rest

        return on_all

    return wrap


def _sent(work: Workload) -> str:
    """What the compiled program sends in one forward call."""
    model = work.model
    args, kwargs = model.placement.batch((work.inputs.args, dict(work.inputs.kwargs)))
    with persistent_cache():
        compiled = jax.jit(model.function()).lower(model.params, model.rest, *args, **kwargs).compile()
    return told(collectives(compiled.as_text(), work.world.devices))


def _told(cuts: dict[str, Cut], parts: int) -> str:
    """One line: "tensor: 2 layers in 2 parts (fc1 by columns; fc2 by rows)"."""
    ways: dict[str, list[str]] = {}
    for name, cut in cuts.items():
        if name.rpartition(".")[2] != "bias":
            ways.setdefault(cut.told, []).append(layer_of(name))
    return split_in_words(ways, parts)
