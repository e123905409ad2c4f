"""Which weights of a JAX model to quantize, from what it does with them, and why the others are left alone.

Layers are named by the paths of their parameters: "conv1" for "conv1.kernel", the whole path where a layer has several
weights ("cell.w_i", "cell.w_h").
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._recipe import LayerRecipe
from perfkit._report import Skipped
from perfkit._workload import Inputs, Workload
from perfkit.backends.jax_quantized import is_quantized
from perfkit.backends.jax_trees import leaves
from perfkit.quantization.jax_study import Uses, uses


@dataclass(frozen=True)
class Choice:
    """The weights to quantize, the layers they belong to, and what is left alone."""

    weights: Mapping[str, Uses]
    layer_of: Mapping[str, str]
    skipped: tuple[Skipped, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.layer_of[name] for name in self.weights))

    def without(self, reasons: Mapping[str, str]) -> Choice:
        """Less the weights that there is a reason against."""
        weights = {name: use for name, use in self.weights.items() if name not in reasons}
        left = tuple(Skipped(self.layer_of[name], why) for name, why in reasons.items())
        return Choice(weights, self.layer_of, (*self.skipped, *left))


def choose(
    work: Workload, recipe: LayerRecipe, reason: Callable[[Uses], str | None], *, training: bool = False
) -> Choice:
    """What the recipe shall work on, from what the model does with its weights.

    Args:
        reason: why a weight cannot be stored as the recipe would; None where it can.

    Raises:
        InvalidInputError: there are no inputs to see the model's products with.
        UnsupportedError: the model is trained and this is not `training`, or it is quantized already.
    """
    if work.trains and not training:
        raise UnsupportedError(f"{recipe.name}: integers have no gradients; train with recipe='qat', then convert")
    if any(map(is_quantized, leaves(work.model.params))):
        raise UnsupportedError(f"{recipe.name}: the model is quantized already; start from the original")
    if work.inputs is None and not work.calibration:
        raise InvalidInputError(
            f"{recipe.name} sees from a call what the model does with its weights: pass example_inputs"
        )
    found = uses(work.model, example(work))
    trained = any(use.bits for use in found.values())
    layer_of = layers(found)
    reasons = {
        name: "it was not trained with fake quantization" if trained and not use.bits else reason(use)
        for name, use in found.items()
    }
    usable = {name: use for name, use in found.items() if reasons[name] is None}
    wanted = recipe.selected(dict.fromkeys(layer_of[name] for name in usable))
    for name in usable:
        if layer_of[name] not in wanted:
            reasons[name] = "left alone by include or exclude"
    return Choice(found, layer_of, ()).without({name: why for name, why in reasons.items() if why})


def layers(names: Iterable[str]) -> dict[str, str]:
    """Parameter → layer: the path without its last part, where that part is all that tells two weights of it apart."""
    names = list(names)
    count = collections.Counter(name.rpartition(".")[0] for name in names)
    return {name: (head if (head := name.rpartition(".")[0]) and count[head] == 1 else name) for name in names}


def stored_reason(use: Uses) -> str | None:
    """Why a weight cannot be stored in integers; None where it can."""
    if use.products or use.looked_up:
        return None
    if use.reasons:
        return use.reasons[0]
    if use.others:
        return f"it enters {', '.join(dict.fromkeys(use.others))}, not a product"
    return "it is not used when the model is called with these inputs"


def float8_reason(use: Uses) -> str | None:
    """Why a weight cannot be stored in float8; None where it can."""
    if "conv_general_dilated" in use.products:
        return "there are no float8 convolutions"
    return stored_reason(use) if use.products or not use.looked_up else "it is looked up, not multiplied"


def example(work: Workload) -> Inputs:
    """What the model is called with, to see what it does."""
    return work.calibration[0] if work.inputs is None else work.inputs
