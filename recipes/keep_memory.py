"""Memory that a model on the CPU takes in each call, kept from call to call."""

from dataclasses import dataclass

from perfkit import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class KeepMemory(Recipe):
    """Keep what each call takes for the next one, instead of taking it from the system anew.

    torch on a CPU takes each tensor from the C library. glibc maps one above 32 MiB by itself, and unmaps it when it is
    freed, so that in large batches each call touches every page for the first time, and the kernel zeroes and maps it:
    that can take longer than computing. This puts a cache before torch's allocator, as there is one on GPUs: what calls
    of the model free waits for the next of them, and `train_step` is one, backward and update included. All else takes
    memory as it did.

    It hurts where memory is short: the process holds what a call needs at most, and up to as much again, until the
    model is gone.

    Source: c10/core/CPUAllocator.h; https://man7.org/linux/man-pages/man3/mallopt.3.html, M_MMAP_THRESHOLD
    """

    stage = Stage.RUNTIME
    keeps_memory = True

    def unavailable(self, framework, device):
        from perfkit.measure import kept_memory

        if device != "cpu":
            return f"it is about memory that calls on a CPU take, and this is {device!r}"
        if framework == "jax":
            if kept_memory.settled():
                return f"there is nothing to do here: memory is {kept_memory.told()}"
            return f"XLA takes a program's memory from the C library itself: start Python with {kept_memory.TYPED}"
        from perfkit.kernels.torch_memory.allocator import unavailable

        return unavailable() or None

    def refusal(self, work):
        if work.layout is not None:
            return "processes that work together are started so that all memory is kept: 'perfkit launch --keep-memory'"
        return None

    def torch(self, work):
        from perfkit.backends.torch_keeping import keeping

        return keeping(work)


RECIPE = KeepMemory

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("keep_memory")
