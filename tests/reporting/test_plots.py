"""Pictures that are well-formed, in proportion, and whose labels neither leave the picture nor lie on each other."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree as ET

import pytest

from perfkit._quantity import Quantity
from perfkit._report import LossCurves
from perfkit.reporting import _svg, plots
from perfkit.reporting.html import NARROW, WIDE

PLOTS = {plot.__name__: plot for plot in (plots.waterfall, plots.candidates, plots.latency, plots.memory, plots.losses)}


def drawn(plot, report, width=WIDE) -> ET.Element:
    return ET.fromstring(plot(report, width))


def of(root: ET.Element, tag: str, *kinds: str) -> list[ET.Element]:
    """The elements that have all these classes."""
    return [item for item in root.iter(tag) if set(kinds) <= set(item.get("class", "").split())]


def at(item: ET.Element, name: str) -> float:
    return float(item.get(name))


def texts(root: ET.Element) -> list[str]:
    return [item.text for item in root.iter("text")]


def boxes(root: ET.Element) -> list[tuple[str, float, float, float, float]]:
    """Each label with its left, right, top and bottom, estimated on the generous side."""
    found = []
    for item in root.iter("text"):
        kind, x, y = item.get("class"), at(item, "x"), at(item, "y")
        width = _svg.text_width(item.text, kind)
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[item.get("text-anchor")]
        size = _svg.SMALL_SIZE if "small" in kind else _svg.LABEL_SIZE
        found.append((item.text, left, left + width, y - 0.8 * size, y + 0.2 * size))
    return found


def pictures(name: str, width: float, reports: dict) -> list[ET.Element]:
    """This plot of every report that has data for it."""
    sources = [PLOTS[name](report, width) for report in reports.values()]
    found = [ET.fromstring(source) for source in sources if source]
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", PLOTS)
def test_well_formed_and_named(reports, name, width):
    for root in pictures(name, width, reports):
        assert root.tag == "svg"
        assert root.get("role") == "img"
        assert root.get("aria-label") == root.find("title").text
        assert len(root.find("desc").text) > 20
        assert {item.tag for item in root.iter()} <= {"svg", "title", "desc", "line", "rect", "circle", "path", "text"}
        values = " ".join(value for item in root.iter() if item is not root for value in item.attrib.values())
        assert not re.search("nan|inf", values)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", PLOTS)
def test_labels_stay_inside_and_apart(reports, name, width):
    for root in pictures(name, width, reports):
        _, _, right, bottom = map(float, root.get("viewBox").split())
        found = boxes(root)
        for label, x1, x2, y1, y2 in found:
            assert x1 >= -2, label
            # The estimate is generous; a label at the edge may end in the page's margin.
            assert x2 <= right + 12, label
            assert y1 >= -2, label
            assert y2 <= bottom + 2, label
        for index, (label, x1, x2, y1, y2) in enumerate(found):
            for other, x3, x4, y3, y4 in found[index + 1 :]:
                assert x2 <= x3 or x4 <= x1 or y2 <= y3 or y4 <= y1, f"{label!r} lies on {other!r}"


def test_reports_without_data_have_no_empty_picture(reports):
    assert plots.waterfall(reports["not_measured"], WIDE) == ""
    assert plots.latency(reports["unavailable"], WIDE) == ""
    assert plots.losses(reports["fast"], WIDE) == ""
    assert plots.candidates(reports["fast"], WIDE) == ""
    everything = [name for name, plot in PLOTS.items() if plot(reports["hostile"], WIDE)]
    assert everything == list(PLOTS), "and the report that has everything shows everything"


def test_names_are_text_in_pictures(reports):
    for plot in (plots.waterfall, plots.candidates):
        source = plot(reports["hostile"], WIDE)
        assert "<script" not in source
        assert any("alert('x')" in (item.text or "") for item in ET.fromstring(source).iter("title"))


def test_waterfall_bars_join_the_ratios(reports):
    root = drawn(plots.waterfall, reports["fast"])
    first, second, third, fourth, total = of(root, "rect", "bar")
    (reference,) = of(root, "line", "reference")
    scale = (at(total, "width")) / (1.84 - 1)
    assert at(first, "x") == at(total, "x") == pytest.approx(at(reference, "x1"), abs=0.1)
    for bar, before, after in ((first, 1, 1.06), (second, 1.06, 1.49), (fourth, 1.48, 1.84)):
        assert at(bar, "width") == pytest.approx(scale * (after - before), abs=0.5)
    assert at(second, "x") == pytest.approx(at(first, "x") + at(first, "width"), abs=0.2)
    assert "loss" in third.get("class")
    assert "gain" in second.get("class")
    assert "total" in total.get("class")
    assert "NO_EFFECT · 0 touched, 1 skipped" in texts(root)
    assert "1.49× [1.46, 1.52]" in texts(root)


def test_waterfall_whiskers_span_the_interval(reports):
    report = reports["fast"]
    root = drawn(plots.waterfall, report)
    total = of(root, "rect", "total")[0]
    scale = at(total, "width") / (report.speedup.ratio - 1)
    spans = [at(item, "x2") - at(item, "x1") for item in of(root, "line", "whisker")]
    expected = [step.speedup.high - step.speedup.low for step in report.steps]
    expected.append(report.speedup.high - report.speedup.low)
    assert spans == pytest.approx([scale * width for width in expected], abs=0.3)


def test_waterfall_without_a_result_shows_no_total(reports):
    assert not of(drawn(plots.waterfall, reports["original_returned"]), "rect", "total")


def test_a_step_that_was_not_measured_keeps_its_row(make):
    report = make.report(steps=(make.step("bf16", None), make.step("compile", 1.84)))
    root = drawn(plots.waterfall, report)
    assert "bf16" in texts(root)
    assert "not measured" in texts(root)
    assert len(of(root, "rect", "bar")) == 2


def test_candidates_fastest_first_and_the_winner_filled(reports):
    root = drawn(plots.candidates, reports["auto"])
    dots = of(root, "circle", "dot")
    places = [at(dot, "cx") for dot in dots]
    assert places == sorted(places, reverse=True)
    assert ["won" in dot.get("class") for dot in dots] == [False, True, False, False, False, False]
    assert "lost · fidelity failed" in texts(root)


def test_many_candidates_are_cut_but_never_the_winner(reports):
    slow = dataclasses.replace(reports["huge_names"].candidates[0], recipe="slow", outcome="won")
    slow = dataclasses.replace(slow, speedup=dataclasses.replace(slow.speedup, ratio=1.19))
    report = dataclasses.replace(reports["huge_names"], candidates=(*reports["huge_names"].candidates, slow))
    root = drawn(plots.candidates, report)
    assert len(of(root, "circle", "dot")) == plots.MOST_CANDIDATES + 1
    assert len(of(root, "circle", "won")) == 1
    assert f"{plots.MOST_CANDIDATES + 1} candidates of 81" in root.find("desc").text


def test_latency_medians_share_one_axis(reports):
    report = reports["fast"]
    root = drawn(plots.latency, report)
    before, after = of(root, "line", "median")
    assert at(after, "x1") < at(before, "x1")
    ticks = {float(item.text): at(item, "x") for item in root.iter("text") if re.fullmatch(r"\d+", item.text)}
    (low, start), (high, end) = sorted(ticks.items())[0], sorted(ticks.items())[-1]
    for line, median in ((before, report.before.latency.median_ms), (after, report.after.latency.median_ms)):
        assert at(line, "x1") == pytest.approx(start + (median - low) / (high - low) * (end - start), abs=0.5)
    assert "milliseconds per call" in texts(root)


def test_latency_is_logarithmic_only_beyond_eight_times(reports):
    assert "milliseconds per call, logarithmic" in texts(drawn(plots.latency, reports["twelve_steps"]))
    assert not any("logarithmic" in text for text in texts(drawn(plots.latency, reports["fast"])))


def test_latency_names_what_lies_beyond_the_axis(reports):
    told = texts(drawn(plots.latency, reports["fast"]))
    worst = max(reports["fast"].before.latency.samples_ms)
    assert f"before: 1 call beyond the axis, up to {worst:.1f} ms" in told


def test_latency_survives_odd_samples(make):
    constant = dataclasses.replace(make.latency(5.0), samples_ms=(5.0,) * 30, median_ms=5.0)
    single = dataclasses.replace(make.latency(5.0), samples_ms=(5.0,), median_ms=5.0)
    nothing = dataclasses.replace(make.latency(5.0), samples_ms=())
    for found, pictures in ((constant, 2), (single, 2), (nothing, 1)):
        report = make.report(after=make.measurement("result", latency=found))
        assert len(of(drawn(plots.latency, report), "path", "hist")) == pictures


def test_memory_bars_are_in_proportion(reports):
    report = reports["fast"]
    root = drawn(plots.memory, report)
    bars = [at(bar, "width") for bar in of(root, "rect", "bar")]
    assert len(bars) == 6
    assert bars[1] / bars[0] == pytest.approx(16.1 / 31.2, abs=0.01)
    assert bars[5] / bars[4] == pytest.approx(report.after.model_bytes / report.before.model_bytes, abs=0.01)
    assert "31.2 MiB" in texts(root)


def test_memory_that_is_unavailable_is_said_and_not_drawn(make):
    after = make.measurement("result", process_high_water_bytes=Quantity.missing("B", "no /proc"))
    root = drawn(plots.memory, make.report(after=after))
    assert len(of(root, "rect", "bar")) == 5
    assert texts(root).count("unavailable") == 1


def test_losses_draw_both_curves_and_leave_gaps(make):
    nan = float("nan")
    curves = LossCurves((1.0, 0.8, 0.7, 0.6, 0.5, 0.45), (1.0, 0.8, nan, 0.6, 0.5, 0.45))
    root = drawn(plots.losses, make.report(losses=curves))
    before, after = (of(root, "path", "curve", side) for side in ("before", "after"))
    assert (len(before), len(after)) == (1, 2)
    assert before[0].get("d").count(",") == 6
    assert [path.get("d").count(",") for path in after] == [2, 3]
    assert "after: 1 step not finite" in texts(root)


def test_losses_are_thinned_but_keep_their_end(reports):
    root = drawn(plots.losses, reports["training"])
    (path,) = of(root, "path", "curve", "after")
    points = path.get("d").split()
    assert plots.MOST_POINTS / 2 < len(points) <= plots.MOST_POINTS + 1
    assert float(points[-1].split(",")[0]) == WIDE - 10


@pytest.mark.parametrize(
    ("low", "high"), [(0.97, 1.9), (1.0, 1.012), (0.02, 0.5), (1.0, 1000.0), (3.2, 3.9), (0.9, 9.0)]
)
@pytest.mark.parametrize("log", [False, True])
def test_scales_have_round_ticks_inside(low, high, log):
    scale = _svg.scale([low, high], 10, 300, log=log)
    ticks = scale.ticks(7)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    for tick in ticks:
        assert scale.low <= tick <= scale.high
        assert 10 <= scale(tick) <= 300
        assert len(f"{tick:.4g}") <= 6
