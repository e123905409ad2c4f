"""Tuning keeps the fastest candidate, drops the wrong and the failing ones, and says what became of each."""

import itertools
import json
from dataclasses import dataclass

import pytest

from perfkit import InvalidInputError
from perfkit.kernels import _autotune, _tune
from perfkit.kernels._op import Implementation, Op


@dataclass(frozen=True)
class Product:
    size: int = 4
    framework: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    needs_grad: bool = False

    @property
    def bucket(self) -> str:
        return f"size{self.size}"


OP = Op("product", tuple(Implementation(name, "torch", lambda problem: None) for name in ("cpu", "library")))
CANDIDATES = (("cpu", (("block", 8),)), ("cpu", (("block", 16),)), ("cpu", ()), ("library", ()))


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    return tmp_path / "tuned"


@pytest.fixture
def clock(monkeypatch):
    """Calls take what they return, in ms, each one in turn a little more or less."""
    drift = itertools.cycle([1.0, 1.01, 0.99])
    monkeypatch.setattr(_tune, "block_ms", lambda call, calls, device: [call() * next(drift) for _ in range(calls)])
    monkeypatch.setattr(_tune, "calls_per_block", lambda call, device: 3)


def run(name):
    """A call whose time depends on who computes it, and on the configuration that is in force."""
    choice = OP.choose(Product(), name)
    block = dict(choice.configuration).get("block", 4)
    return {"library": 2.0}.get(choice.implementation, 8.0 / block)


def test_the_fastest_configuration_is_kept_and_used(clock, own_tables):
    trials = _tune.tune("product", Product(), CANDIDATES, run, budget_s=10, date="2026-01-31")
    assert not any(trial.refused for trial in trials.values())
    choice = OP.choose(Product())
    assert choice.implementation == "cpu"
    assert choice.configuration == (("block", 16),)
    table = json.loads(next(own_tables.iterdir()).read_text())
    assert table["date"] == "2026-01-31"
    (entry,) = table["entries"].values()
    assert entry["ms"] == pytest.approx(0.5, rel=0.011)
    assert entry["others_ms"] == {"library": pytest.approx(2.0, rel=0.011)}


def test_those_that_fall_behind_are_not_timed_on(clock):
    trials = _tune.tune("product", Product(), CANDIDATES, run, budget_s=10)
    blocks = {candidate: len(trial.block_medians_ms) for candidate, trial in trials.items()}
    assert blocks == dict(zip(CANDIDATES, (2, _tune.ROUNDS, 2, 2), strict=True))


def test_the_wrong_and_the_failing_are_dropped(clock):
    def broken(name):
        if dict(OP.choose(Product(), name).configuration).get("block") == 16:
            raise RuntimeError("out of shared memory\nand more")
        return run(name)

    def verify(name, result):
        return "off by 1" if (name, result) == ("cpu", 1.0) else ""

    trials = _tune.tune("product", Product(), CANDIDATES, broken, budget_s=10, verify=verify)
    assert trials[CANDIDATES[0]].wrong == "off by 1"
    assert trials[CANDIDATES[1]].refused == "RuntimeError: out of shared memory"
    assert OP.choose(Product()).configuration == ()


def test_nothing_is_recorded_where_nothing_could_be_timed(clock, own_tables):
    def broken(name):
        raise RuntimeError("no device")

    with pytest.raises(InvalidInputError, match="RuntimeError: no device"):
        _tune.tune("product", Product(), CANDIDATES, broken, budget_s=10)
    assert not own_tables.exists()


def test_the_budget_is_kept(clock, monkeypatch):
    now = itertools.count(step=3.0)
    monkeypatch.setattr(_tune.time, "monotonic", lambda: next(now))
    trials = _tune.tune("product", Product(), CANDIDATES, run, budget_s=8)
    assert [bool(trial.refused) for trial in trials.values()] == [False, False, True, True]
    assert len(trials[CANDIDATES[0]].block_medians_ms) == 1


def test_what_is_shipped_is_followed_until_the_user_measures(clock, own_tables, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(_autotune, "SHIPPED", shipped)
    _tune.tune("product", Product(), CANDIDATES, run, budget_s=10, folder=shipped)
    assert not own_tables.exists()
    assert len(list(shipped.iterdir())) == 1
    assert OP.choose(Product()).configuration == (("block", 16),)
    _tune.tune("product", Product(), [("library", ())], run, budget_s=10)
    assert OP.choose(Product()).implementation == "library"


def test_what_is_assumed_ends_with_the_block():
    with _autotune.assume("product", Product(), "cpu", (("block", 8),)):
        assert OP.choose(Product()).configuration == (("block", 8),)
        with _autotune.assume("product", Product(), "library", ()):
            assert OP.choose(Product()).implementation == "library"
        assert OP.choose(Product(), "cpu").configuration == (("block", 8),)
        assert OP.choose(Product(5)).configuration == ()
    assert OP.choose(Product()).why.startswith("first that takes the call")


def test_a_real_clock_tells_slow_from_fast():
    """Without stand-ins, on calls of which one does a hundred times as much."""
    work = {"cpu": 1000, "library": 100_000}
    trials = _tune.tune(
        "product", Product(), [("library", ()), ("cpu", ())], lambda name: sum(range(work[name])), budget_s=5
    )
    assert OP.choose(Product()).implementation == "cpu"
    assert all(trial.block_medians_ms for trial in trials.values())
