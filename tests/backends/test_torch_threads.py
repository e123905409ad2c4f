"""The recipe `threads` and what it sets: in the calling thread, while the model computes, and nowhere else."""

import copy
import math
import threading
import time

import pytest

pytest.importorskip("torch")

import torch
from applied_recipes import applied
from torch import nn

import perfkit
from perfkit import UnsupportedError
from perfkit._chain import Chain, chain_of
from perfkit._proof import Settings
from perfkit._search import search, sensible
from perfkit._variant import apply, observed, ready
from perfkit._workload import Inputs, Workload
from perfkit.backends import torch_threads
from perfkit.backends.torch_backend import BACKEND
from perfkit.backends.torch_threads import Computing, others
from perfkit.measure import environment
from perfkit.recipes.threads import Threads

pytestmark = pytest.mark.usefixtures("hasty", "set_to_three")


X = torch.randn(3, 4)


@pytest.fixture
def set_to_three():
    """What torch is set to: neither what a test run gives it, nor a number that is tried."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Telling(nn.Module):
    """Notes with how many threads it computes, forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.seen = []
        self.fails = False

    def forward(self, x):
        self.note()
        if self.fails:
            raise KeyError("of the model's own")
        y = self.fc(x)
        if y.requires_grad:
            y.register_hook(lambda _: self.note())
        return y

    def note(self):
        self.seen.append(torch.get_num_threads())


def mkl_threads():
    """How many MKL would take in this thread; those that OpenMP takes where torch has no MKL."""
    import ctypes
    from pathlib import Path

    if not torch.backends.mkl.is_available():
        return torch.get_num_threads()
    (library,) = Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")
    return ctypes.PyDLL(str(library)).MKL_Get_Max_Threads()


def optimized(recipe="threads(2)", **given):
    return perfkit.optimize(Telling(), recipe, example_inputs=(torch.randn(3, 4),), **given)


def test_it_is_set_and_put_back_also_when_something_raises_and_nested():
    with Computing(2):
        assert torch.get_num_threads() == mkl_threads() == 2
        with Computing(1):
            assert torch.get_num_threads() == mkl_threads() == 1
        assert torch.get_num_threads() == mkl_threads() == 2
        with pytest.raises(KeyError), Computing(1):
            raise KeyError
        assert torch.get_num_threads() == mkl_threads() == 2
    assert torch.get_num_threads() == mkl_threads() == 3


def test_other_threads_compute_with_what_they_had():
    """Threads that were there, and one that calls torch for the first time; torch.set_num_threads would change that."""
    seen = {}

    def look(name, before=None, after=None):
        seen[name] = torch.get_num_threads()
        if before:
            before.set()
            after.wait()
            seen[f"{name}, later"] = torch.get_num_threads()

    there, over = threading.Event(), threading.Event()
    old = threading.Thread(target=look, args=("old", there, over))
    old.start()
    there.wait()
    with Computing(1):
        new = threading.Thread(target=look, args=("new",))
        new.start()
        new.join()
        over.set()
        old.join()
    assert seen == {"old": 3, "old, later": 3, "new": 3}


def test_calls_in_several_threads_at_once_keep_their_own():
    model = optimized("threads(1)").model
    both = threading.Barrier(2, timeout=60)

    def note(self):
        both.wait()  # each is inside of its call while the other is
        self.seen.append(torch.get_num_threads())

    model.note = note.__get__(model)
    model.seen.clear()
    after = []

    def call():
        model(torch.ones(1, 4))
        after.append(torch.get_num_threads())

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert model.seen == [1, 1]
    assert after == [3, 3]


def test_a_call_computes_with_that_many_and_the_model_is_what_it_was():
    result = optimized()
    model = result.model
    assert result.report.steps[0].effect.notes == ("computes with 2 threads; torch is set to 3",)
    assert isinstance(model, Telling)
    assert model.state_dict().keys() == Telling().state_dict().keys()
    for same in (model, copy.deepcopy(model), nn.Sequential(model)):
        model.seen = vars(same).get("seen", model.seen)
        model.seen.clear()
        same(torch.ones(1, 4))
        assert model.seen[0] == 2
    model.fails = True
    with pytest.raises(KeyError):
        model(torch.ones(1, 4))
    assert torch.get_num_threads() == 3


def test_a_training_step_has_it_backwards_and_in_the_update():
    updates = []

    class Sgd(torch.optim.SGD):
        def step(self, closure=None):
            updates.append(torch.get_num_threads())
            return super().step(closure)

    model, x, y = Telling(), torch.randn(3, 4), torch.randn(3, 2)
    result = perfkit.optimize(
        model,
        "threads(2)",
        mode="training",
        example_inputs=(x,),
        targets=y,
        loss=nn.functional.mse_loss,
        optimizer=Sgd(model.parameters(), 0.1),
    )
    updates.clear()
    result.model.seen.clear()
    result.train_step((x, y))
    assert result.model.seen == [2, 2], "forwards, backwards"
    assert updates == [2]


