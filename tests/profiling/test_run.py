"""`perfkit.profile`: what it returns, what it keeps of a run that ends early, and that the caller's things stay."""

import json

import pytest

pytest.importorskip("torch")

import torch
from profile_torch_models import Net, summed
from torch.nn.modules import module as registry

import perfkit
from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _native
from perfkit.profiling import ceilings
from perfkit.profiling._profile import Ceilings

X = torch.randn(16, 64)
QUICK = {"example_inputs": (X,), "budget_s": 0.05}


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch):
    """They take a second to measure and are tested by themselves."""
    missing = {name: perfkit.Quantity.missing("GFLOP/s", "not measured here") for name in ("float32",)}
    found = Ceilings(missing, perfkit.Quantity.missing("GB/s", "not measured here"))
    monkeypatch.setattr(ceilings, "measured", lambda framework, device: found)


class Failing(Net):
    """Raises `error` from its `after`-th call on, counted over all copies."""

    calls = 0

    def __init__(self, error, after):
        super().__init__()
        self.error, self.after = error, after
        Failing.calls = 0

    def forward(self, x):
        Failing.calls += 1
        if Failing.calls >= self.after:
            raise self.error
        return super().forward(x)


def training(model):
    optimizer = torch.optim.Adam(model.parameters())
    return {"mode": "training", "loss": summed, "targets": torch.zeros(1), "optimizer": optimizer}


def assert_restored():
    """Nothing of a profile is left in torch."""
    assert not registry._global_forward_hooks
    assert not registry._global_forward_pre_hooks
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not torch.autograd._profiler_enabled()
    assert torch.is_grad_enabled()


def test_a_profile_of_training():
    model, told = Net(), []
    arguments = training(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    profile = perfkit.profile(model, **QUICK, **arguments, progress=told.append)
    assert (profile.outcome, profile.explanation) == ("complete", "")
    assert (profile.model, profile.framework, profile.mode, profile.device) == ("Net", "torch", "training", "cpu")
    assert profile.inputs == "float32[16, 64]"
    assert profile.time.ops
    assert profile.memory.peak.value == sum(profile.memory.by_category.values())
    assert profile.energy is not None
    assert any("memory" in line for line in told)
    assert json.loads(profile.to_json())["outcome"] == "complete"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not arguments["optimizer"].state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_restored()


@pytest.mark.parametrize(
    "error", [ValueError("no such thing"), MemoryError("no room"), RuntimeError("not enough memory")]
)
def test_a_model_that_raises_at_once(error):
    profile = perfkit.profile(Failing(error, after=1), **QUICK)
    assert profile.outcome == "failed"
    assert profile.time is profile.memory is None
    assert profile.explanation.startswith("while running the model for the first time")
    assert str(error) in profile.explanation
    assert_restored()


def test_what_was_collected_before_a_model_raised_is_kept():
    """It raises while its memory is followed: the operations are there."""
    seen = []

    class Tired(Net):
        def forward(self, x):
            if any("memory" in line for line in seen):
                raise ValueError("tired")
            return super().forward(x)

    profile = perfkit.profile(Tired(), **QUICK, progress=seen.append)
    assert profile.outcome == "failed"
    assert profile.explanation == "while following its memory: ValueError: tired"
    assert profile.time.ops
    assert profile.memory is None
    assert json.loads(profile.to_json())["time"]["step"]["median_ms"] > 0
    assert_restored()


@pytest.mark.parametrize("stage", ["timing", "profiling", "memory"])
def test_an_interruption_carries_what_was_collected(stage):
    seen = []

    class Interrupted(Net):
        def forward(self, x):
            if any(stage in line for line in seen):
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted()
    arguments = training(model)
    with pytest.raises(KeyboardInterrupt) as raised:
        perfkit.profile(model, **QUICK, **arguments, progress=seen.append)
    profile = raised.value.profile
    assert profile.outcome == "interrupted"
    assert stage in profile.explanation
    assert (profile.time is None) == (stage == "timing")
    if stage == "profiling":
        assert profile.time.busy.unavailable == "the run ended before the operations were profiled"
    assert not arguments["optimizer"].state
    assert_restored()


def test_running_out_of_memory_is_called_that():
    class Greedy(Net):
        calls = 0

        def forward(self, x):
            Greedy.calls += 1
            return super().forward(x) + (torch.empty(10**15)[0] if Greedy.calls > 3 else 0)

    profile = perfkit.profile(Greedy(), **QUICK)
    assert profile.outcome == "failed"
    assert "out of memory (RuntimeError" in profile.explanation
    assert_restored()
    assert "out of memory" in perfkit.profile(Greedy(), **QUICK).explanation  # at once
    assert "out of memory" not in perfkit.profile(Failing(ValueError("no"), after=2), **QUICK).explanation


def test_a_recipe_is_applied_first():
    profile = perfkit.profile(Net(), **QUICK, recipe="bf16")
    assert profile.notes == ("profiled: what bf16 makes of the model",)
    assert {op.shapes.partition("[")[0] for op in profile.time.ops if op.flops} == {"bfloat16"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")
def test_what_is_profiled_runs_together_where_it_does_without_a_profiler():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    profile = perfkit.profile(model, example_inputs=(torch.randn(8, 1, 28, 28),), budget_s=0.05, recipe="fused_kernels")
    assert "perfkit::conv2d" in {op.name for op in profile.time.ops}
    assert not any("pool" in op.name for op in profile.time.ops)


def test_recompilations_are_counted():
    """A number that changes at each call is a constant of the program; torch gives up after eight of them."""

    class Changing(Net):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def shifted(self, x):
            return x + self.calls

        def forward(self, x):
            self.calls += 1
            return super().forward(torch.compile(self.shifted, backend="eager")(x))

    assert perfkit.profile(Changing(), **QUICK).time.recompiles > 1
    assert perfkit.profile(Net(), **QUICK).time.recompiles == 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"example_inputs": None}, "give what the model is called with"),
        ({"budget_s": 0}, "above 0"),
        ({"budget_s": "long"}, "above 0"),
        ({"progress": "loud"}, "expected a function"),
        ({"recipe": "auto"}, "call optimize first"),
        ({"recipe": "nonesuch"}, "nonesuch"),
        ({"mode": "training"}, "also needs loss"),
        ({"params": {}}, "params="),
    ],
)
def test_bad_input_is_refused(changed, told):
    with pytest.raises(InvalidInputError, match=told):
        perfkit.profile(Net(), **(QUICK | changed))


def test_a_recipe_for_several_processes_is_refused_with_what_to_use_instead():
    with pytest.raises(UnsupportedError, match=r"perfkit\.profiling\.steps"):
        perfkit.profile(Net(), **QUICK, recipe="data_parallel")
