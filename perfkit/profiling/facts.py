"""What the rules of advice read off a profile: shares, families of operations, shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from perfkit._quantity import Quantity
from perfkit.profiling._profile import Profile
from perfkit.profiling._time_data import Op
from perfkit.profiling.roofline import Placed, place

PRODUCTS = re.compile(
    r"(addmm|\bmm\b|bmm|matmul|linear|_int_mm|convolution|scaled_dot_product|dot_general|conv_general_dilated"
    r"|gemm|cutlass|fprop|dgrad|wgrad)"
)
RECURRENT = re.compile(r"(rnn|lstm|gru)", re.IGNORECASE)
RECURRENT_LAYERS = ("LSTM", "GRU", "RNN", "LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "RNNCell")
COPIES = frozenset(["clone", "contiguous", "copy_", "_to_copy", "copy", "transpose", "reshape"])
OWN = re.compile(r"perfkit|^triton_|CompiledFxGraph")
"""perfkit's kernels and compiled ones: they are fused already."""
READS_AT = "it cannot be compiled as a whole, so it runs operation by operation: a value is read in Python at "
"""How a note begins that says where a JAX model reads one."""
SIZES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Shape:
    """One input of an operation."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.sizes) * SIZES.get(self.dtype, 4)


def shapes_of(op: Op) -> tuple[Shape, ...]:
    """The inputs of an operation, read from its text."""
    return read_shapes(op.shapes)


def read_shapes(text: str) -> tuple[Shape, ...]:
    """The shapes of "float32[64, 10], int64[64]"."""
    return tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size.strip()))
        for dtype, sizes in re.findall(r"([a-z]+\d+|bool)\[([\d, ]*)\]", text)
    )


class Facts:
    """A profile, and what follows from it."""

    def __init__(self, profile: Profile):
        self.profile = profile

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """What the time is made of: a device's kernels where there are any, else operations."""
        ops = self.profile.time.ops if self.profile.time else ()
        return tuple(op for op in ops if op.kind == "kernel") or ops

    @property
    def on_device(self) -> bool:
        return any(op.kind == "kernel" for op in self.ops)

    @cached_property
    def step_ms(self) -> float:
        """The length of the profiled step, by which its operations' times are to be divided."""
        phases = self.profile.time.phases_ms if self.profile.time else {}
        return max(sum(phases.values()), sum(op.self_ms for op in self.ops))

    def share(self, ops: Iterable[Op]) -> float:
        """The part of the step that operations take."""
        return sum(op.self_ms for op in ops) / self.step_ms if self.step_ms else 0.0

    @property
    def as_one(self) -> float | None:
        """The length of the step as one compiled program, as a part of the step's; None where it was not timed."""
        time = self.profile.time
        return time.as_one.median_ms / time.step.median_ms if time and time.as_one else None

    @property
    def outside(self) -> float:
        """The part of the step outside of all operations: Python's, what freeing memory takes, or a device's gaps.

        A training step's on a processor is the optimizer's too, and is not counted.
        """
        return 0.0 if self.trains and not self.on_device else max(1 - self.share(self.ops), 0.0)

    def placed(self, op: Op) -> Placed | None:
        return place(op, self.profile.ceilings) if self.profile.ceilings else None

    def peak(self, dtype: str) -> float | None:
        """The ceiling of a dtype's products, GFLOP/s; None where it was not measured."""
        told = self.profile.ceilings.gflops.get(dtype) if self.profile.ceilings else None
        return told.value if told else None

    @property
    def bandwidth(self) -> float | None:
        """GB/s; None where it was not measured."""
        return self.profile.ceilings.bandwidth_gb_s.value if self.profile.ceilings else None

    @cached_property
    def memory_pressure(self) -> float:
        """From 0, for a peak that nobody notices, to 1, where it takes half of what there is."""
        memory, there = self.profile.memory, self.profile.environment.memory_bytes.value
        for state in self.profile.devices:
            if "memory" in state.readings:
                there = state.readings["memory"].value or there
        peak = memory.peak.value if memory else None
        return min(2 * peak / there, 1.0) if peak and there else 0.0

    @property
    def trains(self) -> bool:
        return self.profile.mode == "training"

    @cached_property
    def applied(self) -> set[str]:
        """Recipes that the profiled model already has."""
        from perfkit.profiling.advice import names_in

        told = [re.match(r"profiled: what (.*) makes of the model", note) for note in self.profile.notes]
        return set().union(*(names_in(match[1]) for match in told if match))

    @cached_property
    def read_at(self) -> str:
        """Where a JAX model reads a value in Python, so that nothing can compile it; else empty."""
        return next((note.removeprefix(READS_AT) for note in self.profile.notes if note.startswith(READS_AT)), "")

    @cached_property
    def by_operation(self) -> bool:
        """Whether each operation is started by itself and could be compiled: eager, not one program."""
        if self.read_at or "compile" in self.applied or any("CompiledFxGraph" in op.name for op in self.ops):
            return False
        if self.profile.framework == "jax":
            return sum(op.calls for op in self.ops if op.name == "dispatch") > 3
        return True

    @cached_property
    def recurrent(self) -> tuple[Op, ...]:
        """Operations of recurrent layers, cells included."""
        modules = self.profile.time.modules if self.profile.time else ()
        places = [module.path for module in modules if module.path and module.kind in RECURRENT_LAYERS]
        return tuple(
            op
            for op in self.ops
            if not OWN.search(op.name)
            and not is_host(op)
            and op.phase in ("forward", "backward")
            and (RECURRENT.search(op.name) or any(_within(op.module, place) for place in places))
        )

    @cached_property
    def time_major(self) -> bool:
        """Whether the model's input has time first and the batch second, as its recurrent layers take it."""
        inputs = [shape.sizes for shape in read_shapes(self.profile.inputs)]
        if not inputs or len(inputs[0]) != 3 or inputs[0][0] == inputs[0][1]:
            return False
        first = [shapes[0].sizes for shapes in map(shapes_of, self.recurrent) if shapes]
        rows = {sizes[0] for sizes in first if len(sizes) == 2}  # of a cell at one time step
        return inputs[0] in first or (inputs[0][1] in rows and inputs[0][0] not in rows)

    @cached_property
    def products(self) -> tuple[Op, ...]:
        """Matrix products and convolutions outside of recurrent layers."""
        inside = set(self.recurrent)
        return tuple(op for op in self.ops if op not in inside and (PRODUCTS.search(op.name) or op.flops))

    @cached_property
    def float64(self) -> tuple[Op, ...]:
        """Operations with an input of 64 bits that is more than a single number."""
        return tuple(op for op in self.ops if any(part.dtype == "float64" and part.sizes for part in shapes_of(op)))

    @cached_property
    def fusable(self) -> tuple[Op, ...]:
        """Elementwise operations, pools, norms: what a compiler writes into its neighbours."""
        others = {*self.recurrent, *self.products}
        return tuple(
            op
            for op in self.ops
            if op not in others
            and op.phase in ("forward", "loss", "backward")
            and not OWN.search(op.name)
            and not is_host(op)
            and not re.search(r"embedding|_local_scalar|item$|callback", op.name)
        )


