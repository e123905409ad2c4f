"""How each operation of a jaxpr carries labels from its inputs to its outputs: see `jax_labels`.

A rule is `rule(labels, eqn, inputs) -> outputs`, where inputs and outputs are the `Axes` of each value. An operation
without a rule freezes whatever it sees.
"""

# ruff: noqa: ARG001 (all rules take the same arguments, whether they need them or not)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from perfkit.pruning.jax_labels import CODE, Axes, Labels, given, given_axes
from perfkit.pruning.jax_reshape import reshaped

Rule = Callable[[Labels, Any, list[Axes]], list[Axes]]

# Work on each element by itself, or on those at one place of several operands.
ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
    "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv",
    "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
    "xor",
])  # fmt: skip
_REDUCTIONS = ("argmax", "argmin", *(f"reduce_{kind}" for kind in ("sum", "max", "min", "prod", "and", "or", "xor")))
_RUNNING = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window")


def outputs_of(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """The axes of an equation's outputs; the labels that meet in it are united."""
    rule = _RULES.get(eqn.primitive.name, _unknown)
    outputs = rule(labels, eqn, inputs)
    for variable, axes in zip(eqn.outvars, outputs, strict=True):
        sizes = [size if axis is None else len(axis) for axis, size in zip(axes, variable.aval.shape, strict=True)]
        assert sizes == list(variable.aval.shape), f"{eqn.primitive.name}: labels for {sizes}, not {variable.aval}"
    return outputs


def merged(labels: Labels, values: Sequence[Axes]) -> Axes:
    """Values of one shape that become one: what meets is united."""
    result = list(values[0])
    for axes in values[1:]:
        result = [labels.unite(one, other) for one, other in zip(result, axes, strict=True)]
    return result


def _unknown(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    labels.freeze_all(inputs, f"the operation {eqn.primitive.name!r} is not understood")
    return [given_axes(variable.aval.shape) for variable in eqn.outvars]


def _elementwise(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    shape = eqn.outvars[0].aval.shape
    shaped = [_repeated(labels, axes, shape) for axes in inputs if axes]
    return [merged(labels, shaped) if shaped else []]


def _repeated(labels: Labels, axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes of an operand in a result of this shape, along which what has size 1 is repeated."""
    alone = [axis is not None and len(axis) == 1 != size for axis, size in zip(axes, shape, strict=True)]
    labels.freeze_all([[axis for axis, once in zip(axes, alone, strict=True) if once]], "it is repeated")
    return [None if once else axis for axis, once in zip(axes, alone, strict=True)]


def _barrier(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    return inputs


def _dot_general(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    (contracted, batched), sides = eqn.params["dimension_numbers"], inputs
    for left, right in zip(*contracted, strict=True):
        labels.unite(sides[0][left], sides[1][right])
    result = [labels.unite(sides[0][left], sides[1][right]) for left, right in zip(*batched, strict=True)]
    for axes, summed, batch in zip(sides, contracted, batched, strict=True):
        free = [axis for dim, axis in enumerate(axes) if dim not in summed and dim not in batch]
        for axis in free:
            labels.mark_produced(axis)
        result += free
    return [result]


def _convolution(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    params, (image, kernel) = eqn.params, inputs
    image_dims, kernel_dims, out_dims = params["dimension_numbers"]
    in_channel, (out_features, in_features) = image[image_dims[1]], (kernel[kernel_dims[0]], kernel[kernel_dims[1]])
    for axis in [*(image[dim] for dim in image_dims[2:]), *(kernel[dim] for dim in kernel_dims[2:])]:
        labels.freeze(axis, "a convolution slides along it")
    groups, sizes = params["feature_group_count"], eqn.invars[1].aval.shape
    if params["batch_group_count"] != 1:
        return _unknown(labels, eqn, inputs)
    if groups == 1:
        labels.unite(in_channel, in_features)
    elif groups == sizes[kernel_dims[0]] and sizes[kernel_dims[1]] == 1:  # depthwise: each channel by itself
        labels.unite(in_channel, out_features)
    else:
        for axis in (in_channel, in_features, out_features):
            labels.freeze(axis, "a grouped convolution needs its channels in equal groups")
    labels.mark_produced(out_features)
    result = given_axes(eqn.outvars[0].aval.shape)
    result[out_dims[0]], result[out_dims[1]] = image[image_dims[0]], out_features
    return [result]


def _reduction(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    summed = eqn.params["axes"]
    for dim in summed:
        labels.freeze(inputs[0][dim], "the model computes over all of it at once (a norm, a mean, a softmax)")
    kept = [axis for dim, axis in enumerate(inputs[0]) if dim not in summed]
    return [list(kept) for _ in eqn.outvars]


def _running(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    labels.freeze(inputs[0][eqn.params["axis"]], "the model sums along it")
    return [inputs[0]]


def _window(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    params, operands = eqn.params, inputs[: len(eqn.outvars)]
    sizes = zip(
        params["window_dimensions"], params["window_strides"], params["padding"], params["base_dilation"], strict=True
    )
    result = merged(labels, operands)
    for dim, (window, stride, padding, dilation) in enumerate(sizes):
        if (window, stride, tuple(padding), dilation) != (1, 1, (0, 0), 1):
            labels.freeze(result[dim], "a window slides along it")
            result[dim] = given(eqn.outvars[0].aval.shape[dim])
    return [list(result) for _ in eqn.outvars]


def _broadcast(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    shape, result = eqn.params["shape"], [None] * len(eqn.params["shape"])
    for axis, dim in zip(inputs[0], eqn.params["broadcast_dimensions"], strict=True):
        if axis is not None and len(axis) == shape[dim]:
            result[dim] = axis
    return [result]


def _transpose(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    return [[inputs[0][dim] for dim in eqn.params["permutation"]]]


def _squeeze(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    return [[axis for dim, axis in enumerate(inputs[0]) if dim not in eqn.params["dimensions"]]]


def _reshape(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    if eqn.params.get("dimensions") is not None:
        return _unknown(labels, eqn, inputs)
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if 0 in before:
        return _unknown(labels, eqn, inputs)
    return [reshaped(labels, inputs[0], before, after)]


def _concatenate(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    dim = eqn.params["dimension"]
    joined = [
        np.full(variable.aval.shape[dim], CODE) if axes[dim] is None else axes[dim]
        for axes, variable in zip(inputs, eqn.invars, strict=True)
    ]
    result = merged(labels, [[None if at == dim else axis for at, axis in enumerate(axes)] for axes in inputs])
    result[dim] = np.concatenate(joined)
    return [result]


def _split(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    dim, ends = eqn.params["axis"], np.cumsum([int(size) for size in eqn.params["sizes"]])
    parts = [None] * len(ends) if inputs[0][dim] is None else np.split(inputs[0][dim], ends[:-1])
    return [[part if at == dim else axis for at, axis in enumerate(inputs[0])] for part in parts]


def _stack(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    result = merged(labels, inputs)
    result.insert(eqn.params["axis"], given(len(inputs)))
    return [result]


def _unstack(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    dim = eqn.params["axis"]
    labels.freeze(inputs[0][dim], "a part of it is looked up")
    return [[axis for at, axis in enumerate(inputs[0]) if at != dim] for _ in eqn.outvars]


def _tile(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    sizes, repeats = eqn.invars[0].aval.shape, eqn.params["reps"]
    whole = [np.full(size, CODE) if axis is None else axis for axis, size in zip(inputs[0], sizes, strict=True)]
    return [
        [
            axis if times == 1 else np.tile(each, times)
            for axis, each, times in zip(inputs[0], whole, repeats, strict=True)
        ]
    ]


def _slice(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    params = eqn.params
    strides = params["strides"] or (1,) * len(inputs[0])
    return [
        [
            None if axis is None else axis[start:stop:step]
            for axis, start, stop, step in zip(
                inputs[0], params["start_indices"], params["limit_indices"], strides, strict=True
            )
        ]
    ]


def _pad(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    result = []
    for axis, (low, high, between), size in zip(
        inputs[0], eqn.params["padding_config"], eqn.outvars[0].aval.shape, strict=True
    ):
        if (low, high, between) == (0, 0, 0):
            result.append(axis)
        elif between or min(low, high) < 0 or axis is None:
            labels.freeze(axis, "it is padded between its indices")
            result.append(given(size))
        else:
            result.append(np.concatenate([np.full(low, CODE), axis, np.full(high, CODE)]))
    return [result]


def _rev(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    turned = eqn.params["dimensions"]
    return [[axis[::-1] if dim in turned and axis is not None else axis for dim, axis in enumerate(inputs[0])]]


def _iota(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    counted = eqn.params["dimension"]
    return [[np.full(size, CODE) if dim == counted else None for dim, size in enumerate(eqn.params["shape"])]]


def _dynamic_slice(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    sizes, result = eqn.params["slice_sizes"], []
    for axis, size, whole in zip(inputs[0], sizes, eqn.invars[0].aval.shape, strict=True):
        if size != whole:
            labels.freeze(axis, "a part of it is looked up")
        result.append(axis if size == whole else given(size))
    return [result]


def _dynamic_update_slice(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    result = []
    for axis, part, size, whole in zip(
        inputs[0], inputs[1], eqn.invars[1].aval.shape, eqn.invars[0].aval.shape, strict=True
    ):
        if size != whole:
            labels.freeze_all([[axis, part]], "a part of it is overwritten")
        result.append(labels.unite(axis, part) if size == whole else given(whole))
    return [result]


def _gather(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    looked_up = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    result = given_axes(eqn.outvars[0].aval.shape)
    labels.freeze_all([inputs[1]], "it is looked up by")
    passing = [dim for dim in range(len(inputs[0])) if dim not in looked_up]
    for dim in looked_up:
        labels.freeze(inputs[0][dim], "a part of it is looked up")
    for target, dim in zip(numbers.offset_dims, passing, strict=True):
        if sizes[dim] == eqn.invars[0].aval.shape[dim]:
            result[target] = inputs[0][dim]
        else:
            labels.freeze(inputs[0][dim], "a part of it is looked up")
    return [result]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_RUNNING, _running),
    **dict.fromkeys(_WINDOWS, _window),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
