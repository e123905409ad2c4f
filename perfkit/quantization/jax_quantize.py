"""Quantization of JAX models: flax nnx, flax linen, and plain functions of a parameter pytree.

A quantized model holds `Quantized` (int8, float8) or `Packed` (int4) nodes among its parameters, and its function is
rewritten to run products on them: int8 × int8 summed in int32 inside jit, scan, while, cond and remat alike. What is
done stands in the parameters, the scales of activations included, so that it is saved and loaded with them.

Qwix does the same for flax layers, by patching the functions that they call. It is not used here because it has no say
over plain functions and over cells inside a scan that carries its own weights, and because it ties the state to its
own modules; the arithmetic is the same.

Source: https://arxiv.org/abs/2004.09602 (what is quantized, and how), https://qwix.readthedocs.io
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._recipe import LayerRecipe
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.jax_autocast import trace
from perfkit.backends.jax_quantized import FLOAT8, GROUP, Packed, Quantized, range_scale
from perfkit.backends.jax_trees import leaves_with_names, with_leaves
from perfkit.quantization.jax_choice import Choice, choose, example, float8_reason, stored_reason
from perfkit.quantization.jax_fake import fake_quantized
from perfkit.quantization.jax_integer_layers import Layer
from perfkit.quantization.jax_integer_programs import in_kernels
from perfkit.quantization.jax_integer_rnn import Recurrence
from perfkit.quantization.jax_products import quantized
from perfkit.quantization.jax_study import Uses, candidates, ranges

FP8_CAPABILITY = 8.9
FP8_TPUS = ("TPU7", "TPU v7")


def int8(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Weights in int8 with one scale per output, activations in int8 with one calibrated scale per layer.

    A model trained under `qat` is converted as it was trained: its activations keep one scale per row, computed at each
    call, so that its outputs stay the same; nothing is calibrated then.

    Args:
        work: an inference workload. Ranges are read from its `calibration`, without it from its example inputs.
        recipe: says which layers; `weight_bits` (8 where it has none): of the weights, which are stored in int8.

    Raises:
        InvalidInputError: there is nothing to calibrate on, or the activations are not finite.
        UnsupportedError: the model is trained, or is quantized already.
    """
    chosen = choose(work, recipe, stored_reason)
    bits, trained = getattr(recipe, "weight_bits", 8), any(use.bits for use in chosen.weights.values())
    if trained:
        note = "trained with fake quantization: activations keep one scale per row, computed at each call, as trained"
        return _in_low(work, chosen, lambda weight, use: _int8(weight, use, use.bits), (note,))
    observed, notes = _calibrated(work, chosen)
    chosen, more = _ranged(chosen, observed)

    def low(weight: Any, use: Uses) -> Quantized:
        met = use.limit is not None  # a table is only looked up, and meets nothing
        return _int8(weight, use, bits, input_scale=range_scale(jnp.float32(use.limit)) if met else None)

    return _in_low(work, chosen, low, (*notes, *more))