def test_compiled_programs_are_made_for_that_many():
    from torch._inductor.utils import run_and_get_code

    model = nn.Sequential(nn.Linear(4, 4096), nn.GELU(), nn.LayerNorm(4096)).eval()
    x = torch.randn(64, 4)
    result, code = run_and_get_code(applied, model, "compile+threads(1)", x)
    assert code
    assert not any("omp parallel" in part for part in code), "as it is for three"
    with torch.no_grad(), BACKEND.watching_compiles() as log:
        result.model(x)
    assert log().graphs == 0, "the next call finds the same number and the same program"


def test_kernels_of_perfkit_follow_it():
    from perfkit.kernels._torch import Threads as Lent

    with Computing(2):
        assert Lent.of_torch().count == 2
    model, x = nn.LSTM(5, 16).eval(), torch.randn(6, 3, 5)
    result = perfkit.optimize(model, "fused_kernels+threads(1)", example_inputs=(x,))
    assert result.report.fidelity.ok


def test_a_compile_around_it_still_computes_with_that_many():
    torch.compiler.reset()
    model = optimized().model
    model.seen.clear()
    with torch.no_grad():
        torch.compile(model, backend="eager")(torch.ones(1, 4))
    assert set(model.seen) == {2}


def test_the_result_can_be_exported():
    model = perfkit.optimize(nn.Linear(4, 2), "threads(2)", example_inputs=X).model
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


# ---- Choosing --------------------------------------------------------------------------------------------------------


class Waiting(nn.Module):
    """Takes 20 ms, and as much again for each halving or doubling from two threads: more than any noise hides."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        time.sleep(0.02 + 0.02 * abs(math.log2(torch.get_num_threads()) - 1))
        return self.fc(x)


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


def test_the_clock_decides():
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


# ---- Refusing --------------------------------------------------------------------------------------------------------


def refused(recipe, match, **given):
    given = {"example_inputs": (torch.ones(1, 4),)} | given
    with pytest.raises(UnsupportedError, match=match):
        perfkit.optimize(nn.Linear(4, 2), recipe, **given)


def test_what_cannot_be_is_refused_with_what_to_do(monkeypatch):
    refused("threads(64)", "this process has 2 cores")
    refused("threads", "pass example_inputs, or give the number", example_inputs=None)
    assert "the model is on 'cuda'" in Threads().unavailable("torch", "cuda")
    assert "PJRT_NPROC" in Threads().unavailable("jax", "cpu")
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(perfkit.InvalidInputError, match="expected a number of threads"):
            Threads(count=wrong)
    torch.set_num_threads(1)
    monkeypatch.setattr(environment, "threads_allowed", lambda: 1)
    refused("threads", "OMP_NUM_THREADS=1 leaves nothing to choose")
    monkeypatch.setattr(environment, "cores_allowed", lambda: 1)
    refused("threads", "one core: there is nothing to choose")
    refused("threads(1)", "one core: there is nothing to choose")
    torch.set_num_threads(3)
    assert Threads().unavailable("torch", "cpu") is None, "three threads on one core: there is something to choose"
    monkeypatch.setattr(torch_threads, "_SET_OPENMP", None)
    refused("threads(1)", "call torch.set_num_threads yourself")
    monkeypatch.setattr(torch_threads, "_SET_OPENMP", lambda count: None)
    refused("threads(1)", "call torch.set_num_threads yourself")


def test_without_inputs_a_number_is_set():
    result = optimized(recipe="threads(2)")
    assert (
        perfkit.optimize(Telling(), "threads(2)").report.steps[0].effect.touched
        == result.report.steps[0].effect.touched
    )


# ---- Searching -------------------------------------------------------------------------------------------------------


class Quicker(perfkit.Recipe):
    """Half of the waiting."""

    stage = perfkit.Stage.KERNELS

    def torch(self, work):
        from perfkit.backends.torch_surgery import around_forward

        def wrap(forward):
            def quicker(module, x):
                time.sleep(0.01 + 0.01 * abs(math.log2(torch.get_num_threads()) - 1))
                return module.fc(x)

            return quicker

        around_forward(work.model, wrap)
        return work, perfkit.Effect(("all of it",))


def test_auto_tries_it_last_on_the_best_chain_whatever_the_budget(monkeypatch):
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
