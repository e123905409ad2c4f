"""Every pair of recipes has a known outcome: it cannot be, is refused with a reason, or is applied and says to what."""

import itertools
from itertools import combinations

import pytest
from sample_models import arguments, training

import perfkit
from perfkit import ChainError, Comparison, Verdict
from perfkit._chain import chain_of
from perfkit._recipe_files import names, recipe_class

pytestmark = pytest.mark.usefixtures("hasty")

PAIRS = list(combinations(names(), 2))


@pytest.fixture(scope="module")
def given():
    """The arguments of `plan` for each framework and mode, made once."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    models = {"torch": "cnn", "jax": "nnx_cnn"}
    inference = {(name, "inference"): arguments(name, model) for name, model in models.items()}
    return inference | {(name, "training"): training(name) | {"mode": "training"} for name in models}


@pytest.fixture(autouse=True)
def sizes_made_up(monkeypatch):
    """`checkpoint` compiles several programs in JAX to ask XLA what they need; here each needs less than the last."""
    jax_checkpoint = pytest.importorskip("perfkit.memory.jax_checkpoint")
    sizes = itertools.count(-1000)
    monkeypatch.setattr(jax_checkpoint, "_needed", lambda work: -float(next(sizes)))


@pytest.fixture
def times_made_up(monkeypatch):
    """`threads` times calls of either side: here each makes one, and other numbers than torch's are always faster."""
    timing = pytest.importorskip("perfkit.backends.torch_threads").timing

    def paired(original, variant, *, baseline, variant_name, **_):
        original()
        variant()
        return None, None, Comparison(baseline, variant_name, 2.0, 2.0, 2.0, 0.99, Verdict.FASTER, 1, 0.0)

    monkeypatch.setattr(timing, "paired", paired)


def excluding(first, second):
    claims = [recipe_class(name).provides for name in (first, second)]
    return claims[0] is not None and claims[0] == claims[1]


@pytest.mark.usefixtures("times_made_up")
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair(pair, framework, mode, given):
    if excluding(*pair):
        with pytest.raises(ChainError, match="keep one of"):
            chain_of(pair)
        return
    chain = chain_of(pair)
    assert str(chain) == str(chain_of("+".join(map(str, chain)))), "it is written as it is read"
    stages = [recipe.stage for recipe in chain]
    assert stages == sorted(stages)
    steps = perfkit.plan(**given[framework, mode], recipe=chain).steps
    assert len(steps) == 2
    for step in steps:
        assert step.refusal or step.effect.touched or step.effect.skipped or step.effect.notes, step.recipe


def test_quantizers_and_precisions_exclude_their_like_and_nothing_else():
    kinds = {}
    for name in names():
        kinds.setdefault(recipe_class(name).provides, set()).add(name)
    assert kinds["precision"] == {"tf32", "bf16", "fp16", "half"}
    assert kinds["quantization"] == {"fp8", "int4_weight_only", "int8", "int8_dynamic", "int8_weight_only", "qat"}
    assert kinds["order in which layers run"] == {"compile", "skip_padding"}
    others = {
        "order in which layers run",
        "factorization",
        "pruning",
        "pipeline axis",
        "data axis",
        "tensor axis",
        "optimizer state",
    }
    assert set(kinds) - {None, "precision", "quantization"} == others


CHAINS = ["bf16+int8+compile", "int8_dynamic+compile", "half+int8_weight_only", "low_rank+int8+compile"]


@pytest.mark.parametrize("model", ["cnn", "transformer"])
@pytest.mark.parametrize("chain", CHAINS)
def test_chains_that_are_used_keep_their_numbers(chain, model):
    pytest.importorskip("torch")
    report = perfkit.optimize(**arguments("torch", model), recipe=chain).report
    assert report.fidelity.ok
    for step in report.steps:
        assert step.effect.touched or step.effect.skipped or step.effect.notes
