"""Building C++ at first use: what is cached, what is refused and how."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perfkit import UnsupportedError
from perfkit.kernels import _native

SOURCE = 'extern "C" int answer() { return 42; }\n'
needs_compiler = pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel of its own name, and an empty cache."""
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answering" / "cpu_kernel.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """$CXX is a compiler that writes down each call."""
    log, wrapper = tmp_path / "calls", tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {" ".join(_native.find_compiler())} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return lambda: sum(" -o " in line for line in log.read_text().splitlines())


def built(tmp_path):
    return sorted((tmp_path / "cache" / "native").iterdir())


@needs_compiler
def test_it_is_built_once(source, counted, tmp_path):
    assert _native.load(source).answer() == 42
    assert counted() == 1
    _native._load.cache_clear()
    assert _native.load(source).answer() == 42
    assert counted() == 1
    assert len(built(tmp_path)) == 1


@needs_compiler
def test_another_source_is_another_library(source, counted, tmp_path):
    _native.load(source)
    source.write_text(SOURCE.replace("42", "43"))
    _native._load.cache_clear()
    assert _native.load(source).answer() == 43
    assert counted() == 2
    assert len(built(tmp_path)) == 2


@needs_compiler
def test_another_processor_or_compiler_is_another_library(source):
    compiler, flags = ("c++",), ("-O3",)
    keys = {
        _native._key(source, compiler, flags, "#define __AVX2__ 1"),
        _native._key(source, compiler, flags, "#define __AVX512VNNI__ 1"),
        _native._key(source, ("clang++",), flags, "#define __AVX2__ 1"),
        _native._key(source, compiler, ("-O2",), "#define __AVX2__ 1"),
    }
    assert len(keys) == 4


@needs_compiler
def test_a_damaged_library_is_built_anew(source, tmp_path):
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    compiler = _native.find_compiler()
    native, macros = _native._target(compiler)
    key = _native._key(source, compiler, (*_native.FLAGS, native), macros)
    (folder / f"answering-{key}.so").write_bytes(b"no library")
    assert _native.load(source).answer() == 42
    assert [path.name for path in built(tmp_path)] == [f"answering-{key}.so"]


@needs_compiler
def test_of_processes_that_race_one_builds(source, counted, tmp_path):
    load = f"print(_native.load(Path({str(source)!r})).answer())"
    code = f"from pathlib import Path; from perfkit.kernels import _native; {load}"
    racing = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in racing] == ["42"] * 3
    assert counted() == 1
    assert len(built(tmp_path)) == 1, "partial files or locks are left"


@needs_compiler
def test_where_files_cannot_be_locked_it_is_built_all_the_same(source, monkeypatch, tmp_path):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(_native.fcntl, "flock", refuse)
    assert _native.load(source).answer() == 42
    assert len(built(tmp_path)) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": ""}, r"neither g\+\+ nor clang\+\+ .*apt install g\+\+"),
        ({"CXX": "/nowhere/c++"}, "CXX='/nowhere/c..'"),
    ],
)
def test_without_a_compiler_it_says_what_to_install(source, monkeypatch, environment, message):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match=message):
        _native.load(source)


@needs_compiler
def test_a_compiler_that_was_found_is_not_looked_for_again(monkeypatch):
    """Calls of layers ask whether there is one."""
    found = _native.find_compiler()
    monkeypatch.setattr(_native.shutil, "which", lambda _: pytest.fail("it looks through the folders again"))
    assert _native.find_compiler() == found


@needs_compiler
def test_what_the_compiler_says_is_told(source, tmp_path):
    source.write_text("int answer( { }\n")
    with pytest.raises(UnsupportedError, match=r"cannot build cpu_kernel\.cpp: (.|\n)*error"):
        _native.load(source)
    assert built(tmp_path) == []


def test_a_compiler_that_does_not_run(source, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(UnsupportedError, match="false does not run"):
        _native.load(source)


@needs_compiler
def test_a_cache_that_cannot_be_made(source, tmp_path, monkeypatch):
    Path(tmp_path / "file").touch()
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UnsupportedError, match="set PERFKIT_CACHE"):
        _native.load(source)


def test_the_user_cache_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("PERFKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _native._folder() == tmp_path / "perfkit" / "native"
    assert os.access(_native._folder(), os.W_OK)
