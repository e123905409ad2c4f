"""The data sets of the reference models, as plain numpy arrays split into training and held-out rows.

`digits`, `adding` and `corpus` need no network. `mnist` and `imdb` read the published files, and download them when
asked.
"""

from ._adding import adding
from ._corpus import corpus
from ._dataset import Dataset, Split
from ._digits import digits
from ._imdb import imdb
from ._mnist import mnist

__all__ = ["Dataset", "Split", "adding", "corpus", "digits", "imdb", "mnist"]
