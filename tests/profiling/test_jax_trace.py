"""Reading traces: one that this machine recorded, and one of a GPU written by hand, as JAX's profiler lays it out."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from perfkit.profiling import jax_hlo, jax_ops, jax_trace
from perfkit.profiling.jax_ops import Reader
from perfkit.profiling.jax_scopes import Place, place

MICROSECOND = 1_000_000  # picoseconds


class Plane:
    """One plane of a trace, written as text."""

    def __init__(self, name: str):
        self.name, self.lines, self.events, self.stats = name, [], {}, {}

    def line(self, name: str, *events: tuple[str, float, float, dict]) -> None:
        """events: name, start and length in microseconds, and what is noted of it."""
        told = []
        for what, start, length, noted in events:
            stats = "".join(
                f'stats {{ metadata_id: {self._of(self.stats, key)} {self._value(value)} }}'
                for key, value in noted.items()
            )  # fmt: skip
            told.append(
                f"events {{ metadata_id: {self._of(self.events, what)} offset_ps: {int(start * MICROSECOND)} "
                f"duration_ps: {int(length * MICROSECOND)} {stats} }}"
            )
        self.lines.append(f'lines {{ id: {len(self.lines) + 1} name: "{name}" timestamp_ns: 1000 {" ".join(told)} }}')

    @staticmethod
    def _value(value) -> str:
        return f'str_value: "{value}"' if isinstance(value, str) else f"uint64_value: {value}"

    @staticmethod
    def _of(known: dict[str, int], name: str) -> int:
        return known.setdefault(name, len(known) + 1)

    def __str__(self) -> str:
        named = "".join(
            f'{kind} {{ key: {key} value {{ id: {key} name: "{name}" }} }}'
            for kind, known in (("event_metadata", self.events), ("stat_metadata", self.stats))
            for name, key in known.items()
        )
        return f'planes {{ id: 1 name: "{self.name}" {" ".join(self.lines)} {named} }}'


def read(*planes: Plane) -> jax_trace.Trace:
    return jax_trace.read(ProfileData.from_text_proto("\n".join(map(str, planes))))


def gpu(program: int = 7) -> tuple[Plane, Plane]:
    """Two steps of two kernels each, one of them a copy of results."""
    host, device = Plane("/host:CPU"), Plane("/device:GPU:0")
    of = {"hlo_module": f"jit_step({program})", "program_id": program}
    host.line(
        "python",
        *[(jax_trace.STEP, start, 90, {}) for start in (10, 110)],
        *[("PjitFunction(step)", start, 5, {}) for start in (12, 112)],
        *[("BlockHostUntilReady", start, 70, {}) for start in (20, 120)],
    )
    device.line(
        "Stream #14(Compute)",
        *[("gemm_kernel", start, 40, {**of, "hlo_op": "dot.1"}) for start in (30, 130)],
        *[("loop_fusion", start, 10, {**of, "hlo_op": "add_fusion"}) for start in (75, 175)],
    )
    device.line("Stream #15(MemcpyD2H)", *[("MemcpyD2H", start, 5, {"correlation_id": 3}) for start in (83, 183)])
    device.line("XLA Ops", ("dot.1", 30, 40, {**of, "hlo_op": "dot.1"}))  # what tools derive from the streams
    return host, device


def test_a_gpu():
    trace = read(*gpu())
    assert trace.device
    assert trace.programs[7] == "jit_step"
    assert [edge for step in trace.steps for edge in step] == pytest.approx([0, 0.09, 0.1, 0.19])
    first = jax_ops.of_step(trace, trace.steps[0])
    assert [(event.name, event.copies) for event in first] == [
        ("dot.1", False),
        ("add_fusion", False),
        ("MemcpyD2H", True),
    ]
    assert first[0].track == "device 0: Stream #14(Compute)"
    covered = jax_ops.union(((event.start_ms, event.end_ms) for event in first), trace.steps[0])
    assert covered == [pytest.approx((0.02, 0.06)), pytest.approx((0.065, 0.078))]
    assert [item.kind for item in trace.host if item.start_ms < 0.1] == ["dispatch", "wait"]


def test_what_runs_at_once_shares_its_time_and_the_host_has_the_rest():
    trace = read(*gpu())
    first = jax_ops.of_step(trace, trace.steps[0])
    swept = jax_ops.swept(first, trace.host, lambda event: False, trace.steps[0])
    given = {item.name: ms for item, ms in swept}
    assert given == pytest.approx({"dot.1": 0.04, "add_fusion": 0.009, "MemcpyD2H": 0.004, "step": 0.005}, abs=1e-6)


def test_launches_one_by_one_have_the_modules_that_made_them():
    host, device = Plane("/host:CPU"), Plane("/device:GPU:0")
    host.line(
        "python", (jax_trace.STEP, 0, 100, {}), ("{encoder.0}", 1, 20, {}), ("PjitFunction(add)", 5, 3, {}),
        ("{encoder.1}", 30, 20, {}), ("PjitFunction(add)", 35, 3, {}), ("PjitFunction(mul)", 60, 3, {}),
    )  # fmt: skip
    of = {"hlo_op": "add_fusion", "hlo_module": "jit_add", "program_id": 4}
    device.line(
        "Stream #1", ("k", 10, 4, of), ("k", 40, 4, of),
        *[("m", start, 4, {"hlo_op": "m", "hlo_module": "jit_mul", "program_id": 5}) for start in (70, 80)],
    )  # fmt: skip
    events = read(host, device).events
    assert [event.module for event in events] == ["encoder.0", "encoder.1", "", ""]  # mul: one launch, two runs


def test_a_program_of_the_processor_is_there_whole():
    def step(x):
        return jnp.tanh(x @ x).sum()

    x = jnp.ones((200, 200))
    compiled = jax.jit(step).lower(x).compile()

    def call():
        return jax.block_until_ready(compiled(x))

    call()
    trace = jax_trace.taken(call, 3)
    assert not trace.device
    assert len(trace.steps) == 3
    (number,) = trace.programs
    program = jax_hlo.Program(trace.compiled[number])
    reader = Reader({number: program}, lambda name: place(name, False))
    for first, last in trace.steps:
        events = [event for event in trace.events if first <= event.start_ms < last]
        assert any(reader.rows(event)[0].product_flops == 2 * 200**3 for event in events)
        assert all(event.name in program.named for event in events)
    assert any(item.kind == "dispatch" for item in trace.host)


def test_compilation_within_a_step_is_told():
    def call():
        return jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))

    call()
    trace = jax_trace.taken(call, 1)
    assert any(item.kind == "compile" for item in trace.host)


def test_where_an_operation_stands():
    assert place("jit(step)/jvp({})/{fc.0}/dot_general", True) == Place("fc.0", "forward", "dot_general")
    assert place("jit(step)/transpose(jvp({}))/{fc.0}/transpose", True) == Place("fc.0", "backward", "transpose")
    assert place("jit(step)/jvp({:loss})/jit(_take)/gather", True) == Place("", "loss", "take")
    assert place("jit(step)/{:optimizer}/add", True) == Place("", "optimizer", "add")
    assert place("jit(run)/{}/{rnn}/while/body/closed_call/{rnn.cell}/mul", False) == Place(
        "rnn.cell", "forward", "mul"
    )
    assert place("jit(f)/jvp(encoder)/layer/mul", True, frozenset({"encoder", "layer"})).module == "encoder.layer"
    assert place("jit(relu)/max", False, alone=True).primitive == "relu"
