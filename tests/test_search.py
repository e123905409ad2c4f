"""What recipe="auto" tries, in which order, and which chain it hands out."""

import itertools

import pytest

pytest.importorskip("torch")

import torch
from sample_models import training

import perfkit
from perfkit import Comparison, Quantity, Verdict, _search
from perfkit._chain import Chain, chain_of
from perfkit._report import Candidate, Fidelity
from perfkit._search import search
from perfkit._search_order import Agenda
from perfkit._settings import Settings
from perfkit._variant import ready
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_backend import BACKEND

NO_HURRY_S = 1e6
"""So that what is tried does not depend on how busy the machine is; `hasty` leaves the last timing seconds of it."""


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
        agenda.tried(chain, Candidate(str(chain), outcome, nothing, seconds=seconds(chain)), ratio)
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
        agenda.tried(chain_of(spec), Candidate(spec, "lost"), ratio)
    everything = frozenset({"bf16", "int8", "fused_kernels"})
    assert agenda.expected(everything) == pytest.approx(1.6 * 2.0)
    agenda.tried(chain_of("bf16+int8"), Candidate("bf16+int8", "lost"), 0.5)
    assert agenda.expected(everything) == pytest.approx(0.5 * 1.1)
    assert agenda.expected(frozenset({"compile", "int8"})) == 2.0, "nothing is known of the compiler"


def test_what_failed_comes_last_with_all_that_holds_it_but_one_recipe_without_effect_may_have_it_with_another():
    specs = ["bf16", "int8", "fused_kernels", "int8+fused_kernels", "bf16+fused_kernels"]
    assert order(specs, {"bf16": 0.8, "fused_kernels": 0.8})[-1] == "int8+fused_kernels", "int8 failed"
    given = order(specs, {"bf16": 0.8, "fused_kernels": 0.8}, idle=["int8"])
    assert given[-1] == "bf16+fused_kernels", "0.64 of what is known against 0.8 of what is not"
    specs = ["bf16", "channels_last", "fused_kernels", "int8", "int8+bf16", "channels_last+bf16+fused_kernels"]
    assert order(specs, dict.fromkeys(specs[:3], 0.8))[-1] == "bf16+int8", "also after what is far ahead of all known"


def test_a_recipe_whose_numbers_are_too_far_off_promises_nothing_with_others():
    agenda, unknown = Agenda([]), Quantity.missing("dB", "of no interest here")
    far = Fidelity(False, 1.0, 0.0, 2.0, 0.1, "a float64 run", 1.0, unknown, unknown)
    agenda.tried(chain_of("int8"), Candidate("int8", "lost", "too far off", fidelity=far), None)
    assert agenda.expected(frozenset({"int8", "bf16"})) == 0


def test_a_slow_compiler_leaves_half_of_the_time_to_the_others():
    singles, precisions = ["compile", "fused_kernels"], ["bf16", "half", "fp16"]
    specs = [*singles, *precisions, *(f"{name}+{more}" for name in precisions for more in singles)]
    given = order(specs, dict.fromkeys(specs, 1.0), lambda chain: 5.0 if "compile" in str(chain) else 1.0)
    assert [("compile" in chain) for chain in given[:8]] == [True, *[False] * 5, True, False]


def test_kernels_come_before_other_single_recipes_and_one_recipe_more_has_to_be_worth_it():
    specs = ["bf16", "channels_last", "fused_kernels", "channels_last+bf16+fused_kernels", "bf16+fused_kernels"]
    ratios = dict.fromkeys(specs, 1.0) | {"fused_kernels": 8.0, "bf16": 1.5, "channels_last": 1.01}
    assert order(specs, ratios) == ["fused_kernels", "bf16", "channels_last", specs[4], specs[3]]


def test_a_longer_chain_has_to_promise_more_by_what_a_recipe_is_worth():
    agenda = Agenda(map(chain_of, ["channels_last+bf16+int8+fused_kernels", "half+int8+fused_kernels"]))
    ratios = {"fused_kernels": 8.0, "int8+fused_kernels": 8.0, "half": 1.51, "channels_last": 1.01}
    for spec, ratio in (ratios | {"bf16+int8+fused_kernels": 12.0}).items():
        agenda.tried(chain_of(spec), Candidate(spec, "lost"), ratio)
    assert str(agenda.next()) == "half+int8+fused_kernels", "12.08 by three recipes, 12.12 by four"


