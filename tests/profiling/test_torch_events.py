"""What a profiler tells of a card, put in order: planted events stand in for those of a card."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from types import SimpleNamespace

from perfkit.profiling.torch_count import Call, Count
from perfkit.profiling.torch_events import Event, nested, recorded, union_ns
from perfkit.profiling.torch_operations import Step, operations
from perfkit.profiling.torch_placing import COMPILED_GRAPH, placed
from perfkit.profiling.torch_spans import MOST_SPANS, spans
from perfkit.profiling.torch_time import _attributed, _busy, _phases, _waiting
from perfkit.profiling.torch_where import MODULE, PHASE, STEP

MS = 1_000_000


class Raw:
    """As `torch._C._autograd._KinetoEvent`, with what is read of it."""

    def __init__(self, name, start, end, number=0, launcher=0, stream=None, annotation=False, sequence=-1, thread=1):
        self.told = {
            "name": name,
            "start_ns": start * MS,
            "end_ns": end * MS,
            "correlation_id": number,
            "linked_correlation_id": launcher,
            "device_type": "DeviceType.CPU" if stream is None else "DeviceType.CUDA",
            "device_index": 0,
            "device_resource_id": stream,
            "start_thread_id": thread,
            "sequence_nr": sequence,
            "is_user_annotation": annotation,
        }

    def __getattr__(self, name):
        return lambda: self.told[name]


STEP_ON_A_CARD = [
    Raw(STEP, 0, 100, annotation=True),
    Raw(PHASE + "forward", 1, 30, annotation=True),
    Raw(MODULE + "fc", 2, 20, annotation=True),
    Raw("aten::linear", 3, 15, number=1),
    Raw("aten::addmm", 4, 14, number=2),
    Raw("cudaLaunchKernel", 5, 6, number=90, launcher=2, thread=77),
    Raw("sgemm", 10, 50, number=90, launcher=2, stream=7),
    Raw("bias", 50, 55, number=91, launcher=2, stream=7),
    Raw("autograd::engine::evaluate_function: AddmmBackward0", 31, 40, number=3, sequence=5, thread=2),
    Raw("AddmmBackward0", 31, 39, number=4, sequence=5, thread=2),
    Raw("aten::mm", 32, 38, number=5, thread=2),
    Raw("dgemm", 60, 80, number=92, launcher=5, stream=7),
    Raw("Memcpy HtoD", 82, 84, number=93, launcher=0, stream=9),
    Raw("fc", 10, 90, stream=7, annotation=True),
    Raw("cudaDeviceSynchronize", 70, 95, number=94, thread=77),
    Raw("[memory]", 5, 5),
]
WHERE = SimpleNamespace(maker=lambda number: {5: "fc"}.get(number, ""))
WHOLE = {"aten::addmm", "aten::mm"}


@pytest.fixture
def step():
    results = SimpleNamespace(events=lambda: STEP_ON_A_CARD)
    told = recorded(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)))
    mark = told.host[0]
    return Step(mark, placed(told.host, WHERE, WHOLE), told.runtime, told.device)


def test_kernels_belong_to_the_operation_that_launched_them(step):
    count = Count()
    count.calls["aten::addmm", "fc", "forward"].append(Call("float32[2, 3]", 100.0, 10.0))
    count.calls["aten::mm", "fc", "backward"].append(Call("float32[3, 2]", 200.0, 20.0))
    found = {op.name: op for op in operations([step], count)}
    product = found["sgemm"]
    assert (product.kind, product.module, product.phase, product.self_ms) == ("kernel", "fc", "forward", 40)
    assert (product.flops, found["bias"].flops, found["aten::addmm"].flops) == (100, 0, 0)
    assert (found["dgemm"].module, found["dgemm"].phase, found["dgemm"].flops) == ("fc", "backward", 200)
    assert (found["Memcpy HtoD"].module, found["Memcpy HtoD"].phase) == ("", "other")
    assert found["aten::addmm"].self_ms == 10
    assert found["aten::linear"].self_ms == 2
    assert "fc" not in found
    assert "cudaLaunchKernel" not in found


def test_the_time_of_a_card(step):
    """It computes from 10 to 55 and from 60 to 80 ms, and copies until 84; the host waits from 70 to 95."""
    busy, gaps = _busy([step])
    assert busy == pytest.approx(0.67)
    assert sorted(gap // MS for gap in gaps) == [2, 5, 10, 16]
    assert _waiting([step], "cuda").value == pytest.approx(0.25)
    assert _waiting([step], "cpu").value is None
    ops = operations([step], Count())
    assert _phases([step], ops, on_device=True) == {"forward": 45, "backward": 20, "other": 35}
    assert _attributed([step]).value == pytest.approx(0.74)  # operations and kernels: 3 to 55, 60 to 80, 82 to 84 ms


def test_spans_tell_host_and_streams_apart(step):
    found = {span.name: span for span in spans(step.event, step.placing, step.kernels, step.runtime)}
    assert found["sgemm"].track == "device 0: stream 7"
    assert found["sgemm"].module == "fc"
    assert (found["Memcpy HtoD"].kind, found["Memcpy HtoD"].track) == ("copy", "device 0: stream 9")
    assert found["aten::mm"].track == "host: autograd"
    assert found["cudaDeviceSynchronize"].kind == "wait"
    assert (found["fc"].track, found["fc"].depth, found["aten::addmm"].depth) == ("host", 1, 3)


def test_long_steps_keep_their_phases_and_longestoperations():
    events = [Event(PHASE + "forward", 0, 10**9, lane=1, annotation=True)]
    events += [Event(f"op {i}", i * 1000, i * 1000 + 1 + i % 500, lane=1) for i in range(5000)]
    mark = Event(STEP, 0, 10**9, lane=1)
    found = spans(mark, placed(nested(events), WHERE, ()), [], [])
    assert len(found) == MOST_SPANS
    assert found[0].name == "forward"
    assert min(span.duration_ms for span in found) > 300 / 1e6


def test_what_a_compiled_graph_computes_is_shared_out_by_time():
    events = [
        Event("Torch-Compiled Region: 0/0", 0, 100, lane=1, annotation=True),
        Event("## Call CompiledFxGraph fabc ##", 10, 40, lane=1, number=1, annotation=True),
        Event("## Call CompiledFxGraph fdef ##", 50, 60, lane=1, number=2, annotation=True),
        Event("extern_kernels::mm", 12, 30, lane=1, number=3),
    ]
    count = Count()
    count.calls["aten::mm", "fc", "forward"].append(Call("float32[2, 3]", 100.0, 40.0))
    host = nested([Event(PHASE + "forward", 0, 100, lane=1, annotation=True), *events])
    step = Step(Event(STEP, 0, 100, lane=1), placed(host, WHERE, {COMPILED_GRAPH}), [], [])
    (found,) = operations([step], count)
    assert (found.name, found.calls, found.self_ms, found.flops) == (COMPILED_GRAPH, 2, 40 / MS, 100)


def test_the_union_of_intervals():
    assert union_ns([(0, 10), (5, 12), (20, 30), (22, 25)]) == (22, [8])
    assert union_ns([]) == (0, [])
    assert union_ns([(3, 3), (3, 5)]) == (2, [])
