"""Weights and activations in 16 bits."""

from dataclasses import dataclass, replace

from perfkit import InvalidInputError, Recipe, Stage

DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Half(Recipe):
    """Store weights and compute everything in 16 bits: half the memory of float32, and no casts on the way.

    Everything is rounded, sums and norms included, so it is less exact than `bf16` or `fp16`. Inputs are cast on the
    way in, outputs return in float32. In training the optimizer keeps float32 weights; each step casts copies of them.

    Args:
        dtype: "bfloat16" (the range of float32) or "float16" (more precise, but ends at 65504).

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.half
    """

    stage = Stage.PRECISION
    provides = "precision"
    tolerance = 3e-2  # as bf16, and the operations that autocast keeps in float32 round as well

    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"half(dtype={self.dtype!r}): expected {' or '.join(map(repr, DTYPES))}")

    def unprofitable(self, framework, device):
        from perfkit.measure.environment import has

        needed = {"bfloat16": ("amx_bf16", "avx512_bf16", "bf16"), "float16": ("amx_fp16", "avx512_fp16", "fphp")}
        if device == "cpu" and not any(map(has, needed[self.dtype])):
            return f"this CPU has no {self.dtype} instructions: it emulates them"
        return None

    def torch(self, work):
        import torch

        from perfkit.backends.torch_half import cast_weights

        return cast_weights(self._scaled(work), getattr(torch, self.dtype))

    def jax(self, work):
        from perfkit.backends.jax_precision import cast_weights

        return cast_weights(self._scaled(work), self.dtype)

    def _scaled(self, work):
        scaled = work.trains and self.dtype == "float16"
        return work.replace(training=replace(work.training, loss_scaling=True)) if scaled else work


RECIPE = Half

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("half")
