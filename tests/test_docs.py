"""Every command and every example of the README runs; every link in the docs leads somewhere."""

import re
import shlex

import pytest
from click.testing import CliRunner
from doc_pages import PAGES, ROOT, blocks, commands

from perfkit import cli
from perfkit._recipe_files import names

README = (ROOT / "README.md").read_text()
PROFILES = (ROOT / "docs" / "profiling.md").read_text()
LESSONS = sorted((ROOT / "docs" / "recipes").glob("*.md"))


def run(code: str, name: str) -> dict:
    for framework in ("torch", "jax"):
        if f"import {framework}" in code or f", {framework}" in code or "reference" in code:
            pytest.importorskip(framework)
    names = {}
    exec(compile(code, name, "exec"), names)
    return names


@pytest.mark.parametrize("number", range(len(blocks("python", README))))
@pytest.mark.filterwarnings("ignore::perfkit.PerfkitWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.usefixtures("hasty")
def test_examples_run(number, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    names = run(blocks("python", README)[number], f"README, example {number}")
    assert names["result"].report.fidelity.ok


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::perfkit.PerfkitWarning")
@pytest.mark.usefixtures("hasty")
def test_lessons_run(page, capsys):
    code = blocks("python", page.read_text())
    assert code
    names = run("\n".join(code), page.name)
    if "result" in names:
        assert names["result"].report.fidelity.ok


@pytest.mark.filterwarnings("ignore::perfkit.PerfkitWarning")
def test_the_example_of_jax_trains_with_its_flag():
    (code,) = blocks("python", (ROOT / "docs" / "jax.md").read_text())
    names = run(code, "jax.md")
    assert names["result"].report.fidelity.ok
    mean = names["variables"]["batch_stats"]["BatchNorm_0"]["mean"]
    assert abs(mean).sum() > 0, "batch norm has taken statistics"


def test_the_pages_show_what_was_recorded():
    from bench import compression, pages, plan_pages

    for page in LESSONS:
        assert page.stem in names()
        if page in plan_pages.SPREAD.values():
            continue  # written by another benchmark, and looked at in tests/test_bench_plan.py
        shown = pages.between(page, compression.MARKS)
        assert shown.strip() == "\n".join(compression.measured(page.stem)).strip(), (
            "run python -m bench.compression --pages"
        )


def test_the_page_on_profiles_shows_what_was_recorded():
    from bench import pages, profiling_page

    shown = pages.between(profiling_page.PAGE, profiling_page.MARKS)
    assert shown.strip() == profiling_page.example(), "run python -m bench.profiling_page --page"


def test_the_examples_of_profiling_run(tmp_path, monkeypatch, capsys):
    import sample_profile_parts

    monkeypatch.chdir(tmp_path)
    # Measuring those takes seconds and has tests of its own.
    monkeypatch.setattr("perfkit.profiling.ceilings.measured", lambda *_: sample_profile_parts.ceilings())
    profiling, looping = blocks("python", PROFILES)
    assert run(profiling, "profiling.md")["profile"].outcome == "complete"
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".json"}
    assert run(looping, "profiling.md")["profiler"].report.counted == 37
    assert (tmp_path / "steps.json").is_file()


def test_the_example_of_advice_runs(monkeypatch, capsys):
    import sample_profile_parts

    monkeypatch.setattr("perfkit.profiling.ceilings.measured", lambda *_: sample_profile_parts.ceilings())
    (code,) = blocks("python", (ROOT / "docs" / "advice.md").read_text())
    findings = run(code.replace("budget_s=1", "budget_s=0.1"), "advice.md")["profile"].findings
    assert len(capsys.readouterr().out.splitlines()) == len(findings)


def test_there_are_commands():
    assert {line.split()[0] for line in commands(README)} == {"make", "perfkit"}


LINES = {line for page in PAGES for line in commands(page.read_text()) if line.startswith("perfkit ")}


@pytest.mark.parametrize("line", sorted(LINES))
def test_commands_are_understood(line):
    """Parsed for real, down to the command's own options; the long ones are not run."""
    _, name, *arguments = shlex.split(line)
    command = cli.main.commands[name]
    command.make_context(name, arguments)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(README):
        if line.startswith("make"):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)


def test_short_commands_run():
    for name in ("recipes", "doctor"):
        assert CliRunner().invoke(cli.main, [name]).exit_code == 0


def test_the_recipe_table_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted([*names(), "auto"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(page):
    """As GitHub makes them of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
