"""What a model's layers were seen to run in, for reports; in either framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from perfkit._report import Effect, Skipped
from perfkit.kernels._op import Choice

THEIRS = ("library", "reference")
"""Implementations that are no kernels of ours."""

UNKNOWN = "without example_inputs it is not known in which implementation"
LEFT = "include/exclude leave it alone"


@dataclass
class Layer:
    """A layer that may run in a kernel, and what was seen of it.

    Args:
        refused: why it stays as it is, whatever it is called with.
        runs: what of it runs in a kernel of ours, and in which.
        misses: why other calls of it do not.
        unseen: why nothing was seen of it, where that is so.
    """

    refused: str = ""
    runs: dict[str, None] = field(default_factory=dict)
    misses: dict[str, None] = field(default_factory=dict)
    unseen: str = "it is not called on the example inputs"

    def saw(self, what: str, choices: Iterable[Choice]) -> bool:
        """One call was made. Returns whether a kernel of ours took it."""
        for choice in choices:
            if choice.implementation not in THEIRS:
                self.runs[f"{what} on {choice.implementation!r}, {choice.why}"] = None
                return True
            refused = "; ".join(f"{name}: {reason}" for name, reason in choice.refused) or choice.why
            self.misses[f"{what} is the {choice.implementation}'s here ({refused})"] = None
        return False

    @property
    def why_not(self) -> str:
        """Why it is not swapped; empty where it is."""
        return self.refused or ("" if self.runs else "; ".join(self.misses) or self.unseen)


NO_LAYER = (
    "the model has none of the layers that the kernels are for: convolutions over images, recurrent layers and, for "
    "inference on CPU, linear layers in float32 or bfloat16"
)


def effect(layers: Mapping[str, Layer]) -> Effect:
    """What was swapped, what not and why, and what runs where."""
    if not layers:
        return Effect(notes=(NO_LAYER,))
    touched = tuple(name for name, layer in layers.items() if not layer.why_not)
    skipped = tuple(Skipped(name, layer.why_not) for name, layer in layers.items() if layer.why_not)
    return Effect(touched, skipped, tuple(f"{name}: {'; '.join(layers[name].runs)}" for name in touched))