def int8_dynamic(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Weights in int8 with one scale per output, activations in int8 with one scale per row, computed at each call.

    Args:
        work: an inference workload.
        recipe: as for `int8`.

    Raises:
        InvalidInputError: there are no inputs to see the model's products with.
        UnsupportedError: the model is trained, or is quantized already.
    """
    bits = getattr(recipe, "weight_bits", 8)
    chosen = choose(work, recipe, stored_reason)
    return _in_low(work, chosen, lambda weight, use: _int8(weight, use, use.bits or bits))


def weight_only(work: Workload, recipe: LayerRecipe, bits: int) -> tuple[Workload, Effect]:
    """Weights stored in 8 or 4 bits and dequantized where they are used: less memory, the same arithmetic.

    Args:
        work: an inference workload.
        recipe: says which layers.
        bits: 8: one scale per output; 4: two numbers a byte, one scale for each `GROUP` numbers that are summed up.

    Raises:
        InvalidInputError: there are no inputs to see the model's products with, or `bits` is neither.
        UnsupportedError: the model is trained, or is quantized already.
    """
    if bits not in (4, 8):
        raise InvalidInputError(f"{recipe.name}: bits={bits!r}, expected 4 or 8")
    chosen = choose(work, recipe, stored_reason)

    def low(weight: Any, use: Uses) -> Quantized | Packed:
        return Packed.of(weight, use.axes) if bits == 4 else _int8(weight, use, 8, multiplies=False)

    groups = f", one scale per group of {GROUP}" if bits == 4 else ", one scale per output"
    note = f"weights are stored in int{bits}{groups}, and computed with in floating point: this saves memory, not work"
    return _in_low(work, chosen, low, (note,))


def fp8_unavailable(device_type: str) -> str | None:
    """Why this machine cannot multiply float8 on devices of that type; None where it can."""
    if device_type == "cpu":
        return "a CPU has no float8 products: XLA would widen both operands to float32; take int8 or bf16"
    device = jax.devices(device_type)[0]
    if device.platform == "tpu":
        known = device.device_kind.startswith(FP8_TPUS)
        return None if known else f"{device.device_kind} has no float8 products, TPU7 has: take int8 or bf16"
    capability = getattr(device, "compute_capability", None)
    try:
        enough = float(capability) >= FP8_CAPABILITY
    except (TypeError, ValueError):
        return f"{device.device_kind} does not tell that it has float8 products: take int8 or bf16"
    return None if enough else f"float8 products need compute capability {FP8_CAPABILITY}; this GPU has {capability}"


def fp8(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Weights in float8_e4m3fn with one scale per output, activations with one per row; sums in float32.

    Args:
        work: an inference workload on a device for which `fp8_unavailable` has nothing to say.
        recipe: says which layers.

    Raises:
        InvalidInputError: there are no inputs to see the model's products with.
        UnsupportedError: the hardware has no float8, the model is trained, or is quantized already.
    """
    if refusal := fp8_unavailable(work.device):
        raise UnsupportedError(refusal)
    return in_float8(work, recipe)


def in_float8(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """`fp8` without asking the hardware."""
    chosen = choose(work, recipe, float8_reason)
    return _in_low(work, chosen, lambda weight, use: Quantized.of(weight, use.axes, dtype=FLOAT8))


def qat(work: Workload, recipe: LayerRecipe) -> tuple[Workload, Effect]:
    """Train with weights and activations rounded as `int8_dynamic` rounds them; gradients pass straight through.

    The parameters stay in floating point, and so does the arithmetic. Activations have one scale per row, computed at
    each call: nothing is calibrated, no range has to be carried along, and ranges follow the training. `int8` and
    `int8_dynamic` both turn the trained model into a real one with the same numbers.

    Args:
        work: a training workload.
        recipe: says which layers; `weight_bits` (8 where it has none): of the weights.

    Raises:
        UnsupportedError: the model is not trained, is quantized already, or was rewritten by another recipe.
    """
    if not work.trains:
        raise UnsupportedError(
            f"{recipe.name} trains: pass mode='training' with loss, targets and optimizer, then convert the trained "
            "model with recipe='int8'"
        )
    if work.model.transforms:
        raise UnsupportedError(
            f"in JAX {recipe.name} stands alone in a chain: it does not see through what another recipe has rewritten"
        )
    chosen = choose(work, recipe, stored_reason, training=True)
    bits = getattr(recipe, "weight_bits", 8)
    axes = {name: use.axes for name, use in chosen.weights.items()}
    model = work.model.then(functools.partial(fake_quantized, axes=axes, bits=bits)) if axes else work.model
    notes = (
        "the rounding of int8 is simulated in floating point; optimize(result.model, recipe='int8') makes it real",
        "activations have one scale per row, computed at each call; the conversion keeps that",
    )
    effect = Effect(chosen.touched, chosen.skipped, notes if axes else (), simulated=True)
    return work.replace(model=model), effect


def _int8(weight: Any, use: Uses, bits: int, **options: Any) -> Quantized:
    return Quantized.of(weight, use.axes, bits=bits, **options)


def _in_low(
    work: Workload, chosen: Choice, low: Callable[[Any, Uses], Any], notes: tuple[str, ...] = ()
) -> tuple[Workload, Effect]:
    """The workload with its chosen weights made `low`, and what became of each."""
    if not chosen.weights:
        none = () if chosen.layer_of else ("the model has no parameters of two dimensions or more: pass params=",)
        return work, Effect((), chosen.skipped, none)
    weights = candidates(work.model.params)
    small = {name: low(weights[name], use) for name, use in chosen.weights.items()}
    in_float, found = _products(work, small)
    chosen = chosen.without(in_float)
    model = _replaced(work, {name: small[name] for name in chosen.weights})
    model, notes = model.then(quantized), (*notes, *_by_whom(found, chosen.layer_of))
    return work.replace(model=model.then(in_kernels) if found else model), Effect(chosen.touched, chosen.skipped, notes)


def _replaced(work: Workload, small: Mapping[str, Any]) -> Any:
    named, structure = leaves_with_names(work.model.params)
    return work.model.with_state(
        with_leaves(structure, [small.get(name, leaf) for name, leaf in named]), work.model.rest
    )


def _products(work: Workload, small: Mapping[str, Any]) -> tuple[dict[str, str], list[Layer | Recurrence]]:
    """The weights that, so stored, would enter no product as they are, though they are meant to, and why; the layers
    whose activations have a known grid."""
    outcomes: dict[str, list[str]] = collections.defaultdict(list)
    found: list[Layer | Recurrence] = []
    inputs, model = example(work), _replaced(work, small)
    function = quantized(work.model.function(), lambda name, reason: outcomes[name].append(reason))
    trace(in_kernels(function, found.append), (model.params, model.rest, *inputs.args), inputs.kwargs)
    return {name: reasons[0] for name, reasons in outcomes.items() if all(reasons)}, found


def _by_whom(found: list[Layer | Recurrence], layer_of: Mapping[str, str]) -> list[str]:
    """In which kernels layers run, and why others are XLA's."""
    told: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for layer in found:
        choice, names = layer.choice, ", ".join(dict.fromkeys(layer_of[name] for name in layer.weights.split(",")))
        if layer.ours:
            told[f"{layer} on {choice.implementation!r}, {choice.why}"][names] = None
        else:
            why = "; ".join(reason for _, reason in choice.refused) or choice.why
            told[f"XLA's integer products ({why})"][names] = None
    return [f"{', '.join(names)}: {what}" for what, names in told.items()]


def _calibrated(work: Workload, chosen: Choice) -> tuple[Mapping[str, float], tuple[str, ...]]:
    """The range of the activations that each weight meets, and what the caller should know of it."""
    own = bool(work.calibration)
    observed = ranges(work.model, work.calibration or (work.inputs,)).largest
    mine = {chosen.layer_of[name]: observed[name] for name in chosen.weights if name in observed}
    broken = [layer for layer, limit in mine.items() if not np.isfinite(limit)]
    if broken:
        raise InvalidInputError(
            f"calibration: the activations that enter {', '.join(broken[:5])} are not finite: check the batches"
        )
    if not own:
        return observed, ("calibrated on the example inputs alone: pass calibration= with data as it will be seen",)
    count = f"calibrated on {len(work.calibration)} batch(es)"
    if work.inputs is None:
        return observed, (count,)
    beyond = ranges(work.model, (work.inputs,), observed).beyond
    shares = {chosen.layer_of[name]: beyond.get(name, 0.0) for name in chosen.weights}
    worst = max(shares, key=shares.get, default=None)
    if worst is None or shares[worst] == 0:
        return observed, (f"{count}; no activation of the example inputs saturates",)
    return observed, (
        f"{count}; of the activations of the example inputs {shares[worst]:.2%} saturate at {worst!r}, the worst layer",
    )


def _ranged(chosen: Choice, observed: Mapping[str, float]) -> tuple[Choice, tuple[str, ...]]:
    """With the ranges of their activations; less the layers that have none, since they met nothing or only zeros."""
    why = {}
    for name, use in chosen.weights.items():
        if use.products and name not in observed:
            why[name] = "it was never reached in calibration"
        elif use.products and observed[name] == 0:
            why[name] = "all activations that entered it in calibration were zero"
    dead = ", ".join(dict.fromkeys(chosen.layer_of[name] for name in why))
    ranged = {name: replace(use, limit=observed.get(name)) for name, use in chosen.weights.items()}
    return replace(chosen, weights=ranged).without(why), ((f"dead observers: {dead}",) if dead else ())
