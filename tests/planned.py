"""A model's costs and a cluster, with which the planner's formulas are tested."""

from perfkit.parallel.links import Ring
from perfkit.parallel.planning_parts import Cluster, Costs, Overheads, Split, Unit

MB = 1_000_000
SLOW = Ring(1e-3, 1e9)
UNITS = tuple(Unit(name, seconds, 10 * MB, 2, MB) for name, seconds in zip("abcd", (0.1, 0.2, 0.1, 0.1), strict=True))
SPLIT = Split("b", 0.2, 0.5, 10 * MB, (("all_reduce", MB), ("gather_inside", MB)))
COSTS = Costs(
    rows=64,
    pass_s={4: 0.1, 8: 0.15, 32: 0.45, 64: 0.85},
    update_s=0.02,
    forward_s=0.6,
    units=UNITS,
    splits={2: (SPLIT,)},
    gradients=(5 * MB,) * 8,
)


def cluster(devices=2, link=SLOW, overlaps=False, **overheads):
    return Cluster(devices, link, overlaps, Overheads(**overheads))
