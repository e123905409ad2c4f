"""The number of CPU threads that the model is fastest with."""

from dataclasses import dataclass

from perfkit import InvalidInputError, Recipe, Stage

CHOOSING_S = 1.0
"""Seconds of timing for each number of threads that is tried."""


@dataclass(frozen=True, kw_only=True)
class Threads(Recipe):
    """Compute with another number of CPU threads than torch is set to, in this model alone.

    torch starts with a thread for each core, and at the end of every parallel operation all wait for the last one. In
    small models and batches that costs more than it gives; large ones lose by fewer threads. So numbers are timed on
    the example inputs: 1, 2, 4, … and all cores, from what torch is set to downwards and upwards, as long as it gets no
    slower. The fastest is kept if it is faster than what torch is set to.

    It holds for the calls of the model and for `train_step`, backward and update included, in the thread that makes
    them: what torch is set to stays as it is for everything else.

    Args:
        count: how many threads; None to choose by the clock. OMP_NUM_THREADS limits the choice.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.set_num_threads.html;
        https://github.com/pytorch/pytorch/issues/3146
    """

    stage = Stage.RUNTIME
    positional = ("count",)
    tolerance = 1e-5  # sums are added up in other parts

    count: int | None = None

    def __post_init__(self):
        if self.count is not None and (type(self.count) is not int or self.count < 1):
            raise InvalidInputError(f"threads({self.count!r}): expected a number of threads, 1 or more, or None")

    def unavailable(self, framework, device):
        from perfkit.measure.environment import cores_allowed

        if device != "cpu":
            return f"it is about the threads of a CPU, and this is {device!r}"
        if framework == "jax":
            return (
                "XLA's threads are there for the whole process, from its first call on: start it with PJRT_NPROC=1 "
                "in the environment, or under 'taskset -c 0'"
            )
        from perfkit.backends.torch_threads import not_settable, others

        if cores_allowed() == 1 and not any(others(1)):
            return "one core: there is nothing to choose"
        return not_settable()

    def refusal(self, work):
        from perfkit.backends.torch_threads import others
        from perfkit.measure.environment import cores_allowed, threads_allowed

        if work.layout is not None and (self.count is None or not work.trains):
            return (
                "processes that work together share the cores by OMP_NUM_THREADS: set that before they start, "
                "or in training give the number, 'threads(1)'"
            )
        if self.count is not None:
            cores = cores_allowed()
            return f"this process has {cores} cores: more threads wait for each other" if self.count > cores else None
        if work.inputs is None:
            return "it times the model: pass example_inputs, or give the number, 'threads(1)'"
        if not any(others(threads_allowed())):
            return "OMP_NUM_THREADS=1 leaves nothing to choose: give the number, 'threads(2)', or take that away"
        return None

    def torch(self, work):
        from perfkit.backends.torch_threads import computing, quickest
        from perfkit.measure.environment import threads_allowed

        if self.count is None:
            return quickest(work, threads_allowed(), CHOOSING_S)
        return computing(work, self.count)


RECIPE = Threads

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("threads")
