"""The page of a profile: whole, self-contained, safe, small; what it looks like is for eyes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import sample_profile_parts
import sample_profiles
from html_page import Page, problems

from perfkit.profiling.diff import diff
from perfkit.reporting import profile_diff_html, profile_html
from perfkit.reporting._format import clean

MOST_BYTES = 3_000_000
REACHES_OUT = re.compile(
    r"https?:|fetch\(|XMLHttpRequest|WebSocket|importScripts|import\(|sendBeacon|EventSource|\.src\b"
)
RUNS_TEXT = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The page of each kind of profile, and of a difference."""
    found = {name: profile_html.render(make()) for name, make in sample_profiles.FACTORIES.items()}
    hostile = sample_profiles.hostile()
    found["diff"] = profile_diff_html.render(diff(sample_profiles.cnn(), sample_profiles.in_jax()))
    found["hostile diff"] = profile_diff_html.render(diff(sample_profiles.cnn(), hostile))
    return found


NAMES = (*sample_profiles.FACTORIES, "diff", "hostile diff")


@pytest.mark.parametrize("name", NAMES)
def test_page_is_whole_self_contained_and_small(pages, name):
    source = pages[name]
    assert problems(source, scripts=True) == []
    assert source.lstrip().startswith("<!doctype html>")
    assert not REACHES_OUT.search(source)
    assert len(source.encode()) < MOST_BYTES
    assert not re.search("[\x00-\x08\x0b-\x1f]", source)


def test_the_browser_is_told_to_load_nothing(pages):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', pages["cnn"])
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "*" not in policy


def test_the_script_makes_no_markup_of_text():
    assert not RUNS_TEXT.search(profile_html.script())
    assert "</" not in profile_html.script()


@pytest.mark.parametrize("name", ["hostile", "hostile diff"])
def test_names_are_text_wherever_they_stand(pages, name):
    page = Page(pages[name], scripts=True)
    assert page.tags.count("script") == (2 if name == "hostile" else 1)
    assert clean(sample_profiles.HOSTILE)[:40] in page.words
    assert not any("alert('x')" in text for text in page.scripts if text.lstrip()[:1] == "<")


def test_a_command_can_be_typed_as_it_stands():
    profile = dataclasses.replace(sample_profiles.cnn(), command="perfkit optimize cnn --mode training")
    text, *_ = re.findall(r'<p class="command"><code>(.*?)</code>', profile_html.render(profile))
    assert re.sub(r"<[^>]+>", "", text) == "perfkit optimize cnn --mode training --recipe channels_last+compile"


def test_data_is_what_was_measured_and_cannot_end_its_element(pages):
    data, _ = Page(pages["hostile"], scripts=True).scripts
    assert "<" not in data
    found = json.loads(data)
    assert clean(sample_profiles.HOSTILE)[:100] in " ".join(found["spans"]["names"])
    profile = sample_profiles.cnn()
    found = json.loads(Page(pages["cnn"], scripts=True).scripts[0])
    assert len(found["spans"]["start"]) == len(profile.time.spans)
    named = dict(zip(found["tree"]["name"], found["tree"]["time"], strict=True))
    assert named["fc1"] == pytest.approx(sum(op.self_ms for op in profile.time.ops if op.module == "fc1"), rel=1e-4)
    whole = 1.1 * sum(op.self_ms for op in profile.time.ops)
    assert found["tree"]["time"][0] == pytest.approx(whole, rel=1e-4), "with what no operation accounts for"


def test_parents_come_before_their_children_also_when_cut(pages):
    tree = json.loads(Page(pages["huge"], scripts=True).scripts[0])["tree"]
    assert all(parent < index for index, parent in enumerate(tree["parent"]))
    assert tree["parent"].count(-1) == 1


def test_the_longest_spans_are_kept_and_the_rest_is_counted(pages):
    spans = json.loads(Page(pages["huge"], scripts=True).scripts[0])["spans"]
    assert len(spans["start"]) == 20_000
    assert spans["start"] == sorted(spans["start"])
    lengths = sorted(span.duration_ms for span in sample_profiles.huge().time.spans)
    assert min(spans["length"]) >= lengths[4000] - 1e-4
    assert "The 4,000 shortest spans are left out" in Page(pages["huge"], scripts=True).words


def test_embedded_is_a_fragment_that_styles_nothing_around_it():
    profile = sample_profiles.on_gpu()
    source = profile_html.embedded(profile)
    assert problems(source, scripts=True) == []
    page = Page(source, scripts=True)
    assert not {"html", "head", "body", "main"} & set(page.tags)
    assert source == profile._repr_html_()
    style = re.sub(r"/\*.*?\*/", "", " ".join(page.styles), flags=re.DOTALL)
    selectors = [part for part in re.findall(r"([^{}]+)\{", style) if not part.strip().startswith("@")]
    assert len(selectors) > 80
    for selector in selectors:
        for alternative in re.sub(r"\([^)]*\)", "", selector).split(","):
            assert alternative.strip().startswith(".perfkit"), selector


