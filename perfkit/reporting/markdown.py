"""A report as Markdown for a pull request: GitHub's flavour, short, and safe against what models are called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from perfkit._report import Report
from perfkit.reporting import _environment_facts, _facts, _parallel_facts, _search_facts, _table_facts
from perfkit.reporting._format import clean, counted, listing, shorten

# A comment holds 65,536 characters; a reader holds fewer.
MOST_NAME_LENGTH, MOST_TEXT_LENGTH = 80, 400
MOST_STEPS, MOST_REASONS, MOST_CANDIDATES, MOST_ALIKE, MOST_NOTES = 30, 3, 25, 4, 20

# What starts markup anywhere, and what does so at the start of a line. An underscore inside a word starts nothing.
_MARKUP = re.compile(r"([\\`*\[\]<>~&$|]|(?<![^\W_])_|_(?![^\W_])|:(?=//))")
_BLOCK = re.compile(r"^(\d*)([-+=#.)])(?=$|[\s=#-])")
_REFERENCE = re.compile(r"([@#])(?=\w)")


def render(report: Report) -> str:
    """The report as Markdown.

    Example:
        >>> Path("comment.md").write_text(markdown.render(result.report))  # doctest: +SKIP
    """
    blocks = [*_header(report), *_quantities(report), *_steps(report), *_facts_list(report), *_candidates(report)]
    return "\n\n".join(blocks + list(_footer(report))) + "\n"


def text(value: str, length: int = MOST_TEXT_LENGTH) -> str:
    """`value` so that Markdown shows it as it is: no markup, no table cell ended, nobody mentioned."""
    escaped = _BLOCK.sub(r"\1\\\2", _MARKUP.sub(r"\\\1", shorten(clean(value), length)))
    # An empty comment keeps "@name" and "#12" from becoming a notification or a link; a backslash does not.
    return _REFERENCE.sub(r"\1<!-- -->", escaped)


def code(value: str, length: int = MOST_NAME_LENGTH) -> str:
    """`value` as inline code that may stand in a table: the fence is longer than any run of backticks in it."""
    value = shorten(clean(value), length)
    if not value:
        return ""
    fence = "`" * (max(map(len, re.findall("`+", value)), default=0) + 1)
    padding = " " if "`" in value else ""
    # A table splits at a bar even in code, and outside a table `\|` would show its backslash: use a look-alike.
    return f"{fence}{padding}{value.replace('|', '¦')}{padding}{fence}"


def _header(report: Report) -> Iterator[str]:
    head = _facts.headline(report)
    unmeasured = report.speedup is None and head.evidence
    yield f"### perfkit: {text(f'{head.text}: {head.evidence}' if unmeasured else head.text)}"
    about = [code(report.model), *(text(part) for part in _facts.identity(report)), f"recipe {code(report.recipe)}"]
    yield " · ".join(about + ([f"inputs {code(report.inputs)}"] if report.inputs else []))
    if head.explanation:
        yield text(head.explanation)
    if head.evidence and not unmeasured:
        yield f"<sub>{text(head.evidence)}</sub>"
    for alarm in _facts.alarms(report):
        yield f"> **{text(alarm)}**"


def _quantities(report: Report) -> Iterator[str]:
    cells = ((row.label, row.before, f"**{row.after}**", row.change) for row in _table_facts.rows(report))
    yield _table(("", "before", "after", "change"), cells, right=3)
    if reasons := _table_facts.missing(report):
        yield "<br>".join(f"<sub>unavailable: {text(reason)}</sub>" for reason in reasons)


def _steps(report: Report) -> Iterator[str]:
    if not report.steps:
        return
    facts = [_facts.step_facts(step) for step in report.steps]
    cells = (
        (code(step.recipe), step.status, str(step.touched), str(step.skipped), f"{step.speedup} {step.verdict}".strip())
        for step in facts[:MOST_STEPS]
    )
    yield _table(("step", "effect", "touched", "skipped", "speedup so far"), cells, right=0)
    if (rest := len(facts) - MOST_STEPS) > 0:
        yield counted(rest, "more step")
    lines = []
    for step in facts[:MOST_STEPS]:
        told = [text(reason, 160) for reason in step.reasons[:MOST_REASONS]]
        if (rest := len(step.reasons) - MOST_REASONS) > 0:
            told.append(counted(rest, "more reason"))
        if told:
            lines.append(f"- {code(step.recipe)} skipped {'; '.join(told)}")
        lines += [f"- {code(step.recipe)}: {text(note)}" for note in step.notes[:MOST_REASONS]]
    if lines:
        yield "\n".join(lines)


def _facts_list(report: Report) -> Iterator[str]:
    result = report.fidelity
    status = "" if result is None else "ok: " if result.ok else "FAILED: "
    lines = [f"**fidelity** {text(status + _facts.fidelity(result))}"]
    if report.losses is not None:
        lines.append(f"**loss** {text(_facts.losses(report))}")
    if report.metric is not None:
        lines.append(f"**metric** {text(('ok: ' if report.metric.ok else 'FAILED: ') + _facts.metric(report))}")
    if report.speedup is not None or report.against_compiled is not None:
        lines.append(f"**compiler** {text(_facts.compiled(report))}")
    lines.append(f"**payback** {text(_facts.payback(report))}")
    lines += [
        f"{f'**{label}** ' if label else ''}{text(value)}" for label, value in _parallel_facts.parallel_rows(report)
    ]
    yield "<br>\n".join(lines)


def _candidates(report: Report) -> Iterator[str]:
    if not report.candidates:
        return
    facts, left_out = _search_facts.candidate_facts(report), _search_facts.left_out(report)
    cells = (
        (code(item.recipe), text(item.outcome), item.speedup, item.fidelity, text(item.reason, 160))
        for item in facts[:MOST_CANDIDATES]
    )
    parts = [_table(("candidate", "outcome", "speedup", "fidelity", "why it lost"), cells, right=0)] if facts else []
    if (rest := len(facts) - MOST_CANDIDATES) > 0:
        parts.append(f"{counted(rest, 'more candidate')} in the HTML and JSON reports")
    rows = (
        (listing(map(code, item.recipes), MOST_ALIKE), text(item.outcome), text(item.reason, 160))
        for item in left_out[:MOST_CANDIDATES]
    )
    parts += [_table(("left out", "outcome", "why"), rows, right=0)] if left_out else []
    if (rest := len(left_out) - MOST_CANDIDATES) > 0:
        parts.append(f"{counted(rest, 'more reason')} in the HTML and JSON reports")
    yield _folded(f"{counted(len(report.candidates), 'candidate')} considered", "\n\n".join(parts))


def _footer(report: Report) -> Iterator[str]:
    if report.notes:
        yield "\n".join(f"- {text(note)}" for note in report.notes[:MOST_NOTES])
    rows = "\n".join(
        f"- {label}: {text(value)}" for label, value in _environment_facts.environment_rows(report.environment)
    )
    yield _folded("Measured on", rows)


def _folded(title: str, body: str) -> str:
    # The blank lines make GitHub read Markdown again inside the element.
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], right: int) -> str:
    """A table whose last `right` columns are aligned to the right."""
    header = tuple(header)
    rule = tuple("---:" if index >= len(header) - right else "---" for index in range(len(header)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
