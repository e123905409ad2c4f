"""IMDB's reviews, read from a few in the published layout."""

import hashlib
import tarfile

import numpy as np
import pytest

from perfkit.reference import data
from perfkit.reference.data import _imdb

REVIEWS = {
    "train/neg/0_1.txt": "Bad.<br /><br />Bad, bad film!",
    "train/neg/1_2.txt": "Don't watch it.",
    "train/pos/0_9.txt": "good " * 200,
    "train/unsup/0_0.txt": "Nobody knows.",
    "test/neg/0_3.txt": "A bad surprise",
    "test/pos/0_8.txt": "Good, good film: très good",
    "imdb.vocab": "good bad film",
}


@pytest.fixture
def folder(tmp_path):
    """A folder that holds aclImdb."""
    for name, text in REVIEWS.items():
        path = tmp_path / "data" / "aclImdb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def archive(folder, tmp_path):
    path = tmp_path / "packed" / "aclImdb_v1.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as out:
        out.add(folder / "aclImdb", arcname="aclImdb")
    return path


def decoded(dataset, split):
    ids, lengths = split.inputs
    return [" ".join(dataset.vocabulary[number] for number in row[:n]) for row, n in zip(ids, lengths, strict=True)]


def test_reviews_become_words_labels_and_lengths(folder):
    imdb = data.imdb(folder)
    assert decoded(imdb, imdb.train) == ["bad bad bad film", "don't watch it", " ".join(["good"] * 128)]
    assert imdb.train.targets.tolist() == [[0.0], [0.0], [1.0]]
    assert imdb.train.inputs[1].tolist() == [4, 3, 128]
    assert imdb.train.inputs[0].shape == (3, 128)
    assert imdb.train.inputs[0][0, 4:].tolist() == [0] * 124


def test_words_that_only_the_held_out_reviews_have_are_unknown(folder):
    imdb = data.imdb(folder)
    assert imdb.vocabulary == ("<padding>", "<unknown>", "good", "bad", "don't", "film", "it", "watch")
    assert decoded(imdb, imdb.test) == ["<unknown> bad <unknown>", "good good film <unknown> good"]


@pytest.mark.parametrize("where", ["the folder", "its parent", "the archive", "the archive's folder"])
def test_every_published_form_gives_the_same_data(folder, archive, where):
    path = {
        "the folder": folder / "aclImdb",
        "its parent": folder,
        "the archive": archive,
        "the archive's folder": archive.parent,
    }[where]
    expected, found = data.imdb(folder), data.imdb(str(path))
    assert found.vocabulary == expected.vocabulary
    for left, right in zip(
        found.train.inputs + found.test.inputs, expected.train.inputs + expected.test.inputs, strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not hold the folder aclImdb or the archive .*download=True"):
        data.imdb(tmp_path)


def test_a_missing_part_is_named(folder):
    (folder / "aclImdb/test/pos/0_8.txt").unlink()
    with pytest.raises(FileNotFoundError, match="any reviews in test/pos"):
        data.imdb(folder)


def test_a_review_without_words_is_named(folder):
    (folder / "aclImdb/test/pos/0_8.txt").write_text("...")
    with pytest.raises(ValueError, match=r"test/pos/0_8.txt has no words"):
        data.imdb(folder)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"<html>", lambda _: b""])
def test_a_damaged_archive_is_named(archive, damage):
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=r"aclImdb_v1.tar.gz is damaged: .*expected a whole tar.gz archive"):
        data.imdb(archive)


def test_the_archive_is_fetched_once_and_verified(folder, archive, tmp_path, monkeypatch):
    target = tmp_path / "cache"
    with pytest.raises(ValueError, match="expected 7c2ac02c03563afcf9b574c7e56c153a; nothing was kept"):
        data.imdb(target, download=True, source=archive.as_uri())
    assert list(target.iterdir()) == []
    monkeypatch.setattr(_imdb, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    fetched = data.imdb(target, download=True, source=archive.as_uri())
    assert fetched.vocabulary == data.imdb(folder).vocabulary
    assert [path.name for path in target.iterdir()] == ["aclImdb_v1.tar.gz"]
    data.imdb(target, download=True, source="file:///nowhere")  # it is there: nothing is fetched


def test_at_most_25000_words_are_told_apart(folder):
    words = [f"w{number:05x}".translate(str.maketrans("0123456789", "ghijklmnop")) for number in range(25_100)]
    for start in range(0, len(words), 100):
        (folder / f"aclImdb/train/neg/{start + 10}_1.txt").write_text(" ".join(words[start : start + 100]))
    imdb = data.imdb(folder)
    assert len(imdb.vocabulary) == 25_000
    assert imdb.train.inputs[0].max() == 24_999
