"""One process of `bench.plan`: steps under each layout, predicted, and timed in turn with those of one process."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.plan_models import workload
from perfkit._chain import chain_of
from perfkit._measurement import parallel
from perfkit._variant import Variant, ready
from perfkit._workload import Workload
from perfkit.measure.environment import environment
from perfkit.parallel import world
from perfkit.parallel.gathering import gathered, trained
from perfkit.parallel.pipeline_plan import MICRO_BATCHES
from perfkit.parallel.planning import predict
from perfkit.parallel.planning_parts import Cluster, Costs, Prediction, Program, Way

ONE, ALL_CORES = "one process", "one process on all cores"
SYNC_EVERY = 8


def work(framework: str, models: Sequence[str], rounds: int, describe: bool, file: Path) -> None:
    """Measure the models, and let the first process write what was found."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of a model that makes no such view
    found = world.of(framework)
    rows = []
    for model in models:
        progress = _told(f"{framework}, {model}, {found.devices} processes") if found.leads else str
        rows += rows_of(framework, model, rounds, describe, progress)
    if found.leads:
        file.write_text(json.dumps(rows))


def rows_of(
    framework: str, model: str, rounds: int, describe: bool, progress: Callable[[str], Any]
) -> Iterator[dict[str, Any]]:
    """A row for each layout: what was predicted, and the times of its steps and of one process' in the same rounds.

    Args:
        describe: tell what is sent and held too.
    """
    devices, bound = world.of(framework).devices, workload(framework, model)
    ways = {way.recipe: way for way in layouts(devices)}
    recipes = [*ways, f"local_sgd({devices}, sync_every={SYNC_EVERY})"]
    progress("spreading the model")
    variants = {recipe: trained(bound, recipe) for recipe in recipes}
    calls = {recipe: variant.call for recipe, variant in variants.items()}
    calls |= by_one(framework, gathered(bound, chain_of(recipes[0])))
    costs, cluster, seconds = calibrated(framework, bound, rounds, calls, progress)
    if framework == "jax":
        costs = replace(costs, programs={way: program(bound, way, variants[name].work) for name, way in ways.items()})
    for recipe, variant in variants.items():
        prediction = predict(costs, ways[recipe], cluster) if recipe in ways else None
        yield {
            "framework": framework,
            "model": model,
            "processes": devices,
            "layout": str(ways.get(recipe, f"data {devices}, averaged every {SYNC_EVERY} steps")),
            "recipe": recipe,
            **predicted(prediction),
            "steps_ms": [each * 1e3 / variant.work.period for each in seconds[recipe]],
            "one_ms": [each * 1e3 for each in seconds[ONE]],
            "all_cores_ms": [each * 1e3 for each in seconds.get(ALL_CORES, ())],
            **(described(variant) if describe else {}),
        }


def layouts(devices: int) -> list[Way]:
    """What is predicted and measured."""
    pipeline = Way(pipeline=devices, micro_batches=devices * MICRO_BATCHES)
    return [Way(data=devices), Way(data=devices, shard=True), Way(tensor=devices), pipeline]


def by_one(framework: str, bound: Workload) -> dict[str, Callable[[], Any]]:
    """A step with the whole batch, which the first process makes; in torch with its one thread, and with all cores.

    In JAX one device takes as many threads as it wants anyway.
    """
    call = ready(bound, ONE).call
    if framework == "jax":
        return {ONE: call}
    import torch

    cores = environment().cores

    def on_all_cores() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(cores)
        try:
            call()
        finally:
            torch.set_num_threads(threads)

    return {ONE: call, ALL_CORES: on_all_cores}


def calibrated(
    framework: str, bound: Workload, rounds: int, calls: dict[str, Callable[[], Any]], progress: Callable[[str], Any]
) -> tuple[Costs, Cluster, dict[str, list[float]]]:
    """What predictions rest on, programs left out, and the seconds of the calls."""
    if framework == "torch":
        from perfkit.parallel import torch_calibration

        return torch_calibration.calibrated(bound, 0, rounds, calls, progress)
    from perfkit.parallel import jax_link

    return jax_link.calibrated(bound, 0, rounds, calls, progress)


def program(bound: Workload, way: Way, spread: Workload) -> Program:
    """What the program of a layout does that is timed: another one's stages might be cut elsewhere."""
    from perfkit.parallel import jax_costs, jax_programs

    return jax_programs.program(jax_costs.Step(bound, 0), way, spread)


def predicted(prediction: Prediction | None) -> dict[str, Any]:
    """A prediction in milliseconds; none of what the planner does not know."""
    if prediction is None:
        return {}
    parts = ("computing", "sending", "waiting", "overhead")
    return {
        "predicted_ms": prediction.step_s * 1e3,
        "parts_ms": {part: getattr(prediction, f"{part}_s") * 1e3 for part in parts},
    }


def described(variant: Variant) -> dict[str, Any]:
    """What is sent in a step and held by a process, as reports have it; None where it is not known."""
    about = parallel(variant, None)
    peaks = [peak.value for peak in about.rank_peak_bytes]
    return {
        "sent_bytes": about.sent_bytes.value,
        "communicating": about.communicating.value,
        "peak_bytes": None if None in peaks else max(peaks),
        "held_bytes": max(about.rank_model_bytes),
    }


def _told(what: str) -> Callable[[str], Any]:
    return lambda message: print(f"{what}: {message}", file=sys.stderr, flush=True)
