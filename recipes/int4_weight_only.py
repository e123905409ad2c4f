"""Weights in 4-bit integers, computing in the inputs' precision."""

from dataclasses import dataclass

from perfkit import InvalidInputError
from perfkit.recipes._quantizer import Quantizer

GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Int4WeightOnly(Quantizer):
    """Store weights of linear layers and embeddings in 4 bits, in groups with a scale each: an eighth of the memory.

    For models whose weights do not fit, or where reading them is what takes the time: one sample or a few at a time.
    Sixteen levels are coarse: check with `evaluate=`.

    Args:
        group_size: weights along the input features that share a scale: 32, 64, 128 or 256.
        include: names or patterns of the layers to quantize ("encoder.*"); all where empty.
        exclude: names or patterns of the layers to leave alone.

    Source: https://docs.pytorch.org/ao/stable/workflows/inference.html
    """

    tolerance = 1.5e-1  # half a step is 3 % of a group's range, about 8 % of normal weights' size, over a few layers

    group_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.group_size not in GROUPS:
            raise InvalidInputError(
                f"int4_weight_only(group_size={self.group_size!r}): expected one of {', '.join(map(str, GROUPS))}"
            )

    def unavailable(self, framework, device):
        if framework == "torch":
            from perfkit.quantization.torch_quantize import unavailable

            return unavailable(device, needed=(8, 0))
        return None

    def torch(self, work):
        from perfkit.quantization.torch_quantize import int4_weight_only

        return int4_weight_only(work, self)

    def jax(self, work):
        from perfkit.quantization.jax_quantize import weight_only

        return weight_only(work, self, bits=4)


RECIPE = Int4WeightOnly

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("int4_weight_only")
