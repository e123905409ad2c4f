"""The Chrome trace: what the format demands, and everything that was recorded."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import sample_profiles


@pytest.mark.parametrize("name", [name for name in sample_profiles.FACTORIES if name != "huge"])
def test_holds_every_span_on_a_named_track(name):
    profile = sample_profiles.FACTORIES[name]()
    events = json.loads(profile.to_trace())["traceEvents"]
    spans = profile.time.spans if profile.time else ()
    drawn = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["cat"]) for event in drawn] == [(span.name, span.kind) for span in spans]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    for event, span in zip(drawn, spans, strict=True):
        assert threads[event["pid"], event["tid"]] == span.track
        assert event["ts"] == pytest.approx(1e3 * span.start_ms, abs=1e-3)
        assert event["dur"] == pytest.approx(1e3 * span.duration_ms, abs=1e-3)
    assert {event["pid"] for event in events} <= set(processes)


def test_a_device_is_a_process_of_its_own():
    events = json.loads(sample_profiles.on_gpu().to_trace())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    kernels = {processes[event["pid"]] for event in events if event.get("cat") == "kernel"}
    assert kernels == {"device 0"}
    assert "host" in processes.values()


def test_spans_of_a_thread_nest():
    """The format has no depth: a span must lie within another or beside it."""
    events = json.loads(sample_profiles.cnn().to_trace())["traceEvents"]
    drawn = sorted((event for event in events if event["ph"] == "X"), key=lambda event: (event["ts"], -event["dur"]))
    open_until: dict[tuple, list[float]] = {}
    for event in drawn:
        stack = open_until.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1] <= event["ts"] + 2e-3:
            stack.pop()
        end = event["ts"] + event["dur"]
        assert not stack or end <= stack[-1] + 2e-3
        stack.append(end)


def test_counts_memory_by_category():
    profile = sample_profiles.cnn()
    events = json.loads(profile.to_trace())["traceEvents"]
    counted = [event["args"] for event in events if event["ph"] == "C"]
    assert counted == [point.bytes_by_category for point in profile.memory.timeline]


def test_says_of_what_it_is():
    about = json.loads(sample_profiles.interrupted().to_trace())["otherData"]
    assert (about["model"], about["mode"], about["outcome"]) == ("MnistCNN", "training", "interrupted")


def test_kinds_of_events_are_those_of_the_format():
    events = json.loads(sample_profiles.on_gpu().to_trace())["traceEvents"]
    assert set(Counter(event["ph"] for event in events)) == {"M", "X", "C"}