def test_tells_the_whole_profile(pages):
    words = Page(pages["on_gpu"], scripts=True).words
    for fact in (
        "3.69 ms per call",
        "Compiled 2 times more",
        "114 MFLOP",
        "device busy 14.0%",
        "energy per call 0.710 J",
        'perfkit.optimize(model, recipe="channels_last+compile", …)',
        "1.31× faster, predicted",
        "gain not predicted: not known before the loader is seen",
        "sm90_addmm_kernel<float, 128, 64>",
        "fragmentation 22.0%",
        "Clock held down: software power cap",
        "python (pid 4711), 1.2 GiB",
        "fan not supported",
        "A profiled call takes 1.10 times as long",
        "fingerprint a1b2c3d4e5f6",
    ):
        assert fact in words, fact


def test_what_could_not_be_measured_has_its_reason_and_no_number(pages):
    words = Page(pages["unavailable"], scripts=True).words
    assert "peak memory unavailable no such counter here (B)" in words
    assert "power no permission to read RAPL" in words
    assert not re.search(r"(?<![\d.])0 (B|J|W|FLOP)\b", words)


def test_an_unfinished_profile_says_so_and_shows_what_there_is(pages):
    failed, interrupted = (Page(pages[name], scripts=True).words for name in ("failed", "interrupted"))
    assert "Failed: RuntimeError: mat1 and mat2" in failed
    assert "Interrupted while memory was traced." in interrupted
    assert "11.7 ms per step" in interrupted
    assert "Largest at the peak" not in interrupted


def test_a_handful_of_steps_is_not_drawn_as_a_distribution(pages):
    few = sample_profiles.cnn(time=sample_profile_parts.time(step=sample_profile_parts.latency(11.7, 12)))
    source = profile_html.render(few)
    assert "How many took how long" not in source
    assert "forward 3.70 ms, 28.7%" in Page(source, scripts=True).words
    assert "How many took how long" in pages["cnn"]


def test_same_profile_same_page(pages):
    assert profile_html.render(sample_profiles.cnn()) == pages["cnn"]


USED = """<script>
addEventListener("error", event => { document.title = "FAILED " + event.message; });
addEventListener("load", () => {
  const spans = document.querySelector(".spans"), box = spans.getBoundingClientRect();
  const at = { clientX: box.left + 50, clientY: box.top + 50, bubbles: true, cancelable: true, pointerId: 1 };
  spans.focus();
  spans.dispatchEvent(new WheelEvent("wheel", { ...at, deltaY: -300 }));
  spans.dispatchEvent(new PointerEvent("pointermove", at));
  const keys = ["+", "-", "ArrowLeft", "ArrowRight", "0"];
  keys.forEach(key => spans.dispatchEvent(new KeyboardEvent("keydown", { key })));
  spans.dispatchEvent(new MouseEvent("dblclick", at));
  const field = document.querySelector(".timeline input");
  field.value = "script";
  field.dispatchEvent(new Event("input"));
  document.querySelectorAll(".choice button, .sort").forEach(button => button.click());
  document.querySelectorAll(".node").forEach(node => node.dispatchEvent(new PointerEvent("pointermove", at)));
  const picture = [...document.querySelectorAll(".held svg")].find(found => found.clientWidth);
  const left = picture.getBoundingClientRect().left;
  picture.dispatchEvent(new PointerEvent("pointermove", { ...at, clientX: left + 200 }));
});
</script>"""


def test_the_script_runs_in_a_browser_without_a_network(pages, tmp_path):
    """Everything that can be clicked is; an error in the script would show itself as the page's title."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page in")
    page = tmp_path / "page.html"
    page.write_text(pages["hostile"].replace("<main", f"{USED}<main", 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    arguments = [f"--user-data-dir={tmp_path / 'user'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run([browser, *flags, *arguments], capture_output=True, text=True, check=True, timeout=120)
    assert "<title>FAILED" not in done.stdout
    assert 'data-ready=""' in done.stdout
    assert re.search(r'class="node c\d leaf"', done.stdout), "the map is drawn"
    assert "node c7 group" in done.stdout, "as a treemap, after the click"
    assert re.search(r'<span class="found" role="status">\d+ found', done.stdout)
    assert 'aria-sort="ascending"' in done.stdout
    assert re.search(r'<div class="tip" style="[^"]+"><b>[\d.]+ MiB at', done.stdout), "memory is read off its picture"
    assert int(re.search(r'class="spans"[^>]*height: (\d+)px', done.stdout)[1]) > 60
