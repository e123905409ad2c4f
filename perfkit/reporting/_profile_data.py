"""What the page's script draws: the spans of the timeline and the tree of modules, cut to what can be seen."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from perfkit.profiling import _views
from perfkit.profiling._memory_data import Memory
from perfkit.profiling._profile import Profile
from perfkit.profiling._time_data import Span, Time
from perfkit.reporting import _profile_rows, profile_plots
from perfkit.reporting._format import clean, shorten

MOST_SPANS, MOST_NODES, MOST_NAME, MOST_ROWS, MOST_DEPTH = 20_000, 4000, 120, 32, 40
COLOURS = 7
"""Colours of modules; what belongs to none of them has one more, grey."""

# Above this share of the time, a module says nothing by its colour: its parts get colours of their own.
DOMINANT = 0.8


@dataclass
class Node:
    """A part of the tree that the map is drawn from.

    Args:
        role: "module", "op" (an operation directly in its module), "memory" (what a module holds), "phase" (operations
            outside of all modules), "outside" (what no operation fills).
        kind: a module's class.
        path: of the module that it is or belongs to.
    """

    name: str
    role: str
    kind: str
    path: str
    time: float = 0.0
    flops: float = 0.0
    memory: float = 0.0
    children: dict[tuple[str, str], Node] = field(default_factory=dict)

    def child(self, name: str, role: str, path: str, kind: str = "") -> Node:
        """The child of that name and role, made where there is none."""
        if (role, name) not in self.children:
            shown = shorten(clean(name), MOST_NAME)
            self.children[role, name] = Node(shown, role, shorten(clean(kind), MOST_NAME), path)
        return self.children[role, name]

    def modules(self) -> list[Node]:
        """The modules directly in it, the costliest first."""
        found = [child for child in self.children.values() if child.role == "module"]
        return sorted(found, key=lambda child: (-child.time, -child.memory, child.path))


def script_data(profile: Profile, root: Node, colours: dict[str, int]) -> Markup:
    """The data as JSON that is safe inside a `<script>` element; `root` from `tree`, `colours` from `colours`."""
    spans = _columns(profile.time, colours) if profile.time is not None else None
    memory = _memory(profile.memory) if profile.memory is not None else None
    return _inline({"tree": _flat(root, colours), "spans": spans, "memory": memory})


def _memory(memory: Memory) -> dict[str, Any]:
    """What the picture of memory shows, for reading a moment off it."""
    points, names = profile_plots.thinned(memory.timeline), _profile_rows.categories(memory)
    return {
        "names": names,
        "at": [round(point.at_ms, 4) for point in points],
        "held": [[round(profile_plots.held(point, name)) for name in names] for point in points],
        "left": profile_plots.MEMORY_LEFT,
        "right": profile_plots.MEMORY_RIGHT,
    }


def _inline(data: Any) -> Markup:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # escaped above; everything beyond ASCII is escaped by json


def left_out(profile: Profile) -> int:
    """How many spans are too many for the page."""
    return max(0, len(profile.time.spans) - MOST_SPANS) if profile.time else 0


def tree(profile: Profile) -> Node:
    """Time and arithmetic from the operations up, memory from what each module holds."""
    kinds = {module.path: module.kind for module in profile.time.modules} if profile.time else {}
    root = Node(shorten(clean(profile.model), MOST_NAME), "module", "", "")
    if profile.time is not None:
        for op in _views.hottest(profile.time):
            if op.module or op.phase in ("forward", "backward"):
                home = _module(root, op.module, kinds)
            else:
                home = root.child(f"({op.phase})", "phase", "")
            leaf = home.child(op.name, "op", op.module)
            leaf.time += _finite(op.self_ms)
            leaf.flops += _finite(op.flops)
    for path, held in _held_by_module(profile).items():
        if held > 0:
            _module(root, path, kinds).child("activations", "memory", path).memory += held
    _sum(root)
    if profile.time is not None and (outside := _views.whole_ms(profile.time) - root.time) > 0 < root.time:
        name = "(device idle)" if _views.on_device(profile.time) else "(outside of operations)"
        root.child(name, "outside", "").time = outside
        root.time += outside
    return root


def _held_by_module(profile: Profile) -> dict[str, float]:
    """Activations by the module that made them: those kept for the backward pass, else those held at the peak."""
    kept = {module.path: _finite(module.saved_bytes) for module in profile.time.modules} if profile.time else {}
    if not any(kept.values()):
        return {path: _finite(size) for path, size in profile.memory.by_module.items()} if profile.memory else {}
    own = dict(kept)
    for path, size in kept.items():
        above = path
        while above:
            above = above.rpartition(".")[0]
            if above in own:
                own[above] -= size
                break
    return own


def _module(root: Node, path: str, kinds: dict[str, str]) -> Node:
    node, reached = root, ""
    for part in path.split(".", MOST_DEPTH) if path else ():
        reached = f"{reached}.{part}" if reached else part
        node = node.child(part, "module", reached, kinds.get(reached, ""))
    return node


def _sum(node: Node) -> None:
    for child in node.children.values():
        _sum(child)
        node.time += child.time
        node.flops += child.flops
        node.memory += child.memory


def colours(root: Node) -> dict[str, int]:
    """A colour for each of the costliest modules, at the level where the model first divides."""
    level = root
    while True:
        modules = level.modules()
        if not modules or (len(modules) > 1 and modules[0].time < DOMINANT * level.time) or not modules[0].modules():
            return {child.path: index for index, child in enumerate(modules[:COLOURS])}
        level = modules[0]


def _coloured(path: str, colours: dict[str, int]) -> int:
    while path:
        if path in colours:
            return colours[path]
        path = path.rpartition(".")[0]
    return COLOURS


def _flat(root: Node, colours: dict[str, int]) -> dict[str, list]:
    """The tree as columns, parents before children; the smallest nodes are left out where there are too many."""
    nodes: list[tuple[Node, int]] = [(root, -1)]
    index = 0
    while index < len(nodes):
        nodes += [(child, index) for child in nodes[index][0].children.values()]
        index += 1
    if len(nodes) > MOST_NODES:
        nodes = _largest(nodes)
    return {
        "name": [node.name for node, _ in nodes],
        "role": [node.role for node, _ in nodes],
        "kind": [node.kind for node, _ in nodes],
        "parent": [parent for _, parent in nodes],
        "colour": [_coloured(node.path, colours) for node, _ in nodes],
        "time": [_rounded(node.time) for node, _ in nodes],
        "flops": [_rounded(node.flops) for node, _ in nodes],
        "memory": [_rounded(node.memory) for node, _ in nodes],
    }


def _largest(nodes: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
    """Those that weigh most by any measure, each with its parents: a parent weighs at least as much."""
    root = nodes[0][0]

    def weight(node: Node) -> float:
        wholes = ((node.time, root.time), (node.flops, root.flops), (node.memory, root.memory))
        return max(part / whole if whole else 0.0 for part, whole in wholes)

    ranked = sorted(range(len(nodes)), key=lambda index: (-weight(nodes[index][0]), index))[:MOST_NODES]
    kept = sorted(ranked)
    places = {index: place for place, index in enumerate(kept)}
    return [(nodes[index][0], places.get(nodes[index][1], -1 if index == 0 else 0)) for index in kept]


def _columns(time: Time, colours: dict[str, int]) -> dict[str, Any]:
    """The spans as columns, in the order of their start; names and tracks once each."""
    finite = (span for span in time.spans if math.isfinite(span.start_ms) and math.isfinite(span.duration_ms))
    longest = sorted(finite, key=lambda span: -span.duration_ms)[:MOST_SPANS]
    spans = sorted(longest, key=lambda span: (span.start_ms, span.depth, -span.duration_ms))
    tables: dict[str, dict[str, int]] = {"names": {}, "tracks": {}, "kinds": {}, "modules": {}}

    def place(table: str, text: str) -> int:
        return tables[table].setdefault(shorten(clean(text), MOST_NAME), len(tables[table]))

    rows = _rows(spans)
    columns: dict[str, Any] = {
        "name": [place("names", span.name) for span in spans],
        "track": [place("tracks", span.track) for span in spans],
        "kind": [place("kinds", span.kind) for span in spans],
        "module": [place("modules", span.module) for span in spans],
        "colour": [_coloured(span.module, colours) for span in spans],
        "row": rows,
        "start": [round(span.start_ms, 4) for span in spans],
        "length": [round(max(span.duration_ms, 0.0), 4) for span in spans],
    }
    return columns | {name: list(table) for name, table in tables.items()}


def _rows(spans: list[Span]) -> list[int]:
    """The row of each span in its track: its depth, or the next one below in which nothing is under way.

    Work that goes on at once need not be nested, and what lies in one row must not overlap.
    """
    ends: dict[str, list[float]] = {}
    found = []
    for span in spans:
        busy = ends.setdefault(span.track, [])
        row = min(span.depth, MOST_ROWS - 1)
        while row < min(len(busy), MOST_ROWS - 1) and busy[row] > span.start_ms + 1e-4:
            row += 1
        busy += [-math.inf] * (row + 1 - len(busy))
        busy[row] = max(busy[row], span.start_ms + span.duration_ms)
        found.append(row)
    return found


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
