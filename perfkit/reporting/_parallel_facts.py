"""What several devices gave and cost, in words."""

from __future__ import annotations

from perfkit._quantity import Quantity
from perfkit._report import Report
from perfkit.reporting._format import counted, format_bytes, format_percent, format_quantity, with_reason


def parallel_rows(report: Report) -> tuple[tuple[str, str], ...]:
    """What several devices gave and cost, as label and value; empty where one process has the whole model."""
    found = report.parallel
    if found is None:
        return ()
    peaks = ", ".join(map(format_quantity, found.rank_peak_bytes))
    devices = f"{counted(found.devices, 'device')} in {found.processes} process{'' if found.processes == 1 else 'es'}"
    one = "step" if report.mode == "training" else "call"
    rows = [
        ("layout", f"{found.layout}; {devices}"),
        *(("", part) for part in found.parts),
        ("efficiency", _share(found.efficiency)),
        ("exchanged", _told(found.sent_bytes, f" a {one} by each device")),
        ("communicating", _share(found.communicating)),
        ("peak by process", peaks),
        ("model by process", ", ".join(map(format_bytes, found.rank_model_bytes))),
    ]
    if found.balance:
        rows.append(("stages", ", ".join(map(format_percent, found.balance)) + " of the work"))
        rows.append(("bubble", f"{format_percent(found.bubble)} of the time, by the schedule"))
    return tuple(rows)


def _share(quantity: Quantity) -> str:
    if quantity.value is None:
        return with_reason(quantity)
    return format_percent(quantity.value) + (f" ({quantity.method})" if quantity.method else "")


def _told(quantity: Quantity, of: str) -> str:
    if quantity.value is None:
        return with_reason(quantity)
    return format_quantity(quantity) + (f" ({quantity.method})" if quantity.method else "") + of
