"""Matrices as products of two thin ones."""

import math
from dataclasses import dataclass

from perfkit import InvalidInputError, LayerRecipe, Stage

ENERGY = 0.99


@dataclass(frozen=True, kw_only=True)
class LowRank(LayerRecipe):
    """Replace the weights of linear layers, and of recurrent ones' inputs, by products of two thin matrices.

    W (m×n) ≈ A (m×r) · B (r×n) from its singular values, with the smallest rank r that keeps `energy`, where that takes
    fewer numbers: r·(m+n) < m·n. That is mostly in large layers of trained models, hardly ever in freshly initialized
    ones, whose singular values are alike. Two products in place of one: small layers get slower.

    Args:
        energy: share of the squared singular values to keep, above 0 and below 1.
        distill: in training, half of the loss is the distance to the original's outputs.
        include: names or shell patterns of the layers to work on; all where empty.
        exclude: names or shell patterns of the layers to leave alone.

    Source: Denton et al., "Exploiting linear structure within convolutional networks", https://arxiv.org/abs/1404.0736
    """

    stage = Stage.STRUCTURE
    provides = "factorization"
    tolerance = math.sqrt(1 - ENERGY)
    retrains = True

    energy: float = ENERGY
    distill: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.energy, bool) or not isinstance(self.energy, (int, float)) or not 0 < self.energy < 1:
            raise InvalidInputError(
                f"low_rank(energy={self.energy!r}): expected a share above 0 and below 1, such as {ENERGY}"
            )
        # ‖W − AB‖ / ‖W‖ in the Frobenius norm, and so the relative error of Wx over inputs of every direction
        object.__setattr__(self, "tolerance", math.sqrt(1 - self.energy))

    def refusal(self, work):
        if self.distill and not work.trains:
            return "distill=True is for training: pass mode='training' with a loss"
        if work.framework == "torch" and work.trains:
            from perfkit.backends.torch_training import held_in_buckets

            return held_in_buckets(work.model)
        return None

    def unsought(self, work):
        return "it changes what the model computes: choose it by name, and train afterwards"

    def torch(self, work):
        from perfkit.pruning.torch_low_rank import factorized

        return factorized(work, self)

    def jax(self, work):
        from perfkit.pruning.jax_low_rank import factorized

        return factorized(work, self)


RECIPE = LowRank

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("low_rank")
