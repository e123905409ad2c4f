"""One rule picks who computes a call; what was measured comes first, and a table is kept whole or not at all."""

import json
from dataclasses import dataclass

import pytest

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _autotune, trace
from perfkit.kernels._op import Implementation, Op


@dataclass(frozen=True)
class Product:
    size: int
    framework: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    needs_grad: bool = False

    @property
    def bucket(self) -> str:
        return f"size{self.size}"


def _small_only(problem: Product) -> str | None:
    return f"size {problem.size} is above 8" if problem.size > 8 else None


OP = Op(
    "product",
    (
        Implementation("triton", "torch", lambda problem: None, ("cuda",)),
        Implementation("cpu", "torch", _small_only, ("cpu",)),
        Implementation("reference", "torch", lambda problem: None),
        Implementation("pallas", "jax", _small_only),
    ),
)


@pytest.fixture(autouse=True)
def own_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    return tmp_path / "tuned"


def test_the_first_that_takes_the_call():
    choice = OP.choose(Product(4))
    assert choice.implementation == "cpu"
    assert choice.refused == (("triton", "it runs on cuda, and this call is on cpu"),)
    choice = OP.choose(Product(9))
    assert choice.implementation == "reference"
    assert ("cpu", "size 9 is above 8") in choice.refused


def test_the_measured_one_comes_first_on_its_own_bucket(own_tables):
    assert OP.choose(Product(4)).implementation == "cpu"
    times = {("cpu", (("block", 8),)): 2.0, ("reference", ()): 1.0, ("cpu", (("block", 4),)): 1.5}
    _autotune.record("product", Product(4), times, date="2026-01-31")
    choice = OP.choose(Product(4))
    assert choice.implementation == "reference"
    assert "measured fastest" in choice.why
    assert OP.choose(Product(5)).implementation == "cpu"
    (path,) = own_tables.iterdir()
    table = json.loads(path.read_text())
    assert table["date"] == "2026-01-31"
    assert table["entries"]["product/torch/float32/size4"]["others_ms"] == {"cpu": 1.5}


def test_a_measured_one_that_refuses_is_passed_over():
    _autotune.record("product", Product(9), {("cpu", ()): 1.0})
    assert OP.choose(Product(9)).implementation == "reference"


def test_the_measured_configuration_comes_with_a_forced_choice():
    _autotune.record("product", Product(4), {("cpu", (("block", 8),)): 1.0})
    assert OP.choose(Product(4), "cpu").configuration == (("block", 8),)
    assert OP.choose(Product(4), "reference").configuration == ()


def test_where_the_library_is_expected_to_be_faster():
    """It is passed over, unless it is forced, measured, or the library does not take the call."""
    slow = Implementation("cpu", "torch", lambda problem: None, slower=lambda problem: "a guess")
    library = Implementation("library", "torch", _small_only)
    op = Op("product", (slow, library))
    choice = op.choose(Product(4))
    assert choice.implementation == "library"
    assert choice.refused == (("cpu", "a guess"),)
    assert op.choose(Product(9)).implementation == "cpu"
    assert op.choose(Product(4), "cpu").implementation == "cpu"
    assert Op("product", (library, slow)).choose(Product(9)).implementation == "cpu"
    _autotune.record("product", Product(4), {("cpu", ()): 1.0, ("library", ()): 2.0})
    assert op.choose(Product(4)).implementation == "cpu"


def test_forcing():
    assert OP.choose(Product(4), "reference").why == "asked for"
    with pytest.raises(UnsupportedError, match="'triton': it runs on cuda, and this call is on cpu"):
        OP.choose(Product(4), "triton")
    with pytest.raises(UnsupportedError, match="size 9 is above 8"):
        OP.choose(Product(9), "cpu")
    with pytest.raises(InvalidInputError, match="no implementation 'pallas' for torch"):
        OP.choose(Product(4), "pallas")


def test_nobody_takes_it():
    with pytest.raises(UnsupportedError, match="pallas: size 9 is above 8"):
        OP.choose(Product(9, framework="jax"))


def test_tracing_nests_and_ends():
    with trace() as outer:
        OP.choose(Product(4))
        with trace() as inner:
            OP.choose(Product(9))
    OP.choose(Product(4))
    with trace() as silent:
        OP.choose(Product(4), recorded=False)
    assert silent == []
    assert [choice.implementation for choice in outer] == ["cpu", "reference"]
    assert [choice.implementation for choice in inner] == ["reference"]


def test_a_damaged_table_is_told_and_kept(own_tables):
    _autotune.record("product", Product(4), {("cpu", ()): 1.0})
    (path,) = own_tables.iterdir()
    path.write_text('{"entries": {"product/torch/float32/size5": {}}}')
    with pytest.raises(InvalidInputError, match="delete it and tune again"):
        _autotune.record("product", Product(4), {("cpu", ()): 1.0})
    assert path.read_text().startswith('{"entries"')
    assert [file.name for file in own_tables.iterdir()] == [path.name]


def test_nothing_timed_is_an_error():
    with pytest.raises(InvalidInputError, match="nothing was timed"):
        _autotune.record("product", Product(4), {})
