"""How numbers read, and how text from a model is made safe to show on one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from perfkit._quantity import NOT_FINITE, Comparison, Quantity, rounded

_BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069]")
# What XML forbids and what a terminal would obey: C0 and C1 controls, lone surrogates, non-characters.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """`text` on one line, without control characters or direction overrides: names come from the caller's model."""
    return _UNSAFE.sub("\ufffd", _BIDI_CONTROLS.sub("", " ".join(str(text).split())))


def shorten(text: str, length: int) -> str:
    """`text` cut to `length` characters, the cut marked."""
    return text if len(text) <= length else text[: max(length - 1, 0)].rstrip() + "…"


def listing(names: Iterable[str], shown: int) -> str:
    """The first names, and how many more there are."""
    names = tuple(names)
    more = f" and {format_count(len(names) - shown)} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def spaced(recipe: str) -> str:
    """A chain with room around each `+` between its recipes, so that a narrow column breaks it there."""
    return re.sub(r"\+(?![^(]*\))", " + ", recipe)


def counted(count: int, noun: str) -> str:
    """`1 call`, `2 calls`."""
    return f"{format_count(count)} {noun}{'' if count == 1 else 's'}"


def format_number(value: float) -> str:
    """Three significant digits, thousands separated, an exponent only below 0.0001: `1,234`, `12.3`, `0.00123`."""
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return format_error(value)
    if abs(value) < 1000:
        value = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def format_count(value: float) -> str:
    """A whole number, thousands separated."""
    return f"{round(value):,}".replace("-", "−") if math.isfinite(value) else NOT_FINITE


def format_bytes(value: float) -> str:
    """Bytes in binary units, three significant digits: `31.2 MiB`."""
    if not math.isfinite(value):
        return NOT_FINITE
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while round(abs(value)) >= 1024 and power < len(units) - 1:
        value, power = value / 1024, power + 1
    return f"{format_count(value) if power == 0 else format_number(value)} {units[power]}"


def format_flops(value: float) -> str:
    """Operations in decimal units, three significant digits: `345 MFLOP`."""
    if not math.isfinite(value):
        return NOT_FINITE
    prefixes, power = ("", "k", "M", "G", "T", "P"), 0
    while float(f"{abs(value):.3g}") >= 1000 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{format_number(value)} {prefixes[power]}FLOP"


def format_ms(value: float) -> str:
    """Milliseconds, in the unit that reads best: `850 µs`, `12.3 ms`, `4.50 s`, `3.2 min`."""
    if not math.isfinite(value):
        return NOT_FINITE
    size = float(f"{abs(value):.3g}")
    if size == 0:
        return "0 ms"
    if size < 1e-3:
        return f"{format_number(value * 1e6)} ns"
    if size < 1:
        return f"{format_number(value * 1e3)} µs"
    if size < 1e3:
        return f"{format_number(value)} ms"
    if size < 120e3:
        return f"{format_number(value / 1e3)} s"
    return f"{value / 60e3:,.1f} min"


def format_seconds(value: float) -> str:
    """Seconds, in the unit that reads best."""
    return "0 s" if value == 0 else format_ms(value * 1e3)


def format_ratio(value: float) -> str:
    """A speed-up: `1.84×`."""
    return rounded(value) + ("×" if math.isfinite(value) else "")


def format_interval(comparison: Comparison) -> tuple[str, str]:
    """The ratio and its interval: `("1.84×", "[1.79, 1.90]")`, with a third decimal where the interval needs it."""
    tight = 0.9 < comparison.ratio < 1.1 and comparison.high - comparison.low < 0.02
    decimals = 3 if tight else 2
    low, high = rounded(comparison.low, decimals), rounded(comparison.high, decimals)
    figure = rounded(comparison.ratio, decimals) + ("×" if math.isfinite(comparison.ratio) else "")
    return figure, f"[{low}, {high}]"


def format_comparison(comparison: Comparison) -> str:
    """`1.84× [1.79, 1.90]`; the verdict is left to the caller."""
    return " ".join(format_interval(comparison))


def format_error(value: float) -> str:
    """An error or a tolerance, two significant digits: `0`, `0.012`, `3.1e-3`."""
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_percent(share: float) -> str:
    """A share as a percentage: `99.2%`. Only a true 1 reads 100%, only a true 0 reads 0%."""
    if not math.isfinite(share):
        return NOT_FINITE
    if share in (0, 1):
        return f"{share:.0%}"
    if 0 < share < 0.0005:
        return "under 0.1%"
    for decimals in range(1, 6):
        text = f"{share:.{decimals}%}"
        if float(text[:-1]) not in (0, 100):
            return text
    return "nearly 100%"


def format_change(before: float, after: float) -> str:
    """What became of a quantity: `−45.7%`, `+84.1%`, `×12.3` beyond a factor of ten, `same`."""
    if before == after:
        return "same"
    if before <= 0 or after < 0 or not (math.isfinite(before) and math.isfinite(after)):
        return ""
    if after / before >= 10:
        return f"×{format_number(after / before)}"
    change = f"{after / before - 1:+.1%}"
    # A difference that rounds away is neither a gain nor the same.
    return "about same" if change in ("+0.0%", "-0.0%") else change.replace("-", "−")


def format_quantity(quantity: Quantity) -> str:
    """A quantity by its unit; `unavailable` where there is no value. The reason is told apart from the number."""
    if quantity.value is None:
        return "unavailable"
    if not math.isfinite(quantity.value):
        return f"{NOT_FINITE} ({quantity.unit})"
    match quantity.unit:
        case "B":
            return format_bytes(quantity.value)
        case "s":
            return format_seconds(quantity.value)
        case "ms":
            return format_ms(quantity.value)
        case "ratio":
            return format_percent(quantity.value)
        case "calls":
            return counted(math.ceil(quantity.value), "call")
        case unit:
            return f"{format_number(quantity.value)} {unit}"


def with_reason(quantity: Quantity) -> str:
    """A quantity, or `unavailable` and why."""
    told = format_quantity(quantity)
    return told if quantity.unavailable is None else f"{told}: {quantity.unavailable}"
