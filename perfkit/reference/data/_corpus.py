"""A labelled text corpus from what every Python installation ships: which way does this passage read?"""

import functools
import importlib
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perfkit.reference._checks import missing

from ._dataset import Dataset
from ._texts import LENGTH, Labelled, text_dataset, words

SHORTEST = 16  # words of a passage; the longest has LENGTH

# Packages that a distribution may leave out or move, so that neighbouring installations read the same files.
_NOT_EVERYWHERE = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip"),
    *("lib2to3", "distutils"),
}
TOPICS = "pydoc_data/topics.py"
_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_BLANK_LINES = re.compile(r"\n\s*\n")

Paragraph = tuple[str, ...]


@functools.lru_cache(maxsize=2)
def corpus(seed: int = 0) -> Dataset:
    """Make passages of English prose to tell from the same passages with their words reversed.

    The prose is that of Python's own documentation: the language reference behind `help()` and the docstrings of the
    standard library. Each passage of 16 to 128 consecutive words appears twice, as it reads (label 1.0) and back to
    front (0.0). So the classes are of one size and hold the same words: counting words is right half of the time, and
    only a model that reads them in order can do better. A fifth of the prose is held out by whole source files, and no
    paragraph occurs twice, so nothing held out has been seen in training.

    The corpus is the same at every call on one Python installation; another version ships other prose.

    Args:
        seed: of the random generator that shares out the files and cuts the passages.

    Returns:
        Dataset of kind "texts": inputs (ids (N, 128) int64 below 25,000, lengths (N,) int64), targets (N, 1) float32.

    Raises:
        FileNotFoundError: The standard library is installed without its source files.

    Example:
        >>> data = corpus()
        >>> ids, lengths = data.train.inputs
        >>> passage = [data.vocabulary[number] for number in ids[0, : lengths[0]]]
    """
    generator = np.random.default_rng(seed)
    sources = _prose(Path(sysconfig.get_path("stdlib")))
    total = sum(len(paragraph) for source in sources for paragraph in source)
    train, test = [], []
    taken = 0
    for index in generator.permutation(len(sources)):
        prose = [word for paragraph in sources[index] for word in paragraph]
        (test if taken < total // 5 else train).extend(_both_ways(prose, generator))
        taken += len(prose)
    return text_dataset("Python's own prose, forwards or backwards", train, test)


def _both_ways(prose: list[str], generator: np.random.Generator) -> Labelled:
    """Cut prose into passages of random length; what is left at the end is dropped when it is too short."""
    passages = []
    start = 0
    while len(prose) - start >= SHORTEST:
        passage = prose[start : start + int(generator.integers(SHORTEST, LENGTH, endpoint=True))]
        passages += [(passage, 1.0), (passage[::-1], 0.0)]
        start += len(passage)
    return passages


@functools.lru_cache(maxsize=1)
def _prose(library: Path) -> tuple[tuple[Paragraph, ...], ...]:
    """The paragraphs of each source of prose, in a fixed order, each paragraph only where it occurs first."""
    seen: set[Paragraph] = set()
    sources = []
    for text in _source_texts(library):
        fresh = dict.fromkeys(paragraph for paragraph in _paragraphs(text) if paragraph not in seen)
        seen.update(fresh)
        if fresh:
            sources.append(tuple(fresh))
    if len(seen) < 1000:
        raise missing(
            library,
            expected=f"the standard library's source files (found {len(seen)} paragraphs of prose in them)",
            remedy="install Python with its .py files, or pass data=imdb(path) where a data set is wanted",
        )
    return tuple(sources)


def _source_texts(library: Path) -> Iterator[str]:
    """The language reference topic by topic, then the docstrings of each file of the standard library."""
    files = sorted(_python_files(library))
    if TOPICS in files:  # its texts are quoted differently from version to version
        yield from importlib.import_module("pydoc_data.topics").topics.values()
    for file in files:
        if file != TOPICS:
            yield "\n\n".join(_QUOTED.findall((library / file).read_text("utf-8", errors="replace")))


def _python_files(library: Path) -> Iterator[str]:
    """Paths below the standard library's folder, with forward slashes, so that they sort alike on every system."""
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = set(subfolders) - _NOT_EVERYWHERE
        yield from ((Path(folder) / name).relative_to(library).as_posix() for name in names if name.endswith(".py"))


def _paragraphs(text: str) -> Iterator[Paragraph]:
    """The paragraphs that are prose: twelve words or more, and at least four fifths small letters and spaces."""
    for block in _BLANK_LINES.split(text):
        line = " ".join(block.split())
        small = sum(character.islower() or character == " " for character in line)
        paragraph = tuple(words(line))
        if len(paragraph) >= 12 and small >= 0.8 * len(line):
            yield paragraph
