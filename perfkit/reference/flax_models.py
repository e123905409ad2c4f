"""The reference models in flax nnx, as a textbook prints them, with the printed mistakes corrected.

Letters in shapes: B batch, T time steps, F features of one step, H hidden units. All parameters are float32.
Their twins in PyTorch are in `torch_models.py`, under the same names.

The recurrent models scan over time with `jax.lax.scan`, inside `nnx.RNN`. They start it from zeros of their own,
because otherwise `nnx.RNN` keeps a random number stream and advances it at every call; so the models hold nothing but
parameters. Compile one with `nnx.jit`, or with `jax.jit` over `nnx.split` and `nnx.merge`: a `jax.jit` that closes over
a model with an `nnx.RNN` in it is refused by flax.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class CNN(nnx.Module):
    """One convolution and two linear layers, for 28×28 images of ten classes.

    The twin of the document's PyTorch model, with its 13·13·32 = 5408 inputs to `fc1` (printed: 7·7·32).
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(13 * 13 * 32, 128, rngs=rngs)
        self.fc2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, 28, 28, 1), float32. Returns class scores: (B, 10)."""
        x = nnx.max_pool(nnx.relu(self.conv1(x)), window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.fc1(x))
        return self.fc2(x)


class CNN2(nnx.Module):
    """Two padded convolutions and two linear layers, for 28×28 images of ten classes.

    Printed, `fc1` takes 64·4·4 inputs, layers come from a `jnp.nn` that does not exist, and the weights are not
    parameters, so nothing can learn. Two pools make 28 → 14 → 7: `fc1` takes 7·7·64 = 3136 inputs.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), padding="SAME", rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), padding="SAME", rngs=rngs)
        self.fc1 = nnx.Linear(7 * 7 * 64, 128, rngs=rngs)
        self.fc2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, 28, 28, 1), float32. Returns class scores: (B, 10)."""
        x = nnx.max_pool(nnx.relu(self.conv1(x)), window_shape=(2, 2), strides=(2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.fc1(x))
        return self.fc2(x)


class RNN(nnx.Module):
    """A plain recurrent network that reads a sequence and answers with one number.

    Printed, it is a Python loop over time. A scan compiles one step, whatever the length.
    """

    def __init__(self, input_size: int = 10, hidden_size: int = 50, output_size: int = 1, *, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(simple_cell(input_size, hidden_size, rngs), time_major=True, rngs=False)
        self.fc = nnx.Linear(hidden_size, output_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (T, B, F), float32. Returns one number for each sequence: (B, 1)."""
        hidden_TBH = self.rnn(x, initial_carry=zeros(self.rnn.cell, x, batch=x.shape[1]))
        return self.fc(hidden_TBH[-1])


class LSTM(nnx.Module):
    """A long short-term memory that reads a sequence and answers with one number.

    Printed, its gates do not each have weights of their own, and time is a Python loop. Here every gate has input and
    recurrent weights, laid side by side in the cell so that one product serves all four.
    """

    def __init__(self, input_size: int = 10, hidden_size: int = 50, output_size: int = 1, *, rngs: nnx.Rngs):
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(input_size, hidden_size, rngs=rngs), time_major=True, rngs=False)
        self.fc = nnx.Linear(hidden_size, output_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (T, B, F), float32. Returns one number for each sequence: (B, 1)."""
        start = zeros(self.lstm.cell, x, batch=x.shape[1])
        hidden_TBH = self.lstm(x, initial_carry=(start, start))
        return self.fc(hidden_TBH[-1])


class TextRNN(nnx.Module):
    """A two-layer recurrent network that reads a text and answers yes or no with one logit.

    The twin of the PyTorch model of this name, where the corrections are listed.
    """

    def __init__(
        self, vocabulary_size: int = 25_000, embedding_size: int = 100, hidden_size: int = 128, *, rngs: nnx.Rngs
    ):
        self.embedding = embedding(vocabulary_size, embedding_size, rngs)
        self.rnn1 = nnx.RNN(simple_cell(embedding_size, hidden_size, rngs), rngs=False)
        self.rnn2 = nnx.RNN(simple_cell(hidden_size, hidden_size, rngs), rngs=False)
        self.fc = nnx.Linear(hidden_size, 1, rngs=rngs)

    def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """ids: (B, T), int32; lengths: (B,), int32, each in 1..T. Returns logits: (B, 1)."""
        hidden_BTH = self.embedding(ids)
        for layer in (self.rnn1, self.rnn2):
            hidden_BTH = layer(hidden_BTH, initial_carry=zeros(layer.cell, hidden_BTH, batch=ids.shape[0]))
        return self.fc(last_valid(hidden_BTH, lengths))


class TextLSTM(nnx.Module):
    """A two-layer long short-term memory that reads a text and answers yes or no with one logit.

    The twin of the PyTorch model of this name, where the corrections are listed.
    """

    def __init__(
        self, vocabulary_size: int = 25_000, embedding_size: int = 100, hidden_size: int = 128, *, rngs: nnx.Rngs
    ):
        self.embedding = embedding(vocabulary_size, embedding_size, rngs)
        self.lstm1 = nnx.RNN(nnx.OptimizedLSTMCell(embedding_size, hidden_size, rngs=rngs), rngs=False)
        self.lstm2 = nnx.RNN(nnx.OptimizedLSTMCell(hidden_size, hidden_size, rngs=rngs), rngs=False)
        self.fc = nnx.Linear(hidden_size, 1, rngs=rngs)

    def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """ids: (B, T), int32; lengths: (B,), int32, each in 1..T. Returns logits: (B, 1)."""
        hidden_BTH = self.embedding(ids)
        for layer in (self.lstm1, self.lstm2):
            start = zeros(layer.cell, hidden_BTH, batch=ids.shape[0])
            hidden_BTH = layer(hidden_BTH, initial_carry=(start, start))
        return self.fc(last_valid(hidden_BTH, lengths))


def embedding(vocabulary_size: int, embedding_size: int, rngs: nnx.Rngs) -> nnx.Embed:
    """Word vectors drawn as torch draws them, with deviation 1.

    From flax's own, a tenth as long, the text models learn their training texts by heart and nothing of held-out ones.
    """
    return nnx.Embed(vocabulary_size, embedding_size, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)


def simple_cell(input_size: int, hidden_size: int, rngs: nnx.Rngs) -> nnx.SimpleCell:
    """h' = tanh(W x + U h + b), computed in the type of its inputs (flax's own default would force float32)."""
    return nnx.SimpleCell(input_size, hidden_size, dtype=None, rngs=rngs)


def zeros(cell: nnx.RNNCellBase, x: jax.Array, *, batch: int) -> jax.Array:
    """The state before the first step: (B, H), in the type that the cell will compute, as a scan must keep its type."""
    return jnp.zeros((batch, cell.hidden_features), jnp.promote_types(x.dtype, cell.dense_h.kernel.dtype))


def last_valid(hidden_BTH: jax.Array, lengths: jax.Array) -> jax.Array:
    """Pick each row's output at its last real step: (B, H). Later steps read padding and cannot reach back to it."""
    return jnp.take_along_axis(hidden_BTH, (lengths - 1)[:, None, None], axis=1)[:, 0]


BY_NAME = {"cnn": CNN, "cnn2": CNN2, "rnn": RNN, "lstm": LSTM, "text_rnn": TextRNN, "text_lstm": TextLSTM}
