"""What is refused, and that the refusal helps."""

import importlib
import sys

import pytest

from perfkit import reference
from perfkit.reference._checks import require


@pytest.mark.parametrize("call", [reference.load, reference.task, reference.train])
def test_misspelt_names_are_answered_with_the_nearest(call):
    with pytest.raises(ValueError, match=r"unknown reference model 'lsmt'.*did you mean 'lstm'"):
        call("lsmt")
    with pytest.raises(
        ValueError, match=r"unknown framework 'flax': expected one of 'torch', 'jax'; did you mean 'jax'"
    ):
        call("lstm", framework="flax")


def test_a_name_like_no_other_is_answered_with_all_of_them():
    with pytest.raises(ValueError, match=r"expected one of 'cnn', .*'text_lstm'$"):
        reference.load("zzzz")
    with pytest.raises(ValueError, match="unknown reference model None"):
        reference.load(None)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "8"])
@pytest.mark.parametrize("call", [reference.load, reference.task, reference.train])
def test_batch_sizes_below_one_are_refused(call, batch_size):
    with pytest.raises(ValueError, match=r"batch_size is .*expected a whole number, 1 or more"):
        call("lstm", batch_size=batch_size)


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0: expected a whole number, 1 or more"):
        reference.train("lstm", steps=0)


def test_data_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"'cnn' was given sequences \(adding problem, 28 steps\): expected images"):
        reference.train("cnn", data=reference.data.adding(count=10))


class NotInstalled:
    """A finder that knows one package to be absent, and comes before the finders that would find it."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, _path=None, _target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [
        ("torch", lambda: reference.load("lstm"), "torch"),
        ("flax", lambda: reference.load("lstm", framework="jax"), "jax"),
        ("optax", lambda: reference.load("lstm", framework="jax"), "jax"),
        ("sklearn", reference.data.digits, "data"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, package, call, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(package), *sys.meta_path])
    with pytest.raises(ImportError, match=rf"{package}.*not installed.*pip install 'perfkit\[{extra}\]'"):
        call()


def test_a_library_that_is_broken_is_not_reported_as_missing(monkeypatch, tmp_path):
    (tmp_path / "halfinstalled.py").write_text("import something_else_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_not_there"):
        require("halfinstalled", extra="data")
