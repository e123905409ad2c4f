"""Adam's moments in few bits."""

from dataclasses import dataclass

from perfkit import InvalidInputError, Recipe, Stage

BITS = ("8", "4", "fp8")


@dataclass(frozen=True, kw_only=True)
class LowBitOptimizer(Recipe):
    """Hold the two moments of Adam or AdamW in 8 or 4 bits, in blocks with a scale each.

    Adam holds twice the parameters' bytes. In 8 bits that is a half, in 4 bits a quarter. Parameters of few numbers
    keep theirs as they are. It computes in float32 and rounds the moments after each step, so losses differ a little.
    In PyTorch these are torchao's optimizers; in JAX the caller's own optax transformation is run on a state that is
    held so between steps, which may also be AMSGrad's, Lion's or the momentum of SGD.

    Args:
        bits: "8", "4" or, in PyTorch, "fp8".

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2021); Li et al., "Memory Efficient
        Optimizers with 4-bit States" (2023); https://docs.pytorch.org/ao/stable/
    """

    stage = Stage.MEMORY
    provides = "optimizer state"
    aim = "memory"
    positional = ("bits",)
    tolerance = 1e-2  # moments rounded to 8 bits, over some steps

    bits: str = "8"

    def __post_init__(self):
        object.__setattr__(self, "bits", str(self.bits))
        if self.bits not in BITS:
            raise InvalidInputError(
                f"low_bit_optimizer(bits={self.bits!r}): expected one of {', '.join(map(repr, BITS))}"
            )

    def unavailable(self, framework, device):
        from importlib.util import find_spec

        if framework == "jax":
            return "float8 moments are torchao's, for PyTorch: bits='8'" if self.bits == "fp8" else None
        if find_spec("torchao") is None:
            return "it needs torchao, which is not installed: pip install 'perfkit[torch]'"
        if self.bits == "fp8" and device != "cuda":
            return f"moments in float8 are for CUDA from compute capability 8.9 on, and this is {device}: bits='8'"
        return None

    def refusal(self, work):
        if not work.trains:
            return "it is about the optimizer's state, which inference does not have"
        if work.framework == "jax":
            from perfkit.memory.jax_low_bit import refusal

            return refusal(work)
        from perfkit.memory.torch_low_bit import refusal

        return refusal(work.training.optimizer)

    def torch(self, work):
        from perfkit.memory.torch_low_bit import low_bit

        return low_bit(work, self.bits)

    def jax(self, work):
        from perfkit.memory.jax_low_bit import low_bit

        return low_bit(work, int(self.bits))


RECIPE = LowBitOptimizer

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("low_bit_optimizer")