def test_the_best_one_is_tried_with_each_other_before_chains_of_three():
    singles = {"fused_kernels": 14.0, "bf16": 1.5, "half": 1.4, "int8": 1.3}
    pairs = [f"{name}+fused_kernels" for name in ("bf16", "half", "int8")]
    specs = [*singles, "bf16+int8", *pairs, "bf16+int8+fused_kernels", "half+int8+fused_kernels"]
    ratios = dict.fromkeys(specs, 1.0) | singles | dict.fromkeys(pairs, 21.0) | {"int8+fused_kernels": 32.0}
    assert order(specs, ratios)[4:7] == pairs
    agenda = Agenda(map(chain_of, ["int8+fused_kernels", "channels_last+bf16+fused_kernels"]))
    for spec, ratio in {"fused_kernels": 14.0, "bf16": 1.5, "int8": None}.items():
        agenda.tried(chain_of(spec), Candidate(spec, "failed"), ratio)
    assert str(agenda.next()) == "channels_last+bf16+fused_kernels", "int8 failed"


def test_of_what_overlaps_each_recipe_more_is_tried_by_itself_first():
    specs = ["bf16", "int8", "fused_kernels", "bf16+int8+fused_kernels", "int8+fused_kernels", "bf16+fused_kernels"]
    ratios = {"bf16": 1.8, "int8": 1.5, "fused_kernels": 8.0, "bf16+fused_kernels": 7.0, "int8+fused_kernels": 16.0}
    assert order(specs, ratios)[3:] == ["bf16+fused_kernels", "int8+fused_kernels", "bf16+int8+fused_kernels"]


class Copied(perfkit.Recipe):
    stage = perfkit.Stage.KERNELS

    def torch(self, work):
        return work, perfkit.Effect(("all of it",))


def copied(name):
    return Chain((type(name, (Copied,), {"name": name})(),))


def searched(monkeypatch, ratio, names, glance=lambda best, variant: 1.0, **settings):
    """The report of a search among chains of such names, where `ratio(baseline, variant)` is what is measured."""
    timed = []

    def told(original, variant, sides, budget_s):
        timed.append(sides)
        latency = perfkit.measure.statistics.latency([1.0] * 20)
        return latency, latency, compared(ratio(*sides), sides[1])

    monkeypatch.setattr("perfkit._search.sensible", lambda work: ([copied(name) for name in names], []))
    monkeypatch.setattr("perfkit._search.compared", told)
    monkeypatch.setattr("perfkit._search.glanced", glance)
    monkeypatch.setattr("perfkit._proof.compared", told)
    work = Workload(BACKEND, torch.nn.Linear(2, 2).eval(), Inputs((torch.ones(1, 2),)), "inference", "cpu")
    report = search(work, Settings(budget_s=NO_HURRY_S, **settings)).report
    return report, {item.recipe: item for item in report.candidates}, timed


def test_where_the_best_ones_fail_the_callers_metric_the_next_is_asked(monkeypatch, hasty):
    speeds = {"original": 1.0, "one": 2.0, "two": 4.0, "three": 3.0, "four": 1.5}
    scores = iter([1.0, 0.0, 1.0, 0.0, 1.0, 0.9])
    report, outcomes, _ = searched(
        monkeypatch,
        lambda baseline, variant: speeds[variant] / speeds[baseline],
        ["one", "two", "three", "four"],
        evaluate=lambda model: next(scores),
        max_drop=0.5,
    )
    assert report.recipe == "one"
    assert "evaluate() fell from 1 to 0" in outcomes["two"].reason
    assert "evaluate() fell from 1 to 0" in outcomes["three"].reason
    assert (outcomes["one"].outcome, outcomes["one"].reason) == ("won", "")
    assert outcomes["four"].reason == "the winner is faster, or as fast with fewer recipes"


def test_what_fell_behind_the_best_is_asked_too_unless_it_is_slower_than_the_original(monkeypatch, hasty):
    speeds = {"original": 1.0, "a": 4.0, "b": 3.0, "c": 0.4}
    scores = iter([1.0, 0.0, 1.0, 0.0])
    report, outcomes, _ = searched(
        monkeypatch,
        lambda baseline, variant: speeds[variant] / speeds[baseline],
        ["a", "b", "c"],
        evaluate=lambda model: next(scores),
    )
    assert report.outcome == "original returned"
    assert "evaluate() fell from 1 to 0" in outcomes["b"].reason
    assert outcomes["c"].reason == "0.10× [0.10, 0.10] the speed of a"


def test_what_is_not_faster_any_more_when_timed_afresh_is_not_handed_out(monkeypatch, hasty):
    ratios = itertools.chain([2.0], itertools.repeat(0.9))
    report, outcomes, _ = searched(monkeypatch, lambda *_: next(ratios), ["lucky"])
    assert report.outcome == "original returned"
    assert outcomes["lucky"].reason == "timed afresh, it was not faster any more"


