"""Markdown that shows names as they are, keeps its tables whole, and calls nobody."""

from __future__ import annotations

import random
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt  # what rich itself depends on

from perfkit.reporting import markdown
from perfkit.reporting._format import clean

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
# GitHub cuts a comment off here.
LONGEST_COMMENT = 65_536


class Page(HTMLParser):
    """The text nodes of rendered Markdown, those in code apart, and the cells of each table row."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.code: list[str] = []
        self.text: list[str] = []
        self.tables: list[list[int]] = []
        self._in_code = False
        self.feed(PARSER.render(source))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append(0)
        elif tag in ("td", "th"):
            self.tables[-1][-1] += 1
        self._in_code |= tag == "code"

    def handle_endtag(self, tag):
        self._in_code &= tag != "code"

    def handle_data(self, data):
        (self.code if self._in_code else self.text).append(data)


def test_tells_the_proof(reports):
    told = markdown.render(reports["auto"])
    for fact in (
        "### perfkit: 1.84× \\[1.80, 1.88\\] faster",
        "`MnistCNN` · torch · inference · cpu · recipe `auto`",
        "| tensor peak | 31.2 MiB | **16.1 MiB** | −48.4% |",
        "unavailable: p99 latency: needs 662 samples, 200 were taken",
        "| `prune(amount=0.3)` | NO_EFFECT | 0 | 1 | 1.48× [1.45, 1.51] faster |",
        "- `bf16` skipped 1 × sensitive: kept in float32",
        "**fidelity** ok: relative error 3.1e-3, at most 0.01 allowed",
        "**compiler** 1.21×",
        "**payback** after 1,674 calls",
        "| `int8` | lost | 2.20× [2.16, 2.24] | failed, 3.1e-3 | relative error 0.2, at most 0.01 allowed |",
        "| `qat` | not tried | the budget of 60 s was spent |",
        "- processor: AMD EPYC 9B14, 2 cores",
    ):
        assert fact in told


def test_tells_what_went_wrong(reports):
    assert "### perfkit: Original returned" in markdown.render(reports["original_returned"])
    assert "### perfkit: Not measured: no example_inputs were given" in markdown.render(reports["not_measured"])
    assert "> **Fidelity failed: output 0 holds inf" in markdown.render(reports["failed_fidelity"])
    assert "applied, simulated" in markdown.render(reports["failed_fidelity"])


def test_every_table_is_whole(report):
    page = Page(markdown.render(report))
    assert page.tables
    for rows in page.tables:
        assert len(rows) > 1
        assert len(set(rows)) == 1
    assert page.tags.count("details") >= 1


def test_fits_a_comment(report):
    assert len(markdown.render(report)) < LONGEST_COMMENT


def test_names_are_not_markup(reports, hostile_text):
    page = Page(markdown.render(reports["hostile"]))
    assert not {"script", "a", "em", "img"} & set(page.tags)
    assert clean(hostile_text).replace("|", "¦") in page.code
    assert "alert('x')" in "".join(page.text)


def test_nobody_is_mentioned(reports):
    page = Page(markdown.render(reports["hostile"]))
    assert "octocat" in "".join(page.text), "the name is there"
    assert not any("@octocat" in node for node in page.text), "but not as a mention"


@pytest.mark.parametrize(
    "value",
    [
        "a_b __init__ _x_ *y* **z** ~~gone~~",
        "<b>bold</b> <!-- hidden --> &amp; &lt;",
        "[link](x) ![image](y) [ref]: z",
        "# heading",
        "- item",
        "+ item",
        "1. item",
        "2) item",
        "=====",
        "---",
        "> quote",
        "a | b || c",
        "back\\slash \\* `tick` ``ticks``",
        "$x^2$ https://example.org",
    ],
)
def test_text_survives_rendering(value):
    assert "".join(Page(markdown.text(value)).text).strip() == value
    row = Page(f"| a | b |\n| --- | --- |\n| {markdown.text(value)} | {markdown.code(value)} |")
    assert row.tables == [[2, 2]]


def test_any_text_survives_rendering():
    source = random.Random(11)
    for _ in range(400):
        value = clean("".join(source.choices("ab1 \\`*___**{}[]()<>#+-.!|~&;:=@$^\"'", k=source.randrange(1, 24))))
        # A trailing space is not text, and Markdown has no way to write an empty paragraph.
        if value:
            assert "".join(Page(markdown.text(value)).text).strip() == value
            assert "".join(Page(f"x {markdown.code(value)} y").code).strip() == value.replace("|", "¦")


def test_code_is_cut_and_empty_code_is_nothing():
    assert markdown.code("a" * 100, 10) == f"`{'a' * 9}…`"
    assert markdown.code("") == ""
