"""The number of threads that a torch model computes with: set around its calls and put back, and what is refused."""

import copy
import ctypes
import threading

import pytest

pytest.importorskip("torch")

import torch
from applied_recipes import applied
from thread_models import Telling, X
from torch import nn

import perfkit
from perfkit import UnsupportedError
from perfkit.backends import torch_threads
from perfkit.backends.torch_backend import BACKEND
from perfkit.backends.torch_threads import Computing
from perfkit.kernels._torch import of_openmp
from perfkit.measure import environment
from perfkit.recipes.threads import Threads

pytestmark = pytest.mark.usefixtures("hasty", "set_to_three")


def mkl_threads():
    """How many MKL would take in this thread; those that OpenMP takes where torch has no MKL."""
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


def refused(recipe, match, **given):
    given = {"example_inputs": (torch.ones(1, 4),)} | given
    with pytest.raises(UnsupportedError, match=match):
        perfkit.optimize(nn.Linear(4, 2), recipe, **given)


def test_an_openmp_that_only_torch_sees_is_found(monkeypatch):
    """So it lies in wheels for ARM, beside what torch computes with."""
    loaded = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object() if name is None else loaded(name))
    of_openmp.cache_clear()
    try:
        tell = torch_threads._openmp()
        before = torch.get_num_threads()
        tell(before + 1)
        assert torch.get_num_threads() == before + 1
        tell(before)
    finally:
        of_openmp.cache_clear()


def test_what_cannot_be_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(environment, "cores_allowed", lambda: 2)
    refused("threads(64)", "this process has 2 cores")
    refused("threads", "pass example_inputs, or give the number", example_inputs=None)
    assert "this is 'cuda'" in Threads().unavailable("torch", "cuda")
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
