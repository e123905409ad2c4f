"""The pages with the headline results hold what was recorded."""

from bench import pages, record


def test_the_pages_hold_what_was_recorded():
    assert (record.RESULTS / "README.md").read_text() == record.page(), "run python -m bench.record"
    shown = pages.between(record.FRONT, record.MARKS)
    assert shown.strip() == "\n".join(record.summary()).strip(), "run python -m bench.record"


def test_a_device_is_on_the_front_page():
    assert any("× [" in line for line in record.summary())
