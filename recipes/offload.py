"""Memory of the host for what training remembers."""

from dataclasses import dataclass

from perfkit import InvalidInputError, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Offload(Recipe):
    """Keep saved activations and the optimizer's state in the host's memory, and copy them back when they are needed.

    It costs the time of the copies over the bus, so it pays where `checkpoint` and `accumulate` are not enough. On a
    CPU it is refused: there the host's memory is the device's.

    Args:
        activations: what the layers save for the backward pass.
        optimizer: the optimizer's state, between two steps (PyTorch).
        least_bytes: smaller tensors stay where they are (PyTorch).

    Source: https://docs.pytorch.org/docs/stable/autograd.html#torch.autograd.graph.save_on_cpu;
        https://docs.jax.dev/en/latest/notebooks/host-offloading.html
    """

    stage = Stage.MEMORY
    aim = "memory"

    activations: bool = True
    optimizer: bool = True
    least_bytes: int = 1_000_000

    def __post_init__(self):
        if not (self.activations or self.optimizer):
            raise InvalidInputError("offload(activations=False, optimizer=False) moves nothing: leave one of them on")

    def unavailable(self, framework, device):
        return "on a CPU the host's memory is the device's: there is nowhere to move to" if device == "cpu" else None

    def refusal(self, work):
        return None if work.trains else "it is about what training remembers: inference remembers nothing"

    def torch(self, work):
        from perfkit.memory.torch_offload import offloaded

        return offloaded(work, self.activations, self.optimizer, self.least_bytes)

    def jax(self, work):
        from perfkit.memory.jax_offload import offloaded

        return offloaded(work, self.activations, self.optimizer)


RECIPE = Offload

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("offload")