def is_copy(op: Op) -> bool:
    """Whether an operation moves numbers and changes none; in JAX several may be fused: "transpose + copy"."""
    return set(op.name.removeprefix("aten::").split(" + ")) <= COPIES


def is_host(op: Op) -> bool:
    """Whether it is JAX's work on the host, which stands among a profile's operations."""
    return op.name in ("dispatch", "compile")


def _within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def sped(share: float, factor: float, because: str, gone: float = 0.0) -> Quantity:
    """What the step gains where a part of it gets `factor` times faster, and another is `gone`, by Amdahl's law."""
    share = min(max(share, 0.0), 0.999 - gone)
    freed = f"; {gone:.0%} to free it gone" if gone else ""
    method = f"Amdahl: {share:.0%} of the step, {because}{freed}"
    return Quantity(1 / (1 - gone - share + share / factor), "ratio", method=method)


def names(ops: Iterable[Op]) -> tuple[str, ...]:
    """Where operations stand: their modules, or their own names outside of all; the longest first."""
    ordered = sorted(ops, key=lambda op: -op.self_ms)
    return tuple(dict.fromkeys(op.module or op.name for op in ordered))


def outermost(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Modules without those that lie within others of them."""
    return tuple(path for path in paths if not any(path != other and _within(path, other) for other in paths))