def test_what_is_best_is_decided_side_by_side_not_by_how_slow_the_original_was_meanwhile(monkeypatch, hasty):
    against_original = {"first": 9.0, "second": 3.0}  # the original was three times as quick when the second came
    report, outcomes, timed = searched(
        monkeypatch,
        lambda baseline, variant: against_original[variant] if baseline == "original" else 1.25,
        ["first", "second"],
    )
    assert report.recipe == "second"
    assert outcomes["first"].reason == "the winner is faster, or as fast with fewer recipes"
    assert ("first", "second") in timed


def test_what_falls_behind_the_best_is_not_timed_against_the_original(monkeypatch, hasty):
    speeds = {"original": 1.0, "first": 6.0, "second": 4.5}
    report, outcomes, timed = searched(
        monkeypatch, lambda baseline, variant: speeds[variant] / speeds[baseline], ["first", "second"]
    )
    assert report.recipe == "first"
    assert outcomes["second"].reason == "0.75× [0.75, 0.75] the speed of first"
    assert ("original", "second") not in timed


def test_what_is_far_behind_the_best_is_not_timed_and_the_original_not_called_for_it(monkeypatch, hasty):
    speeds = {"original": 1.0, "first": 6.0, "second": 2.0}
    report, outcomes, timed = searched(
        monkeypatch,
        lambda baseline, variant: speeds[variant] / speeds[baseline],
        ["first", "second"],
        glance=lambda best, variant: 3.0,
    )
    assert report.recipe == "first"
    assert outcomes["second"].reason == "not timed: its quickest call takes 3.0 times that of first"
    assert set(timed) == {("original", "first")}


def test_a_simpler_chain_that_comes_up_from_below_is_made_again(monkeypatch):
    strengths = {"simplest": 9.85, "three": 10.0, "two": 9.99, "four": 10.1}
    lengths = {"simplest": 1, "three": 3, "two": 2, "four": 4}
    chains = {name: Chain(tuple(copied(f"{name}{i}").recipes[0] for i in range(lengths[name]))) for name in lengths}
    names = {chain: name for name, chain in chains.items()}

    def tried(original, chain, settings, best):
        assert best is None or best.made is not None
        return _search._Tried(chain, Candidate(str(chain), "lost"), strengths[names[chain]], ("made", names[chain]))

    monkeypatch.setattr(_search, "_tried", tried)
    monkeypatch.setattr(_search, "_made", lambda chain, work: ("made again", names[chain]))
    work = Workload(BACKEND, torch.nn.Linear(2, 2).eval(), Inputs((torch.ones(1, 2),)), "inference", "cpu")
    trials = _search._Trials(ready(work, "original"), Settings(budget_s=1), 4)
    for chain in chains.values():
        trials.run(chain)
    assert trials.ranked[0].made == ("made again", "two")


def test_the_original_computes_its_numbers_once_for_all_chains(monkeypatch, hasty):
    class Counted(torch.nn.Linear):
        calls = 0

        def forward(self, x):
            Counted.calls += self.weight.dtype == torch.float64
            return super().forward(x)

    monkeypatch.setattr("perfkit._search.sensible", lambda work: ([copied(name) for name in "abc"], []))
    work = Workload(BACKEND, Counted(2, 2).eval(), Inputs((torch.ones(1, 2),)), "inference", "cpu")
    search(work, Settings(budget_s=10))
    assert Counted.calls == 1


def test_in_training_a_chain_that_learns_otherwise_is_passed_over_at_the_end(monkeypatch, hasty):
    class Wrong(Copied):
        def torch(self, work):
            torch.nn.init.zeros_(work.model[0].weight)
            return super().torch(work)

    def told(original, variant, sides, budget_s):
        latency = perfkit.measure.statistics.latency([1.0] * 20)
        return latency, latency, compared(3.0 if sides[1] == "wrong" else 2.0, sides[1])

    chains = [Chain((type("wrong", (Wrong,), {"name": "wrong"})(),)), copied("right")]
    monkeypatch.setattr("perfkit._search.sensible", lambda work: (chains, []))
    monkeypatch.setattr("perfkit._search.glanced", lambda best, variant: 1.0)
    for place in ("_search", "_proof"):
        monkeypatch.setattr(f"perfkit.{place}.compared", told)
    report = perfkit.optimize(**training("torch"), recipe="auto", mode="training", budget_s=NO_HURRY_S).report
    assert report.recipe == "right"
    wrong = next(item for item in report.candidates if item.recipe == "wrong")
    assert wrong.outcome == "lost"
    assert not wrong.fidelity.ok
    assert wrong.reason == wrong.fidelity.reason
