"""IMDB film reviews, from the published folder or archive."""

import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from perfkit.reference._checks import corrupt, missing

from ._dataset import Dataset
from ._download import cache_folder, fetch
from ._texts import LENGTH, text_dataset, words

SOURCE = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
ARCHIVE = "aclImdb_v1.tar.gz"
MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
FOLDER = "aclImdb"
PARTS = {"train/neg": 0.0, "train/pos": 1.0, "test/neg": 0.0, "test/pos": 1.0}
_REMEDY = "remove it and call imdb(path, download=True)"

Review = tuple[str, str, str]  # part, file name, text


def imdb(
    path: str | Path | None = None, download: bool = False, *, source: str = SOURCE, progress: bool = False
) -> Dataset:
    """Load 25,000 training and 25,000 held-out film reviews, each for (1.0) or against (0.0) the film.

    Of each review the first 128 words are kept.

    Args:
        path: the folder `aclImdb`, a folder that holds it or `aclImdb_v1.tar.gz`, or that archive itself, which is read
            without being unpacked; None for perfkit's folder in the user's cache.
        download: fetch the archive into `path` if no reviews are there, 84 MB, verified against the published checksum.
        source: address of the archive.
        progress: draw a progress bar on standard error while fetching.

    Returns:
        Dataset of kind "texts": inputs (ids (N, 128) int64 below 25,000, lengths (N,) int64), targets (N, 1) float32.

    Raises:
        FileNotFoundError: There are no reviews and `download` is False.
        ConnectionError: The source could not be read.
        ValueError: The archive is damaged, its checksum is wrong after the download, or a part of the data is missing.

    Example:
        imdb("~/datasets/aclImdb").train.inputs[0].shape  # (25000, 128)

    Source: Maas et al.: Learning Word Vectors for Sentiment Analysis, ACL 2011.
    """
    where = cache_folder("imdb") if path is None else Path(path).expanduser()
    found = _find(where)
    if found is None and download:
        found = where if where.name.endswith(".tar.gz") else where / ARCHIVE
        fetch(source, found, md5=MD5, progress=progress)
    if found is None:
        raise missing(
            where,
            expected=f"the folder {FOLDER} or the archive {ARCHIVE}",
            remedy="put one there or pass download=True to fetch it",
        )
    return _dataset(_read_archive(found) if found.is_file() else _read_folder(found), found)


def _find(where: Path) -> Path | None:
    """The first of the places where the reviews may be that exists."""
    folders = (path for path in (where, where / FOLDER) if (path / "train").is_dir())
    archives = (path for path in (where, where / ARCHIVE) if path.is_file())
    return next(chain(folders, archives), None)


def _read_folder(folder: Path) -> Iterator[Review]:
    for part in PARTS:
        for path in (folder / part).glob("*.txt"):
            yield part, path.name, path.read_text("utf-8", errors="replace")


def _read_archive(archive: Path) -> Iterator[Review]:
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                part, _, name = member.name.removeprefix(f"{FOLDER}/").rpartition("/")
                if part in PARTS and name.endswith(".txt") and member.isfile():
                    yield part, name, members.extractfile(member).read().decode("utf-8", errors="replace")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise corrupt(archive, given=str(error), expected="a whole tar.gz archive", remedy=_REMEDY) from error


def _dataset(reviews: Iterable[Review], found: Path) -> Dataset:
    by_part = {part: [] for part in PARTS}
    # Folders and archives list their files in no particular order; sorted, both give the same arrays.
    for part, name, text in sorted(reviews):
        review = words(text.replace("<br />", " "), LENGTH)
        if not review:
            raise corrupt(found, given=f"{part}/{name} has no words", expected="a review", remedy=_REMEDY)
        by_part[part].append((review, PARTS[part]))
    empty = [part for part, labelled in by_part.items() if not labelled]
    if empty:
        raise missing(found, expected=f"any reviews in {', '.join(empty)}", remedy=_REMEDY)
    return text_dataset(
        "IMDB reviews",
        train=by_part["train/neg"] + by_part["train/pos"],
        test=by_part["test/neg"] + by_part["test/pos"],
    )
