"""The reference models under each recipe, paired with the unoptimized model in the same run."""

import warnings
from importlib.util import find_spec
from itertools import chain

import pytest

import perfkit
from perfkit import FidelityError, PerfkitWarning, UnsupportedError, reference
from perfkit._recipe_files import names

ELSEWHERE = {
    "bench/compression.py": (
        "int8", "int8_dynamic", "int8_weight_only", "int4_weight_only", "fp8", "qat", "prune", "low_rank",
    ),
    "bench/kernels.py": ("fused_kernels", "fused_optimizer", "skip_padding"),
    "bench/memory.py": ("accumulate", "checkpoint", "donate", "low_bit_optimizer", "offload"),
    "bench/plan.py": ("data_parallel", "pipeline_parallel", "tensor_parallel"),
    "bench/local_sgd.py": ("local_sgd",),
    "bench/threads.py": ("threads",),
    "bench/keep_memory.py": ("keep_memory",),
}  # fmt: skip
"""Recipes with a benchmark of their own; every other one there is, is measured here."""

CHAINS = ("bf16+compile", "channels_last+bf16+compile", "auto")
RECIPES = (*(name for name in names() if name not in chain.from_iterable(ELSEWHERE.values())), *CHAINS)
MODELS = [("cnn", 1), ("cnn", 64), ("cnn", 512), ("cnn2", 64), ("lstm", 64), ("text_lstm", 1), ("text_lstm", 64)]
FRAMEWORKS = [name for name in ("torch", "jax") if find_spec(name)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("model", "batch_size"), MODELS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_inference(framework, model, batch_size, recipe, paired):
    module, example_inputs = reference.load(model, framework=framework, batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfkitWarning)  # slower is a result here
        try:
            result = perfkit.optimize(module, recipe, example_inputs=example_inputs)
        except (UnsupportedError, FidelityError) as refusal:
            pytest.skip(str(refusal))
    report = result.report
    compiled = report.against_compiled
    paired(
        lambda: result(*example_inputs),
        report.speedup,
        recipe=report.recipe,
        relative_error=report.fidelity.relative_error,
        original_ms=report.before.latency.median_ms,
        against_compiled=compiled and compiled.ratio,
    )


@pytest.mark.parametrize("recipe", ["bf16", "fp16", "compile", "bf16+compile", "fused_optimizer"])
@pytest.mark.parametrize("model", ["cnn", "lstm", "text_lstm"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_training(framework, model, recipe, paired):
    task = reference.task(model, framework=framework)
    arguments = {name: getattr(task, name) for name in ("model", "example_inputs", "targets", "loss", "optimizer")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfkitWarning)
        try:
            result = perfkit.optimize(**arguments, recipe=recipe, mode="training")
        except UnsupportedError as refusal:
            pytest.skip(str(refusal))
    batch = task.example_inputs, task.targets
    loss_distance = result.report.fidelity.relative_error
    paired(lambda: float(result.train_step(batch)), result.report.speedup, recipe=recipe, loss_distance=loss_distance)
