"""Memory that a model on the CPU takes in each call, kept from call to call."""

from dataclasses import dataclass

from perfkit import InvalidInputError, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class KeepMemory(Recipe):
    """Keep what each call takes for the next one, instead of taking it from the system anew.

    torch on a CPU takes each tensor from the C library. glibc maps one above 32 MiB by itself, and unmaps it when it is
    freed, so that in large batches each call touches every page for the first time, and the kernel zeroes and maps it:
    that can take longer than computing. This makes room for it in the process' heap, as much as the example inputs
    need, that only calls of the model find, and `train_step`, backward and update included. It stays between them.

    It hurts where memory is short: the process holds what a call needs at most until the model is gone.

    Args:
        mib: for how many MiB to make room; None to count what the example inputs take anew.

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html, M_MMAP_THRESHOLD
    """

    stage = Stage.RUNTIME
    positional = ("mib",)
    keeps_memory = True

    mib: int | None = None

    def __post_init__(self):
        if self.mib is not None and (type(self.mib) is not int or self.mib < 1):
            raise InvalidInputError(f"keep_memory({self.mib!r}): expected a number of MiB, 1 or more, or None")

    def unavailable(self, framework, device):
        from perfkit.measure import kept_memory, kept_region

        if device != "cpu":
            return f"it is about memory that calls on a CPU take, and this is {device!r}"
        reason = kept_region.unavailable()
        if framework == "jax" and not reason:
            return (
                "XLA takes a program's memory in threads of its own, whose part of the heap cannot grow beyond 64 MiB: "
                f"start Python with {kept_memory.TYPED}"
            )
        return reason or None

    def refusal(self, work):
        from perfkit.measure import kept_region

        if work.layout is not None:
            return "processes that work together are started so that all memory is kept: 'perfkit launch --keep-memory'"
        if self.mib is None and work.inputs is None:
            return "it counts what a call takes: pass example_inputs, or give the number of MiB, 'keep_memory(300)'"
        return None if kept_region.reached() else kept_region.OTHER_THREAD

    def torch(self, work):
        from perfkit.backends.torch_keeping import as_needed, keeping

        return as_needed(work) if self.mib is None else keeping(work, self.mib << 20)


RECIPE = KeepMemory

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("keep_memory")
