"""The pictures of a profile: well-formed, within their frame, with the peak and the roofs where they belong."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree as ET

import pytest
import sample_profile_parts
import sample_profiles

from perfkit._quantity import Quantity
from perfkit.profiling._memory_data import MemoryPoint
from perfkit.profiling._profile import Ceilings, Series
from perfkit.profiling._time_data import Op
from perfkit.reporting import _svg, profile_plots
from perfkit.reporting._format import format_bytes

WIDTHS = (900, 350)


def pictures(profile, width: float) -> list[str]:
    drawn = [profile_plots.roofline(profile, width)]
    if profile.memory:
        drawn.append(profile_plots.memory(profile.memory, width))
    drawn += [profile_plots.series(series, width) for device in profile.devices for series in device.series]
    return [picture for picture in drawn if picture]


@pytest.mark.parametrize("name", sample_profiles.FACTORIES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_are_well_formed_and_within_their_frame(name, width):
    for picture in pictures(sample_profiles.FACTORIES[name](), width):
        root = ET.fromstring(picture)
        _, _, right, bottom = map(float, root.get("viewBox").split())
        assert right == width
        assert root.get("role") == "img"
        for path in root.iter("path"):
            points = [tuple(map(float, pair)) for pair in re.findall(r"([-\d.]+),([-\d.]+)", path.get("d"))]
            assert all(-1 <= x <= right + 1 and -1 <= y <= bottom + 1 for x, y in points)
        for dot in root.iter("circle"):
            assert -20 <= float(dot.get("cx")) <= right + 20
            assert -20 <= float(dot.get("cy")) <= bottom


def test_the_roofline_has_each_operation_that_computes_once():
    profile = sample_profiles.cnn()
    root = ET.fromstring(profile_plots.roofline(profile, 900))
    counted = [op for op in profile.time.ops if op.flops and op.moved_bytes]
    assert len(list(root.iter("circle"))) == len(counted)
    titles = " ".join(title.text for title in root.iter("title"))
    assert "aten::mm · fc1 · backward: 28.6% of the step, 48.1 GFLOP/s" in titles


def test_what_reaches_more_lies_higher_and_more_intense_work_further_right():
    low = Op("low", "op", "a", "forward", 1, 1.0, 1e6, 1e6)
    high = Op("high", "op", "b", "forward", 1, 1.0, 1e8, 1e6)
    profile = sample_profiles.cnn(time=sample_profile_parts.time(ops=(low, high)))
    root = ET.fromstring(profile_plots.roofline(profile, 900))
    dots = {dot[0].text.partition(" ")[0]: dot for dot in root.iter("circle")}
    assert float(dots["high"].get("cx")) > float(dots["low"].get("cx"))
    assert float(dots["high"].get("cy")) < float(dots["low"].get("cy"))


@pytest.mark.parametrize("width", WIDTHS)
def test_names_of_dots_stand_in_the_picture_and_hide_no_other_and_no_dot(width):
    """Many long names side by side: those for which there is no room are left out."""
    ops = tuple(
        Op(f"aten::a_rather_long_name_{index}", "op", "encoder", "forward", 1, 1.0, 1e6 * 1.4**index, 1e6)
        for index in range(7)
    )
    root = ET.fromstring(profile_plots.roofline(sample_profiles.cnn(time=sample_profile_parts.time(ops=ops)), width))
    boxes = []
    for text in root.iter("text"):
        if text.get("class") == "small halo":
            left, wide = float(text.get("x")), _svg.text_width(text.text, "small")
            assert left >= 0
            assert left + wide <= width
            boxes.append((left, float(text.get("y")) - 10, left + wide, float(text.get("y")) + 2))
    assert boxes
    dots = [(*(float(dot.get(name)) for name in ("cx", "cy")), float(dot.get("r"))) for dot in root.iter("circle")]
    for index, box in enumerate(boxes):
        assert not any(profile_plots._overlap(box, other) for other in boxes[:index])
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y, _ in dots)


def test_roofs_that_lie_close_together_share_a_line():
    profile = sample_profiles.cnn()
    gflops = {name: Quantity(peak, "GFLOP/s") for name, peak in (("bfloat16", 101.0), ("float32", 100.0))}
    close = dataclasses.replace(profile, ceilings=dataclasses.replace(profile.ceilings, gflops=gflops))
    assert "bfloat16 101, float32 100 GFLOP/s" in profile_plots.roofline(close, 900)


def test_no_roofline_without_roofs_or_operations():
    profile = sample_profiles.cnn()
    no_bandwidth = Ceilings(profile.ceilings.gflops, Quantity.missing("GB/s", "no"))
    idle = dataclasses.replace(profile.time, ops=())
    for changes in ({"ceilings": None}, {"ceilings": no_bandwidth}, {"time": None}, {"time": idle}):
        assert profile_plots.roofline(dataclasses.replace(profile, **changes), 900) == ""


def test_the_peak_survives_thinning():
    points = [MemoryPoint(0.1 * index, {"activations": 1e6}) for index in range(5000)]
    points[3333] = MemoryPoint(333.3, {"activations": 8e6})
    picture = profile_plots.memory(sample_profile_parts.memory(timeline=tuple(points)), 900)
    assert f"peak {format_bytes(8e6)}" in picture
    assert len(picture) < 60_000


def test_the_peak_of_an_arena_is_where_most_of_it_is_in_use():
    """XLA's arena has the same size all the time; what is "other" is not in use."""
    unused, full = {"activations": 1e6, "other": 7e6}, {"activations": 8e6}
    points = (MemoryPoint(0.0, unused), MemoryPoint(5.0, full), MemoryPoint(10.0, unused))
    found = sample_profile_parts.memory(timeline=points, by_category=full)
    (line,) = [
        line for line in ET.fromstring(profile_plots.memory(found, 900)).iter("line") if line.get("class") == "median"
    ]
    middle = (profile_plots.MEMORY_LEFT + 900 - profile_plots.MEMORY_RIGHT) / 2
    assert float(line.get("x1")) == pytest.approx(middle, abs=0.1)


def test_memory_that_is_not_finite_is_drawn_as_nothing():
    points = (MemoryPoint(0.0, {"activations": float("nan")}), MemoryPoint(1.0, {"activations": 1e6}))
    assert "peak 977 KiB" in profile_plots.memory(sample_profile_parts.memory(timeline=points), 900)
    assert profile_plots.memory(sample_profile_parts.memory(timeline=points[:1]), 900) == ""


def test_a_spike_survives_in_a_long_series():
    values = [300.0] * 5000
    values[1234] = 690.0
    picture = profile_plots.series(Series("power", "W", tuple(map(float, range(5000))), tuple(values)), 420)
    assert "300 to 690 W" in picture
    assert len(picture) < 10_000
    assert profile_plots.series(Series("power", "W", (1.0,), (2.0,)), 420) == ""


def test_parts_of_a_whole_fill_the_bar():
    rows = (("forward", "3 ms", 0.75), ("backward", "1 ms", 0.25))
    root = ET.fromstring(profile_plots.shares(rows, ["p0", "p1"], "Phases", 400))
    widths = [float(rect.get("width")) for rect in root.iter("rect")]
    assert widths == [299, 99]
    assert profile_plots.shares((), [], "Phases", 400) == ""
