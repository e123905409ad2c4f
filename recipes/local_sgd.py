"""The same model on several devices, each training by itself for some steps before they are averaged."""

from dataclasses import dataclass

from perfkit import InvalidInputError, ParallelRecipe, Stage


@dataclass(frozen=True, kw_only=True)
class LocalSgd(ParallelRecipe):
    """Train on several devices that talk only every few steps: each trains by itself, then parameters are averaged.

    One k-th of the messages of `data_parallel`, for slow links and for devices with data of their own (federated
    averaging). Between two averages the models differ, so the losses are not those of one process: by how much the
    averaged model lags behind is measured and reported. Where the link is fast, `data_parallel` learns more a step.

    Args:
        size: how many devices train; None for all that the chain's other recipes leave.
        sync_every: k, steps from one average of the parameters to the next.
        warmup_steps: so many steps at first average gradients at every step, as `data_parallel` does (post-local SGD).
        diloco: parameters do not become their average: an outer optimizer, SGD with Nesterov momentum, takes what the
            k steps changed, on average, for its gradient. With it the inner optimizer is AdamW, and k up to 500.
        outer_lr: of that outer optimizer.
        outer_momentum: the same optimizer's.
        weights: one for each device, such as the size of its data, by which averages are weighted; alike where empty.
        average_state: average the optimizer's state too, such as Adam's moments, for more bytes; else it stays local.
        batch_dim: the dimension of the inputs that is the batch; of targets it is the first one of that length.

    Source: https://arxiv.org/abs/1808.07217 (post-local SGD); https://arxiv.org/abs/1602.05629 (federated averaging);
        https://arxiv.org/abs/2311.08105 (DiLoCo)
    """

    stage = Stage.DATA
    provides = "data axis"
    axis = "data"

    sync_every: int = 8
    warmup_steps: int = 0
    diloco: bool = False
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    weights: tuple[float, ...] = ()
    average_state: bool = False
    batch_dim: int = 0

    def __post_init__(self):
        super().__post_init__()
        for option, least in (("sync_every", 1), ("warmup_steps", 0)):
            value = getattr(self, option)
            if not isinstance(value, int) or value < least:
                raise InvalidInputError(f"local_sgd({option}={value!r}): expected a number of steps, {least} or more")
        if not (self.outer_lr > 0 and 0 <= self.outer_momentum < 1):
            given = f"outer_lr={self.outer_lr!r}, outer_momentum={self.outer_momentum!r}"
            raise InvalidInputError(f"local_sgd({given}): expected a rate above 0 and a momentum from 0 to below 1")
        object.__setattr__(self, "weights", tuple(self.weights))
        if any(not weight > 0 for weight in self.weights):
            raise InvalidInputError(f"local_sgd(weights={self.weights!r}): expected numbers above 0")

    def refusal(self, work):
        from perfkit.parallel.batch import indivisible

        if not work.trains:
            return "it shares out training steps: for inference start one process for each device"
        if reason := super().refusal(work):
            return reason
        devices = work.layout.size("data")
        if self.weights and len(self.weights) != devices:
            return f"weights has {len(self.weights)} entries for {devices} devices: give one for each"
        if work.framework == "jax" and work.layout.axes != ("data",):
            other = next(axis for axis in work.layout.axes if axis != "data")
            return f"in JAX every device holds a whole model of its own: use data_parallel with {other}_parallel"
        return indivisible(work, self.batch_dim)

    def shares(self, devices):
        """The share of each device in an average, adding up to 1."""
        weights = self.weights or (1.0,) * devices
        return tuple(weight / sum(weights) for weight in weights)

    def told(self, devices):
        """What happens along the axis, in one line for the report."""
        what = "an outer step on the averaged change" if self.diloco else "parameters averaged"
        first = f", gradients averaged in the first {self.warmup_steps}" if self.warmup_steps else ""
        how = ", by weight" if self.weights else ""
        often = "step" if self.sync_every == 1 else f"{self.sync_every} steps"
        return f"data: the batch in {devices} parts, {what}{how} every {often}{first}"

    def notes(self):
        state = "averaged with the parameters" if self.average_state else "each device's own"
        return (
            f"optimizer state is {state}",
            "between averages each process' model and loss are its own; the result's settle() averages at once",
        )

    def judged_at(self, steps):
        """The steps that begin with averaged models, the last one among them: their losses are the averaged model's."""
        warm = range(min(self.warmup_steps, steps))
        return sorted({*warm, *range(self.warmup_steps, steps, self.sync_every), steps - 1})

    def torch(self, work):
        from perfkit.parallel.torch_local import local_sgd

        return local_sgd(work, self)

    def jax(self, work):
        from perfkit.parallel.jax_local import local_sgd

        return local_sgd(work, self)


RECIPE = LocalSgd

if __name__ == "__main__":
    from perfkit.cli import lesson

    lesson("local_sgd")
