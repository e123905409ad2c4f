"""Steps made up of operations, for tests of advice on them."""

from __future__ import annotations

import sample_profiles as samples

from perfkit._quantity import Quantity
from perfkit.profiling._profile import Ceilings, Profile
from perfkit.profiling._time_data import Op
from perfkit.profiling.advice import findings

MACHINE = Ceilings(
    {"float32": Quantity(100.0, "GFLOP/s"), "bfloat16": Quantity(400.0, "GFLOP/s")}, Quantity(20.0, "GB/s")
)


def op(name: str, self_ms: float, module: str = "", **more) -> Op:
    fields = {"kind": "op", "phase": "forward", "calls": 1, "flops": 0.0, "moved_bytes": 0.0, "shapes": ""} | more
    return Op(name, module=module, self_ms=self_ms, **fields)


def product(self_ms: float = 10.0, dtype: str = "float32", module: str = "fc", share_of_peak: float = 0.8) -> Op:
    """A matrix product at a share of 100 GFLOP/s, and of little memory."""
    shapes = f"{dtype}[512, 512], {dtype}[512, 512]"
    return op("aten::addmm", self_ms, module, flops=share_of_peak * self_ms * 1e8, moved_bytes=3e6, shapes=shapes)


def profile(*ops: Op, mode: str = "inference", other_ms: float = 0.0, **changes) -> Profile:
    """A step that these operations, and time outside of all, make up."""
    phases = {}
    for each in ops:
        phases[each.phase] = phases.get(each.phase, 0.0) + each.self_ms
    whole = sum(phases.values()) + other_ms
    time = samples.time(
        mode == "training",
        ops=ops,
        phases_ms=phases | {"other": other_ms},
        step=samples.latency(whole),
        busy=Quantity(1 - other_ms / whole, "ratio"),
        overhead=Quantity(1.0, "ratio"),
        modules=changes.pop("modules", ()),
        spans=changes.pop("spans", ()),
        **{name: changes.pop(name) for name in ("waiting", "recompiles") if name in changes},
    )
    memory = samples.memory(mode == "training", by_category={}, **changes.pop("memory", {}))
    given = {"ceilings": MACHINE, "memory": memory, "findings": (), "notes": (), "mode": mode} | changes
    return samples.cnn(mode == "training", time=time, **given)


def found(*ops: Op, kind: str, **changes):
    (finding,) = [finding for finding in findings(profile(*ops, **changes)) if finding.kind == kind]
    return finding


def kinds(*ops: Op, **changes) -> set[str]:
    return {finding.kind for finding in findings(profile(*ops, **changes))}
