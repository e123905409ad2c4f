"""The six models as plain data: what each one reads, how it is judged, and how it is trained.

One recipe serves both frameworks: Adam at a constant rate, with the gradient's norm bounded where the model is
recurrent (Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import data
from ._checks import known, unfit
from .data import Dataset

Kind = Literal["images", "sequences", "texts"]

BATCH_SIZE = 64
FRAMEWORKS = ("torch", "jax")
METRICS: dict[Kind, Literal["accuracy", "mse"]] = {"images": "accuracy", "sequences": "mse", "texts": "accuracy"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about one reference model besides its code.

    Attributes:
        kind: what it reads.
        default_data: makes the data it is trained on when none is given.
        steps: optimizer steps of a default training run, at batch size 64.
        learning_rate: of Adam.
        max_norm: bound on the 2-norm of the whole gradient, or None for no bound.
    """

    kind: Kind
    default_data: Callable[[], Dataset]
    steps: int
    learning_rate: float
    max_norm: float | None = None


CARDS = {
    "cnn": Card(kind="images", default_data=data.digits, steps=400, learning_rate=3e-3),
    "cnn2": Card(kind="images", default_data=data.digits, steps=400, learning_rate=3e-3),
    "rnn": Card(kind="sequences", default_data=data.adding, steps=3000, learning_rate=3e-3, max_norm=1.0),
    "lstm": Card(kind="sequences", default_data=data.adding, steps=1000, learning_rate=1e-2, max_norm=1.0),
    "text_rnn": Card(kind="texts", default_data=data.corpus, steps=400, learning_rate=3e-3, max_norm=1.0),
    "text_lstm": Card(kind="texts", default_data=data.corpus, steps=200, learning_rate=2e-3, max_norm=1.0),
}

MODELS = tuple(CARDS)


def card(name: str) -> Card:
    """Look a model up by its name."""
    return CARDS[known(name, MODELS, what="reference model")]


def dataset(name: str, given: Dataset | None) -> Dataset:
    """The data for a model: what the caller gave, if the model can read it, or the model's default."""
    kind = card(name).kind
    if given is None:
        return card(name).default_data()
    if given.kind != kind:
        raise unfit(
            f"the model {name!r} was given {given.kind} ({given.name})",
            expected=kind,
            remedy="leave data out for the model's default",
        )
    return given
