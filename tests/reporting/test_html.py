"""Pages that are whole, self-contained, safe and legible; what they look like is for eyes."""

from __future__ import annotations

import re

import pytest
from html_page import Page, problems

from perfkit.reporting import html
from perfkit.reporting._format import clean


@pytest.mark.parametrize(
    "broken",
    [
        "<p>open",
        "<b><i></b></i>",
        "<a href='https://example.org'>x</a>",
        "<script>1</script>",
        "<p onclick='x'></p>",
        "<style>@import 'x'</style>",
        "<style>p { background: url(x) }</style>",
        "<p style='background: url(x)'></p>",
        "<p id='a'></p><p id='a'></p>",
        "<a href='#nowhere'>x</a>",
    ],
)
def test_the_check_itself_finds_problems(broken):
    assert problems(broken)


def test_page_is_whole_and_self_contained(report):
    source = html.render(report)
    assert problems(source) == []
    assert source.lstrip().startswith("<!doctype html>")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in source


def test_embedded_is_a_fragment(report):
    source = html.embedded(report)
    assert problems(source) == []
    assert not {"html", "head", "body", "main"} & set(Page(source).tags)
    assert source == report._repr_html_()


def test_style_reaches_nothing_outside_the_report(reports):
    (style,) = Page(html.embedded(reports["auto"])).styles
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    selectors = [part for part in re.findall(r"([^{}]+)\{", style) if not part.strip().startswith("@")]
    assert len(selectors) > 50
    for selector in selectors:
        for alternative in re.sub(r"\([^)]*\)", "", selector).split(","):
            assert alternative.strip().startswith(".perfkit"), selector


def test_several_reports_on_one_page(reports):
    source = html.page([(f"label of {name}", report) for name, report in reports.items()])
    page = Page(source)
    assert problems(source) == []
    assert page.tags.count("article") == len(reports)
    assert len(page.targets) == len(reports), "the table links to each"
    table = page.words[: page.words.index("label of hostile") + 200]
    for fact in ("12 measured runs", "Original returned", "Not measured", "1.84×", "6: int8, int8_dynamic and 4 more"):
        assert fact in table


def test_one_and_no_report_on_a_page(reports):
    assert "1 measured run" in Page(html.page([("x", reports["fast"])])).words
    assert problems(html.page([])) == []


def test_tells_the_proof(reports):
    words = Page(html.render(reports["auto"])).words
    for fact in (
        "MnistCNN",
        "1.84× faster [1.80, 1.88]",
        "99% interval from 200 interleaved pairs",
        "tensor peak 31.2 MiB → 16.1 MiB −48.4%",
        "Unavailable p99 latency: needs 662 samples, 200 were taken",
        "tensor peak: allocations traced during one call",
        "NO_EFFECT",
        "fewer than 8 channels would be left",
        "Within tolerance",
        "0.01 = 2 × the original's error + 0.01",
        "1.21× [1.19, 1.23] faster, compared with torch.compile",
        "pays back after 1,674 calls optimizing took 9.40 s",
        "the budget of 60 s was spent",
        "Timed with 2 threads.",
        "float32_matmul_precision highest",
        "perfkit 0.1.0 · 2025-11-23T10:00:00Z",
    ):
        assert fact in words


def test_tells_what_went_wrong(reports):
    words = Page(html.render(reports["failed_fidelity"])).words
    assert "Original returned" in words
    assert "Fidelity failed: output 0 holds inf where the original is finite" in words
    assert "applied, simulated" in words
    assert "failed: at most 0.01 allowed" in words
    unavailable = Page(html.render(reports["unavailable"])).words
    assert "pays back unavailable nothing was timed; optimizing took 9.40 s" in unavailable
    assert not re.search(r"(?<![\d.])0 (B|s|ms|items/s)\b", unavailable)


def test_names_are_text_wherever_they_stand(reports, hostile_text):
    for source in (
        html.render(reports["hostile"]),
        html.embedded(reports["hostile"]),
        html.page([(hostile_text, reports["hostile"])]),
    ):
        assert problems(source) == []
        assert "<script" not in source
        assert clean(hostile_text) in Page(source).words
        assert not re.search("[\x00-\x08\x0b-\x1f]", source)


def test_unicode_can_be_written(reports):
    source = html.render(reports["unicode_names"])
    assert source.encode("utf-8").decode("utf-8") == source
    assert "模型 🚀 Ünïcodeevil" in source
    assert "\u202e" not in source


def test_only_sections_with_something_to_show(reports):
    fast, training = (Page(html.render(reports[name])).words for name in ("fast", "training"))
    assert "Training loss" not in fast
    assert "Candidates" not in fast
    assert "Training loss" in training
    assert "How many calls took how long" not in Page(html.render(reports["not_measured"])).words


def test_long_lists_are_cut_and_say_so(reports):
    words = Page(html.render(reports["huge_names"])).words
    assert "and 240 more" in words


def test_is_small(report, make):
    assert len(html.render(report).encode()) < 300_000
    many = make.measurement("many", latency=make.latency(5.0, count=5000))
    assert len(html.render(make.report(before=many, after=many)).encode()) < 60_000


def test_same_report_same_page(reports):
    assert html.render(reports["auto"]) == html.render(reports["auto"])


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
    parts = [int(digits[index : index + 2], 16) / 255 for index in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_light_dark_and_print(reports):
    (style,) = Page(html.embedded(reports["fast"])).styles
    themes = re.findall(r"--paper: [^}]+", style)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): #(\w+)", theme))
        for name in ("ink", "muted", "after", "bad"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, "text"
        for name in ("before", "after"):
            assert contrast(colours[name], colours["paper"]) >= 3, "the outline of a mark"
