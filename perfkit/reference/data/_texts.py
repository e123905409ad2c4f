"""From texts to numbers: splitting into words, choosing a vocabulary, padding to one length."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from ._dataset import Dataset, Split

LENGTH = 128  # words of a text that are kept
VOCABULARY_SIZE = 25_000  # rows of the text models' embeddings; every id is below it
PADDING, UNKNOWN = 0, 1

Labelled = Sequence[tuple[Sequence[str], float]]

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+")


def words(text: str, limit: int | None = None) -> list[str]:
    """Split a text into lower-case words and numbers, at most `limit` of them; punctuation is dropped."""
    return [match.group() for match in islice(_WORD.finditer(text.lower()), limit)]


def text_dataset(name: str, train: Labelled, test: Labelled) -> Dataset:
    """Number the words by how common they are in the training texts, and pad all texts to 128 words.

    Args:
        name: of the data set.
        train: (words, label) pairs with label 0.0 or 1.0; no text is empty.
        test: likewise, held out; its words have no say in the vocabulary.

    Returns:
        Dataset of kind "texts": ids (N, 128) int64 below 25,000, lengths (N,) int64 in 1..128, targets (N, 1) float32.
    """
    vocabulary = ("<padding>", "<unknown>", *_commonest((text for text, _ in train), VOCABULARY_SIZE - 2))
    ids = {word: number for number, word in enumerate(vocabulary)}
    return Dataset(name=name, kind="texts", train=_encode(train, ids), test=_encode(test, ids), vocabulary=vocabulary)


def _commonest(texts: Iterable[Sequence[str]], limit: int) -> list[str]:
    """The commonest words, equals in alphabetical order, so that the ids do not depend on the order of the texts."""
    counts = Counter(word for text in texts for word in text)
    return sorted(counts, key=lambda word: (-counts[word], word))[:limit]


def _encode(labelled: Labelled, ids: dict[str, int]) -> Split:
    padded = np.full((len(labelled), LENGTH), PADDING, dtype=np.int64)
    lengths = np.empty(len(labelled), dtype=np.int64)
    for row, (text, _) in enumerate(labelled):
        numbers = [ids.get(word, UNKNOWN) for word in text[:LENGTH]]
        padded[row, : len(numbers)] = numbers
        lengths[row] = len(numbers)
    return Split((padded, lengths), np.array([[label] for _, label in labelled], dtype=np.float32))
