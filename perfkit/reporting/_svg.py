"""Drawing primitives: a canvas that writes SVG and a scale that maps numbers onto it. Colours are left to the page."""

from __future__ import annotations

import html
import math
import unicodedata
from dataclasses import dataclass

from perfkit.reporting._format import clean

LABEL_SIZE, MONO_SIZE, SMALL_SIZE = 12.5, 12.0, 11.0
# Width of a character in units of the font size, on the generous side: text may be narrower, never wider.
MONO_WIDTH, SANS_WIDTH = 0.61, 0.56


class Canvas:
    """An SVG image under construction; `svg()` is the result.

    Args:
        title: the name that a screen reader says, also shown when hovering.
        description: what the picture shows, with its numbers, for those who do not see it.
    """

    def __init__(self, width: float, height: float, title: str, description: str):
        self.width, self.height = width, height
        self._title, self._description = escape(title), escape(description)
        self._parts: list[str] = []

    def svg(self) -> str:
        """The image as one element, well-formed both as XML and inside HTML."""
        return (
            f'<svg viewBox="0 0 {number(self.width)} {number(self.height)}" role="img" aria-label="{self._title}">'
            f"<title>{self._title}</title><desc>{self._description}</desc>{''.join(self._parts)}</svg>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self._add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, about: str = "") -> None:
        """A rectangle; as of a circle, `about` is shown when hovering."""
        self._add("rect", kind, about, x=x, y=y, width=width, height=height)

    def circle(self, x: float, y: float, radius: float, kind: str, about: str = "") -> None:
        self._add("circle", kind, about, cx=x, cy=y, r=radius)

    def path(self, points: list[tuple[float, float]], kind: str) -> None:
        """An open line through `points`."""
        self._parts.append(f'<path class="{kind}" d="M{" ".join(f"{number(x)},{number(y)}" for x, y in points)}"/>')

    def area(self, points: list[tuple[float, float]], kind: str) -> None:
        """A closed shape along `points`."""
        self._parts.append(f'<path class="{kind}" d="M{" ".join(f"{number(x)},{number(y)}" for x, y in points)}Z"/>')

    def ticks(self, places: list[float], y1: float, y2: float, kind: str) -> None:
        """Short vertical lines at many places, as one element."""
        marks = "".join(f"M{number(x)} {number(y1)}V{number(y2)}" for x in places)
        self._parts.append(f'<path class="{kind}" d="{marks}"/>')

    def text(self, x: float, y: float, text: str, kind: str, *, anchor: str = "start", width: float = math.inf) -> None:
        """`text`, cut to `width` and then whole on hovering."""
        shown = fit(clean(text), width, kind)
        whole = "" if shown == clean(text) else f"<title>{escape(text)}</title>"
        attributes = f'class="{kind}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"'
        self._parts.append(f"<text {attributes}>{escape(shown)}{whole}</text>")

    def _add(self, tag: str, kind: str, about: str = "", **values: float) -> None:
        attributes = " ".join(f'{name}="{number(value)}"' for name, value in values.items())
        told = f"><title>{escape(about)}</title></{tag}>" if about else "/>"
        self._parts.append(f'<{tag} class="{kind}" {attributes}{told}')


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` onto pixels from `start` to `end`, in logarithms where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._bent(number) for number in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round numbers within the scale, at least two where the scale allows."""
        if self.log:
            for digits in ((1, 2, 5), (1, 3), (1,)):
                powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                found = [digit * 10.0**power for power in powers for digit in digits]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if 2 <= len(found) <= most:
                    return found
        return self._even_ticks(most)

    def _even_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 2.5, 5, 10, 20) if digit * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [index * step for index in range(first, last + 1)]

    def _bent(self, value: float) -> float:
        return math.log(value) if self.log else value


def scale(values: list[float], start: float, end: float, *, log: bool, margin: float = 0.04) -> Scale:
    """A scale that holds all `values` with a margin around them; `log` needs them positive."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** margin, 1.05)
        return Scale(low / room, high * room, start, end, log=True)
    room = margin * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, start, end)


def wide_apart(values: list[float], factor: float) -> bool:
    """Whether `values` are positive and differ by more than `factor`, so that they need a logarithmic scale."""
    return min(values) > 0 and max(values) > factor * min(values)


def escape(text: str) -> str:
    """`text` as XML, whatever it holds."""
    return html.escape(clean(text), quote=True)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    assert math.isfinite(value), "only finite numbers can be drawn"
    return f"{value:.1f}".removesuffix(".0")


def text_width(text: str, kind: str) -> float:
    """How wide `text` may become, in pixels."""
    size = MONO_SIZE if "mono" in kind else SMALL_SIZE if "small" in kind else LABEL_SIZE
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return size * ((len(text) - wide) * (MONO_WIDTH if "mono" in kind else SANS_WIDTH) + wide * 1.05)


def fit(text: str, width: float, kind: str) -> str:
    """As much of `text` as fits into `width`, the cut marked."""
    if text_width(text, kind) <= width:
        return text
    # No character is narrower than half its size; without this, a name of a thousand characters would take its time.
    text = text[: int(2 * width / SMALL_SIZE) + 1]
    while text and text_width(text + "…", kind) > width:
        text = text[:-1]
    return text + "…"
