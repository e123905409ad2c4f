"""Which number of threads is chosen for a torch model, and by recipe="auto"."""

import math

import pytest

pytest.importorskip("torch")

import thread_models
import torch
from simulated_machine import Machine, use
from thread_models import Telling, Waiting, X
from torch import nn

import perfkit
from perfkit._chain import Chain, chain_of
from perfkit._search import search, sensible
from perfkit._settings import Settings
from perfkit._variant import apply, observed, ready
from perfkit._workload import Inputs, Workload
from perfkit.backends import torch_threads
from perfkit.backends.torch_backend import BACKEND
from perfkit.backends.torch_threads import others
from perfkit.measure import environment
from perfkit.recipes.threads import Threads

pytestmark = pytest.mark.usefixtures("hasty", "set_to_three")


@pytest.fixture
def valley(monkeypatch):
    """Sixteen cores, and times that are the least with two threads, without waiting for them."""

    def compared(work, tried, names, budget_s):
        asked.append(int(names[1].split()[0]))
        before, after = (1 + abs(math.log2(int(name.split()[0])) - 1) for name in names)
        ratio = before / after
        verdict = "faster" if ratio > 1.02 else "slower" if ratio < 0.98 else "no significant change"
        return perfkit.Comparison(*names, ratio, ratio / 1.01, ratio * 1.01, 0.99, perfkit.Verdict(verdict), 20, 0.01)

    asked = []
    monkeypatch.setattr(environment, "threads_allowed", lambda: 16)
    monkeypatch.setattr(torch_threads, "_compared", compared)
    return asked


@pytest.mark.parametrize(("now", "numbers"), [(16, [8, 4, 2, 1]), (4, [2, 1, 8]), (1, [2, 4])])
def test_the_fastest_number_is_found_from_either_side(now, numbers, valley):
    torch.set_num_threads(now)
    (step,) = perfkit.plan(Telling(), "threads", example_inputs=X).steps
    assert valley == numbers, "each way ends where it gets slower"
    assert step.effect.touched == ("Telling",)
    assert step.effect.notes[0] == f"computes with 2 threads; torch is set to {now}"
    assert [int(note.split()[0]) for note in step.effect.notes[1:]] == numbers


def test_none_is_chosen_where_none_is_faster(valley):
    torch.set_num_threads(2)
    (step,) = perfkit.plan(Telling(), "threads", example_inputs=X).steps
    assert valley == [1, 4]
    assert step.effect.status == "NO_EFFECT"
    told, *each = step.effect.notes
    assert told == "no number is faster than the 2 that torch is set to"
    assert all(note.endswith("slower") for note in each)


@pytest.mark.parametrize(("now", "chosen"), [(3, 2), (2, 2)])
def test_what_was_compiled_while_choosing_is_no_part_of_the_result(now, chosen, monkeypatch):
    """The report looks at what the first call of the result compiles."""

    def paired(*calls, baseline, variant_name, **_):
        for call in calls:
            call()
        faster = variant_name == f"{chosen} threads"
        ratio, verdict = (2.0, "faster") if faster else (0.5, "slower")
        told = (ratio, ratio / 1.01, ratio * 1.01, 0.99, perfkit.Verdict(verdict), 20, 0.01)
        return None, None, perfkit.Comparison(baseline, variant_name, *told)

    torch.set_num_threads(now)
    with monkeypatch.context() as planted:
        planted.setattr(torch_threads.timing, "paired", paired)
        work = Workload(BACKEND, nn.Linear(4, 2).eval(), Inputs((X,)), "inference", "cpu")
        steps = apply(chain_of("compile(freezing=False)+threads"), work)
    result = ready(steps.works[-1], "both")
    compiled, set_to = observed(steps, result.log).steps
    assert compiled.effect.touched == ("Linear",), compiled.effect.notes
    assert set_to.effect.touched == (("Linear",) if now != chosen else ())


def test_what_there_was_no_time_for_is_told(valley, monkeypatch):
    monkeypatch.setattr(torch_threads, "LONGEST_S", 0.0)
    torch.set_num_threads(16)
    (step,) = perfkit.plan(Telling(), "threads", example_inputs=X).steps
    assert valley == [8], "one is tried however long it takes"
    assert step.effect.notes[2:] == tuple(
        f"{told}: not tried, 0 s were over" for told in ("4 threads", "2 threads", "1 thread")
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that nothing but the models' own waiting advances."""
    machine = use(monkeypatch, Machine())
    monkeypatch.setattr(thread_models, "time", machine)
    return machine


def test_the_clock_decides(clock):
    report = perfkit.optimize(Waiting(), "threads", example_inputs=X).report
    assert report.steps[0].effect.notes[0] == "computes with 2 threads; torch is set to 3"
    assert report.speedup.verdict == "faster"


@pytest.mark.parametrize(
    ("most", "now", "below", "above"),
    [(2, 2, [1], []), (2, 1, [], [2]), (24, 24, [16, 8, 4, 2, 1], []), (4, 64, [4, 2, 1], []), (6, 2, [1], [4, 6])],
)
def test_the_numbers_are_powers_of_two_and_all_cores(most, now, below, above):
    torch.set_num_threads(now)
    assert others(most) == (below, above)


def test_training_is_where_it_was_after_choosing():
    model, y = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), torch.randn(3, 2)
    given = {"targets": y, "loss": nn.functional.mse_loss, "optimizer": torch.optim.Adam(model.parameters())}
    result = perfkit.optimize(model, "threads", mode="training", example_inputs=X, **given)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


class Quicker(perfkit.Recipe):
    """Half of the waiting."""

    stage = perfkit.Stage.KERNELS

    def torch(self, work):
        from perfkit.backends.torch_surgery import around_forward

        def wrap(forward):
            def quicker(module, x):
                thread_models.time.sleep(0.01 + 0.01 * abs(math.log2(torch.get_num_threads()) - 1))
                return module.fc(x)

            return quicker

        around_forward(work.model, wrap)
        return work, perfkit.Effect(("all of it",))


def test_auto_tries_it_last_on_the_best_chain_whatever_the_budget(monkeypatch, clock):
    work = Workload(BACKEND, Waiting().eval(), Inputs((X,)), "inference", "cpu")
    chains, _ = sensible(work)
    assert [str(chain) for chain in chains].index("threads") == len(chains) - 1
    assert not any("threads" in str(chain) for chain in chains[:-1])
    monkeypatch.setattr("perfkit._search.sensible", lambda work: ([Chain((Quicker(),)), Chain((Threads(),))], []))
    report = search(work, Settings(budget_s=1e-3)).report
    assert report.recipe == "quicker+threads"
    assert [item.recipe for item in report.candidates] == ["quicker", "quicker+threads"]


def test_auto_tells_what_was_tried_where_no_number_is_faster(monkeypatch, valley):
    torch.set_num_threads(2)
    monkeypatch.setattr("perfkit._search.sensible", lambda work: ([Chain((Threads(),))], []))
    report = search(
        Workload(BACKEND, Telling().eval(), Inputs((X,)), "inference", "cpu"), Settings(budget_s=1e-3)
    ).report
    (candidate,) = report.candidates
    assert candidate.reason.startswith(
        "threads had no effect: no number is faster than the 2 that torch is set to; 1 thr"
    )
