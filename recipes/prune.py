"""Taking away what a model needs least."""

import re
from dataclasses import dataclass

from perfkit import InvalidInputError, LayerRecipe, Stage

STRUCTURES = ("channels", "unstructured", "n:m")
CRITERIA = ("magnitude", "taylor", "activation")


@dataclass(frozen=True, kw_only=True)
class Prune(LayerRecipe):
    """Remove the least important channels, features and hidden units, or set single weights to zero.

    With structure="channels" the result is a smaller dense model of the same class: output channels of convolutions,
    features of linear layers and hidden units of LSTM, GRU and RNN are gone, and so is what read them in the layers
    behind. That is faster on any hardware. Single zeros ("unstructured", "2:4") are not, except 2:4 on GPUs that have
    kernels for it. Either moves the outputs: train afterwards, or give `evaluate=` or `tolerance=`.

    Args:
        amount: the share to remove, above 0 and below 1. "n:m" removes its own share and ignores it.
        structure: "channels", "unstructured", or "n:m" written as "2:4": at most 2 of any 4 consecutive inputs stay.
        criterion: what makes a unit important: "magnitude" (the L2 norm of its weights), "taylor" (Σ |weight ×
            gradient| on the training batch), "activation" (mean |output| on the calibration data, else the inputs).
        schedule: training steps over which the amount rises from 0, fast first; 0 for at once. Until then, and after,
            units are only masked: prune the trained model in inference to remove them.
        round_to: units that stay are a multiple of it, where there are that many: what hardware computes well.
        distill: in training, half of the loss is the distance to the original's outputs.
        include: names or shell patterns of the layers that may lose units; all where empty.
        exclude: those that keep all units, and so do layers tied to them, as by a residual addition; what they read may
            still get smaller.

    Source: Li et al., "Pruning filters for efficient ConvNets", https://arxiv.org/abs/1608.08710; Wen et al.,
    "Learning intrinsic sparse structures within LSTM", https://arxiv.org/abs/1709.05027; Zhu and Gupta, "To prune, or
    not to prune", https://arxiv.org/abs/1710.01878
    """

    stage = Stage.STRUCTURE
    provides = "pruning"
    tolerance = 2e-2  # what was not needed; without fine-tuning the error is mostly far larger, and refused
    retrains = True

    amount: float = 0.5
    structure: str = "channels"
    criterion: str = "magnitude"
    schedule: int = 0
    round_to: int = 8
    distill: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)) or not 0 < self.amount < 1:
            raise InvalidInputError(f"prune(amount={self.amount!r}): expected a share above 0 and below 1, such as 0.5")
        if self.structure not in STRUCTURES[:2] and self.pattern is None:
            raise InvalidInputError(
                f"prune(structure={self.structure!r}): expected 'channels', 'unstructured', or 'n:m' with 0 < n < m, "
                "such as '2:4'"
            )
        if self.criterion not in CRITERIA:
            raise InvalidInputError(
                f"prune(criterion={self.criterion!r}): expected {', '.join(map(repr, CRITERIA[:2]))} or {CRITERIA[2]!r}"
            )
        for option, least in (("schedule", 0), ("round_to", 1)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInputError(f"prune({option}={value!r}): expected a whole number, {least} or more")
        if self.structure != "channels" and self.criterion != "magnitude":
            raise InvalidInputError(
                f"prune(criterion={self.criterion!r}, structure={self.structure!r}): single weights are ranked by "
                "magnitude; use criterion='magnitude', or structure='channels'"
            )
        if self.pattern and self.schedule:
            raise InvalidInputError(
                f"prune(schedule={self.schedule}, structure={self.structure!r}): the pattern holds from the first step "
                "or not at all; use schedule=0, or structure='unstructured'"
            )
        object.__setattr__(self, "calibrates", self.criterion == "activation")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) of an "n:m" structure; None for the others."""
        match = re.fullmatch(r"(\d+):(\d+)", str(self.structure))
        n, m = map(int, match.groups()) if match else (0, 0)
        return (n, m) if 0 < n < m else None

    def refusal(self, work):
        if work.inputs is None and self.structure == "channels":
            return "channels are followed through one run of the model, so it needs example_inputs"
        if not work.trains:
            for option in ("schedule", "distill"):
                if getattr(self, option):
                    return f"{option}={getattr(self, option)!r} is for training: pass mode='training' with a loss"
            if self.criterion == "taylor":
                return "criterion='taylor' needs a loss: pass mode='training', or use criterion='activation'"
        elif work.framework == "torch" and self.structure == "channels" and not self.schedule:
            from perfkit.backends.torch_training import held_in_buckets

            return held_in_buckets(work.model)
        return None

    def unsought(self, work):
        return "it changes what the model computes: choose it by name, and train afterwards"

    def torch(self, work):
        from perfkit.pruning.torch_prune import pruned

        return pruned(work, self)

    def jax(self, work):
        from perfkit.pruning.jax_prune import pruned

        return pruned(work, self)


RECIPE = Prune

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("prune")
