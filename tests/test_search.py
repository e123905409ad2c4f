"""What recipe="auto" tries, in which order, and which chain it hands out."""

import pytest

pytest.importorskip("torch")

import torch

import perfkit
from perfkit import Comparison, Verdict
from perfkit._chain import Chain, chain_of
from perfkit._proof import Settings
from perfkit._report import Candidate
from perfkit._search import search
from perfkit._search_order import Agenda
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_backend import BACKEND


def compared(ratio, name="variant"):
    verdict = Verdict.FASTER if ratio > 1 else Verdict.SLOWER
    return Comparison("original", name, ratio, ratio, ratio, 0.99, verdict, 20, 0.01)


def order(specs, ratios, seconds=lambda chain: 1.0, idle=()):
    """The chains in the order in which an agenda gives them out, where they turn out to have such ratios."""
    agenda, given = Agenda(map(chain_of, specs)), []
    while agenda.waiting:
        chain = agenda.next()
        given.append(str(chain))
        ratio = ratios.get(str(chain))
        nothing = "had no effect" if str(chain) in idle else ""
        outcome = "lost" if ratio or nothing else "failed"
        agenda.tried(chain, Candidate(str(chain), outcome, nothing, ratio and compared(ratio), seconds=seconds(chain)))
    return given


def test_what_single_recipes_gave_says_which_chain_is_next():
    ratios = {"bf16": 1.5, "channels_last": 0.9, "fused_kernels": 3.0}
    specs = [*ratios, "channels_last+bf16", "channels_last+fused_kernels", "bf16+fused_kernels"]
    given = order(specs, dict.fromkeys(specs, 1.0) | ratios)
    assert set(given[:3]) == set(ratios)
    assert given[3:] == ["bf16+fused_kernels", "channels_last+fused_kernels", "channels_last+bf16"]


def test_a_pair_that_disappoints_lowers_what_is_expected_of_those_that_hold_it():
    agenda = Agenda([])
    ratios = {"bf16": 1.5, "int8": 2.0, "fused_kernels": 1.1, "bf16+fused_kernels": 1.6}
    for spec, ratio in ratios.items():
        agenda.tried(chain_of(spec), Candidate(spec, "lost", "", compared(ratio)))
    everything = frozenset({"bf16", "int8", "fused_kernels"})
    assert agenda.expected(everything) == pytest.approx(1.6 * 2.0)
    agenda.tried(chain_of("bf16+int8"), Candidate("bf16+int8", "lost", "", compared(0.5)))
    assert agenda.expected(everything) == pytest.approx(0.5 * 1.1)
    assert agenda.expected(frozenset({"compile", "int8"})) == 2.0, "nothing is known of the compiler"


def test_what_failed_comes_last_with_all_that_holds_it_but_one_recipe_without_effect_may_have_it_with_another():
    specs = ["bf16", "int8", "fused_kernels", "int8+fused_kernels", "bf16+fused_kernels"]
    assert order(specs, {"bf16": 0.8, "fused_kernels": 0.8})[-1] == "int8+fused_kernels", "int8 failed"
    given = order(specs, {"bf16": 0.8, "fused_kernels": 0.8}, idle=["int8"])
    assert given[-1] == "bf16+fused_kernels", "0.64 of what is known against 0.8 of what is not"


def test_a_slow_compiler_leaves_half_of_the_time_to_the_others():
    singles, precisions = ["compile", "fused_kernels"], ["bf16", "half", "fp16"]
    specs = [*singles, *precisions, *(f"{name}+{more}" for name in precisions for more in singles)]
    given = order(specs, dict.fromkeys(specs, 1.0), lambda chain: 5.0 if "compile" in str(chain) else 1.0)
    assert [("compile" in chain) for chain in given[:8]] == [True, *[False] * 5, True, False]


class Copied(perfkit.Recipe):
    stage = perfkit.Stage.KERNELS

    def torch(self, work):
        return work, perfkit.Effect(("all of it",))


def copied(name):
    return Chain((type(name, (Copied,), {"name": name})(),))


def test_where_the_best_ones_fail_the_callers_metric_the_next_is_asked(monkeypatch, hasty):
    ratios = {"one": 2.0, "two": 4.0, "three": 3.0, "four": 1.5}
    scores = iter([1.0, 0.0, 1.0, 0.0, 1.0, 0.9])
    chains = [copied(name) for name in ratios]

    def told(original, variant, names, budget_s):
        latency = perfkit.measure.statistics.latency([1.0] * 20)
        return latency, latency, compared(ratios[names[1]], names[1])

    monkeypatch.setattr("perfkit._search.sensible", lambda work: (chains, []))
    monkeypatch.setattr("perfkit._search.compared", told)
    monkeypatch.setattr("perfkit._proof.compared", told)
    work = Workload(BACKEND, torch.nn.Linear(2, 2).eval(), Inputs((torch.ones(1, 2),)), "inference", "cpu")
    report = search(work, Settings(budget_s=10, evaluate=lambda model: next(scores), max_drop=0.5)).report
    assert report.recipe == "one"
    outcomes = {item.recipe: item for item in report.candidates}
    assert "evaluate() fell from 1 to 0" in outcomes["two"].reason
    assert "evaluate() fell from 1 to 0" in outcomes["three"].reason
    assert outcomes["one"].outcome == "won"
    assert outcomes["four"].reason == "the winner is faster"
