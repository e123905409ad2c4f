"""The reference models in PyTorch, as a textbook prints them, with the printed mistakes corrected.

Letters in shapes: B batch, T time steps, F features of one step, H hidden units. All parameters are float32.
Their twins in flax are in `flax_models.py`, under the same names.
"""

import torch
from torch import Tensor, nn


class CNN(nn.Module):
    """One convolution and two linear layers, for 28×28 images of ten classes.

    Printed, `fc1` takes 32·7·7 inputs. A 3×3 convolution without padding makes 26×26 of 28×28, and the pool 13×13, so
    it takes 32·13·13 = 5408. `relu` is one module used twice, as printed: optimizers of graphs must cope with that.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(32 * 13 * 13, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1, 28, 28), float32. Returns class scores: (B, 10)."""
        x = self.pool(self.relu(self.conv1(x)))
        x = x.view(x.size(0), -1)
        x = self.relu(self.fc1(x))
        return self.fc2(x)


class CNN2(nn.Module):
    """Two padded convolutions and two linear layers, for 28×28 images of ten classes.

    The twin of the document's JAX model. Printed, `fc1` takes 64·4·4 inputs; two pools make 28 → 14 → 7, so it takes
    64·7·7 = 3136.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding="same")
        self.conv2 = nn.Conv2d(32, 64, 3, padding="same")
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1, 28, 28), float32. Returns class scores: (B, 10)."""
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = x.view(x.size(0), -1)
        x = self.relu(self.fc1(x))
        return self.fc2(x)


class RNN(nn.Module):
    """A plain recurrent network that reads a sequence and answers with one number.

    Printed, it is trained on batches of images, which are not time-major sequences of ten features. Here it learns the
    adding problem, the usual test of a recurrent regression, and is scored on held-out sequences.
    """

    def __init__(self, input_size: int = 10, hidden_size: int = 50, output_size: int = 1):
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, B, F), float32. Returns one number for each sequence: (B, 1)."""
        hidden_TBH, _ = self.rnn(x)
        return self.fc(hidden_TBH[-1])


class LSTM(nn.Module):
    """A long short-term memory that reads a sequence and answers with one number.

    Printed, it is trained on batches of images, which are not time-major sequences of ten features. Here it learns the
    adding problem, the usual test of a recurrent regression, and is scored on held-out sequences.
    """

    def __init__(self, input_size: int = 10, hidden_size: int = 50, output_size: int = 1):
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, B, F), float32. Returns one number for each sequence: (B, 1)."""
        hidden_TBH, _ = self.lstm(x)
        return self.fc(hidden_TBH[-1])


class TextRNN(nn.Module):
    """A two-layer recurrent network that reads a text and answers yes or no with one logit.

    Printed, its loss is a cross-entropy over a single class, which is always zero, and its texts come from a torchtext
    interface that no longer exists. Here the loss is binary cross-entropy on the logit, and `lengths` says where each
    text of a padded batch ends.
    """

    def __init__(self, vocabulary_size: int = 25_000, embedding_size: int = 100, hidden_size: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.rnn = nn.RNN(embedding_size, hidden_size, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden_size, 1)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids: (B, T), int64; lengths: (B,), int64, each in 1..T. Returns logits: (B, 1)."""
        hidden_BTH, _ = self.rnn(self.embedding(ids))
        return self.fc(last_valid(hidden_BTH, lengths))


class TextLSTM(nn.Module):
    """A two-layer long short-term memory that reads a text and answers yes or no with one logit.

    What the printed version got wrong is said at `TextRNN`.
    """

    def __init__(self, vocabulary_size: int = 25_000, embedding_size: int = 100, hidden_size: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden_size, 1)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids: (B, T), int64; lengths: (B,), int64, each in 1..T. Returns logits: (B, 1)."""
        hidden_BTH, _ = self.lstm(self.embedding(ids))
        return self.fc(last_valid(hidden_BTH, lengths))


def last_valid(hidden_BTH: Tensor, lengths: Tensor) -> Tensor:
    """Pick each row's output at its last real step: (B, H). Later steps read padding and cannot reach back to it."""
    last_B1H = (lengths - 1)[:, None, None].expand(-1, 1, hidden_BTH.size(2))
    return torch.gather(hidden_BTH, 1, last_B1H).squeeze(1)


BY_NAME = {"cnn": CNN, "cnn2": CNN2, "rnn": RNN, "lstm": LSTM, "text_rnn": TextRNN, "text_lstm": TextLSTM}
