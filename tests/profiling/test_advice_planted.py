"""Problems planted in models are found in profiles of real runs of them, and not in the same model without."""

from __future__ import annotations

import pytest

import perfkit
from perfkit.profiling import ceilings
from perfkit.profiling._profile import Ceilings

BATCH, WIDE = 64, 1024


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """They take a second to measure, and would be others on each machine."""
    found = Ceilings({"float32": perfkit.Quantity(100.0, "GFLOP/s")}, perfkit.Quantity(20.0, "GB/s"))
    for name in ("measured", "remeasured"):
        monkeypatch.setattr(ceilings, name, lambda framework, device: found)


@pytest.fixture(autouse=True)
def one_thread():
    """Small models on several threads measure the scheduler."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def advised(model, x, **more):
    profile = perfkit.profile(model, example_inputs=(x,), budget_s=0.05, **more)
    assert profile.outcome == "complete", profile.explanation
    return {finding.kind: finding for finding in profile.findings}


class InTorch:
    """The planted models in torch; all share `Net`."""

    def __init__(self):
        torch = pytest.importorskip("torch")
        self.x = torch.randn(BATCH, 64)
        self.torch = torch

    def plain(self):
        from profile_torch_models import Net

        return Net()

    def copying(self):
        nn = self.torch.nn

        class Copying(nn.Module):
            """Turns a megabyte, which costs more than what is done with it."""

            def __init__(self):
                super().__init__()
                self.last = nn.Linear(WIDE, 2)

            def forward(self, x):
                return self.last(x.t().contiguous())

        self.x = self.torch.randn(WIDE, WIDE)
        return Copying()

    def waiting(self):
        from profile_torch_models import Waiting

        return Waiting()

    def leaking(self):
        from profile_torch_models import Leaking

        return Leaking()

    def double(self):
        from profile_torch_models import Double

        return Double()

    def recompiling(self):
        from profile_torch_models import Net

        torch = self.torch

        class Changing(Net):
            """A number that changes at each call is a constant of the program; torch gives up after eight of them."""

            def __init__(self):
                super().__init__()
                self.calls = 0

            def shifted(self, x):
                return x + self.calls

            def forward(self, x):
                self.calls += 1
                return super().forward(torch.compile(self.shifted, backend="eager")(x))

        return Changing()


class InJax:
    """The same in JAX."""

    def __init__(self):
        jax = pytest.importorskip("jax")
        pytest.importorskip("flax")
        self.x = jax.random.normal(jax.random.key(0), (BATCH, 64))

    def _net(self, call=lambda net, x: net.second(net.between(net.first(x)))):
        import jax
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.first, self.second = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 32, rngs=rngs)

            def between(self, x):
                return jax.nn.relu(x)

            def __call__(self, x):
                return call(self, x)

        return Net(nnx.Rngs(0))

    def plain(self):
        return self._net()

    def copying(self):
        import jax

        self.x = jax.random.normal(jax.random.key(0), (WIDE, 64))
        return self._net(lambda net, x: net.second(jax.numpy.array(net.first(x).T, copy=True).T))

    def waiting(self):
        def call(net, x):
            y = net.second(net.first(x))
            return y / max(float(abs(y).max()), 1.0)

        return self._net(call)

    def leaking(self):
        kept = []

        def call(net, x):
            y = net.second(net.first(x))
            kept.append(y + 1)
            return y

        return self._net(call)

    def recompiling(self):
        import jax

        return self._net(lambda net, x: jax.jit(lambda y: jax.numpy.tanh(y) + 1)(net.second(net.first(x))))


PLANTED = {
    "copying": "a copy",
    "waiting": "a value read back",
    "leaking": "a leak",
    "double": "float64",
    "recompiling": "recompiling",
}
ALSO = {"leaking": {"a copy"}, "double": {"a copy"}}
"""What keeps outputs copies them, and casts are copies."""


@pytest.mark.parametrize(
    ("framework", "planted"),
    [(framework, planted) for framework in (InTorch, InJax) for planted in PLANTED if hasattr(framework, planted)],
)
def test_a_planted_problem_is_found(framework, planted):
    models = framework()
    model = getattr(models, planted)()
    found = set(advised(model, models.x)) & set(PLANTED.values())
    assert PLANTED[planted] in found
    assert found <= {PLANTED[planted]} | ALSO.get(planted, set())


@pytest.mark.parametrize("framework", [InTorch, InJax])
def test_none_is_found_where_none_was_planted(framework):
    models = framework()
    assert not set(PLANTED.values()) & set(advised(models.plain(), models.x))


def test_the_layer_is_named():
    models = InTorch()
    assert advised(models.double(), models.x)["float64"].where == ("second",)


def test_an_optimizer_in_pieces_and_a_fused_one():
    models = InTorch()
    torch = models.torch

    def kinds(fused: bool) -> set[str]:
        model = models.plain()
        optimizer = torch.optim.Adam(model.parameters(), fused=fused, foreach=False)
        told = {"targets": torch.zeros(1), "loss": lambda outputs, _targets: outputs.sum(), "optimizer": optimizer}
        return set(advised(model, models.x[:4], mode="training", **told))

    assert "an optimizer in pieces" in kinds(fused=False)
    assert "an optimizer in pieces" not in kinds(fused=True)


def test_a_convolution_with_a_pool():
    models = InTorch()
    nn = models.torch.nn
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5408, 10))
    finding = advised(model, models.torch.randn(32, 1, 28, 28))["convolution, then pool"]
    assert finding.recipe == "fused_kernels"
    assert set(finding.where) == {"0", "1", "2"}


def test_what_compiling_gives_is_timed_in_jax():
    """It takes XLA less than a second, and assumptions were three times off for small batches."""
    models = InJax()
    profile = perfkit.profile(models.plain(), example_inputs=(models.x,), budget_s=0.05)
    (finding,) = [finding for finding in profile.findings if finding.recipe == "compile"]
    time = profile.time
    assert finding.predicted.value == pytest.approx(time.step.median_ms / time.as_one.median_ms)
    assert "timed by itself" in finding.predicted.method
    assert perfkit.Profile.from_json(profile.to_json()).time.as_one == time.as_one


def test_what_is_compiled_or_cannot_be_is_not_timed_as_one_program():
    import jax

    models = InJax()
    weights = jax.numpy.ones((64, 8))
    for model in (jax.jit(lambda x: x @ weights), models.waiting()):
        assert perfkit.profile(model, example_inputs=(models.x,), budget_s=0.05).time.as_one is None
