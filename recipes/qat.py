"""Quantization-aware training."""

from dataclasses import dataclass

from perfkit import InvalidInputError, LayerRecipe, Stage


@dataclass(frozen=True, kw_only=True)
class Qat(LayerRecipe):
    """Train with the rounding of `int8` in the forward pass, so that the weights learn to live with it.

    For models that `int8` or fewer bits cost too much accuracy. Training is slower, since the rounding is simulated.
    Afterwards `perfkit.optimize(result.model, recipe="int8+compile", example_inputs=...)` makes the real integer model,
    on the ranges that were trained, with the outputs that the trained model had.

    Args:
        weight_bits: bits that weights are rounded to, 2 to 8; pass the same to `int8`.
        distill: the original teaches: half of the loss is the distance to its outputs.
        include: names or patterns of the layers to quantize ("encoder.*"); all where empty.
        exclude: names or patterns of the layers to leave alone.

    Source: https://arxiv.org/abs/1712.05877; https://arxiv.org/abs/1806.08342
    """

    stage = Stage.QUANTIZATION
    provides = "quantization"
    retrains = True

    weight_bits: int = 8
    distill: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.weight_bits not in range(2, 9):
            raise InvalidInputError(f"qat(weight_bits={self.weight_bits!r}): expected 2 to 8")

    def refusal(self, work):
        return None if work.trains else "it is for mode='training'; the trained model is then converted with 'int8'"

    def unsought(self, work):
        return "it trains other weights, and none the faster: choose it by name"

    def torch(self, work):
        from perfkit.quantization.torch_quantize import qat

        return qat(work, self)

    def jax(self, work):
        from perfkit.quantization.jax_quantize import qat

        return qat(work, self)


RECIPE = Qat

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("qat")
