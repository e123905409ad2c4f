"""What a page consists of, and what is wrong with it: shared by the tests of what is written as HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "source", "col", "base", "embed", "wbr"}
LOADING = {"href", "src", "srcset", "xlink:href", "action", "formaction", "data", "poster", "background", "ping"}
ACTIVE = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "image", "use", "foreignobject"}


class Page(HTMLParser):
    """What a page consists of, and what is wrong with it."""

    def __init__(self, source: str, scripts: bool = False):
        super().__init__()
        self.scripts: list[str] = []
        self._scripts = scripts
        self.problems: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.identifiers: list[str] = []
        self.targets: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self._open]

    def handle_starttag(self, tag, attrs):
        self._element(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._element(tag, attrs)

    def handle_endtag(self, tag):
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
            return
        (self.styles if self._open[-1:] == ["style"] else self.text).append(data)

    def _element(self, tag, attrs):
        self.tags.append(tag)
        if tag in ACTIVE and not (tag == "script" and self._scripts):
            self.problems.append(f"<{tag}> loads or runs something")
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.problems.append(f"<{tag}> has an attribute twice")
        for name, value in attrs:
            if name.startswith("on"):
                self.problems.append(f"{name} runs a script")
            if name in LOADING and not value.startswith("#"):
                self.problems.append(f"{name}={value} leads outside")
            if name in LOADING:
                self.targets.append(value.removeprefix("#"))
            if name == "id":
                self.identifiers.append(value)
            if name == "style":
                self.styles.append(value)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def problems(source: str, scripts: bool = False) -> list[str]:
    """What is wrong with a page; `scripts`: it may hold scripts, which load nothing either."""
    page = Page(source, scripts)
    outside = [word for style in page.styles for word in re.findall(r"url\(|@import|https?:|image-set", style)]
    twice = [name for name in page.identifiers if page.identifiers.count(name) > 1]
    lost = [name for name in page.targets if name not in page.identifiers]
    return page.problems + outside + twice + lost
