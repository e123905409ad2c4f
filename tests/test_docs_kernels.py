"""What docs/kernels.md shows runs, and its commands are understood."""

import re
import shlex
from importlib import import_module

import pytest
from doc_pages import ROOT, blocks, commands

pytest.importorskip("torch")

PAGE = (ROOT / "docs" / "kernels.md").read_text()
EXAMPLES, COMMANDS = blocks("python", PAGE), commands(PAGE)


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) == 3
    assert {line.split()[2] for line in COMMANDS} == {"bench.aot", "bench.gpu", "bench.kernels"}


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, monkeypatch, tmp_path, capsys):
    from perfkit.kernels import _autotune

    # the table of the last one; not the folder of compiled kernels, which would be built anew
    monkeypatch.setattr(_autotune, "cache_folder", lambda name: tmp_path / name)
    exec(compile(EXAMPLES[number], f"docs/kernels.md, example {number}", "exec"), {})
    assert bool(list(tmp_path.glob("tuned/*.json"))) == ("tune(" in EXAMPLES[number])


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    python, flag, name, *arguments = shlex.split(line)
    assert (python, flag) == ("python", "-m")
    import_module(name)._parser().parse_args(arguments)


def test_every_operation_and_implementation_is_told():
    from perfkit import kernels

    told = set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE))
    implementations = {found.name for op in kernels.OPS for found in getattr(kernels, op).OP.implementations}
    assert implementations <= told
    assert all(f"kernels/{op}/__init__.py" in PAGE for op in kernels.OPS)
