"""The pages of the documentation, and the fenced blocks in them: for tests that read or run those."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")])


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a page in that language ("" for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands(text: str) -> list[str]:
    """The lines of a page's blocks in no language, without comments."""
    lines = [line.partition("#")[0].strip() for block in blocks("", text) for line in block.splitlines()]
    return [line for line in lines if line]
