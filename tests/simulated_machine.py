"""A machine whose clock only the calls themselves advance, in place of the one that timing reads."""

from __future__ import annotations

import types

from perfkit.measure import calls, timing


class Machine:
    """A clock and calls that take time on it; `slow_down(t)` is how much slower it is at time t."""

    def __init__(self, slow_down=lambda _: 1.0):
        self.now_s = 0.0
        self.slow_down = slow_down
        self.log = []

    def perf_counter(self):
        return self.now_s

    def perf_counter_ns(self):
        return round(self.now_s * 1e9)

    def sleep(self, seconds):
        self.now_s += seconds

    def call(self, name, seconds):
        def call():
            self.log.append(name)
            self.now_s += seconds * self.slow_down(self.now_s)
            return name

        return call


def use(monkeypatch, machine):
    """Time calls by that machine's clock."""
    for module in (calls, timing):
        monkeypatch.setattr(module, "time", machine)
    # What this process really waits for a processor is no part of the simulation.
    monkeypatch.setattr(timing, "waited_s", lambda: 0.0)
    return machine


def without_collector(monkeypatch, machine=None):
    """Collect no garbage; on a machine, that takes a millisecond."""

    def collect():
        if machine is not None:
            machine.now_s += 0.001

    collector = types.SimpleNamespace(
        collect=collect,
        freeze=lambda: None,
        unfreeze=lambda: None,
        enable=lambda: None,
        disable=lambda: None,
        isenabled=lambda: False,
        get_freeze_count=lambda: 0,
    )
    for module in (calls, timing):
        monkeypatch.setattr(module, "gc", collector)
