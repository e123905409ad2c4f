"""What `python -m bench.gpu` profiles: the reference models and the models of our own kernels, on the device.

A profile a row, whole, as JSON and as a page, in results/profiles/<device>/; what the card said meanwhile is recorded
in results/telemetry-<device>.json, which the tests then replay.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import perfkit
from bench.gpu_rows import Row
from perfkit import reference
from perfkit.profiling import energy, nvml, telemetry
from perfkit.profiling._profile import Profile
from perfkit.profiling.counter import NvmlCounter, Unavailable

RESULTS = Path(__file__).parent / "results"

MODELS = (
    ("cnn", 64, "inference"),
    ("cnn", 512, "inference"),
    ("text_lstm", 64, "inference"),
    ("cnn", 64, "training"),
    ("text_lstm", 64, "training"),
)
OWN_KERNELS = "fused_kernels"
"""The recipe that puts our kernels into a model: a profile of its result is one of them."""


def profile_rows() -> Iterator[Row]:
    """The card itself, then every model in every framework: as it is, and with our kernels."""
    yield Row("profile", "telemetry", lambda device, budget_s: recorded(device, budget_s))
    for name, batch_size, mode in MODELS:
        for framework in ("torch", "jax"):
            for recipe in (None, OWN_KERNELS):
                label = f"{framework} {name} batch {batch_size} {mode}" + (f" {recipe}" if recipe else "")
                run = functools.partial(profiled, framework, name, batch_size, mode, recipe, label)
                yield Row("profile", label, run)


def profiled(
    framework: str,
    name: str,
    batch_size: int,
    mode: str,
    recipe: str | None,
    label: str,
    device: str,
    budget_s: float,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Profile a model on the device, and write the profile down."""
    if reason := _missing(framework, device):
        return {"refused": reason}
    found = perfkit.profile(
        **_arguments(framework, name, batch_size, mode, device), recipe=recipe, budget_s=min(budget_s / 4, 5.0)
    )
    folder = folder or RESULTS / "profiles" / _slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{label.replace(' ', '-')}.json"
    found.to_json(path)
    found.to_html(path.with_suffix(".html"))
    return summary(found) | {"written": path.name}


def summary(profile: Profile) -> dict[str, Any]:
    """What of a profile stands in the table."""
    time, spent = profile.time, profile.energy
    row: dict[str, Any] = {
        "step_ms": time.step.median_ms if time else None,
        "busy": time.busy.value if time else None,
        "utilization": time.utilization.value if time else None,
        "peak_bytes": profile.memory.peak.value if profile.memory else None,
        "step_j": spent.step_j.value if spent else None,
        "findings": [f"{finding.told} → {finding.recipe or finding.advice}" for finding in profile.findings],
    }
    return row if profile.outcome == "complete" else row | {"failed": profile.explanation}


def recorded(device: str, budget_s: float, path: Path | None = None) -> dict[str, Any]:
    """Ask the card everything for a while, idle and at work, and keep its answers."""
    if device != "cuda":
        return {"refused": "telemetry is of a card"}
    import torch

    x = torch.randn(4096, 4096, device=device)

    def work() -> None:
        torch.mm(x, x)
        torch.cuda.synchronize()

    work()
    try:
        with nvml.opened() as live:
            answers = nvml.Recording(live)
            cards = telemetry.own_cards(answers)
            watch = telemetry.Cards(answers, cards)
            watch.sample()
            idle, busy = energy.windows(work, NvmlCounter(answers, cards, window_s=min(budget_s / 3, 5.0)), 1.0)
            watch.sample()
            states = watch.states()
    except (nvml.Refused, Unavailable) as reason:
        return {"refused": str(reason)}
    path = path or RESULTS / f"telemetry-{_slug(device)}.json"
    answers.write(path, device=states[0].name)
    return {"idle_w": idle.watts, "busy_w": busy.watts, "ticks": busy.ticks, "written": path.name}


def _arguments(framework: str, name: str, batch_size: int, mode: str, device: str) -> dict[str, Any]:
    """What is profiled; a torch model is moved, JAX's is where JAX is."""
    if mode == "training":
        task = reference.task(name, framework=framework)
        fields = ("model", "example_inputs", "targets", "loss", "optimizer")
        found = {field: getattr(task, field) for field in fields}
    else:
        model, example_inputs = reference.load(name, framework=framework, batch_size=batch_size)
        found = {"model": model, "example_inputs": example_inputs}
    if framework == "torch":
        found["model"].to(device)
        found |= {key: _moved(found[key], device) for key in ("example_inputs", "targets") if key in found}
    return found | {"mode": mode}


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") else value


def _missing(framework: str, device: str) -> str:
    """Why a framework cannot be profiled on a device; empty where it can."""
    if find_spec(framework) is None:
        return f"{framework} is not installed"
    if framework == "jax":
        from bench.gpu_time import _no_jax

        return _no_jax(device)
    return ""


def _slug(device: str) -> str:
    if device != "cuda":
        return device
    import torch

    from perfkit.kernels import _autotune

    return _autotune.slug(torch.cuda.get_device_name())
