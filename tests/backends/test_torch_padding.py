"""Recurrent layers that stop at the last step that is read: the numbers stay, and nothing waits too long."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from fused_torch import TOLERANCE, assert_same, reasons, swapped
from torch import nn

import perfkit
from perfkit import UnsupportedError
from perfkit.backends import torch_waiting
from perfkit.backends.torch_deferred import Deferred

ROWS, STEPS, HIDDEN = 5, 9, 16
LEAST_WORK = torch_waiting.LEAST_WORK
READ = torch.tensor([4, 9, 1, 6, 2])
"""Steps of each row up to the one that is read: 22 of 45."""


def expanded(hidden, ends):
    return hidden.gather(1, (ends - 1)[:, None, None].expand(-1, 1, hidden.size(2))).squeeze(1)


def repeated(hidden, ends):
    return torch.gather(hidden, 1, (ends - 1)[:, None, None].repeat(1, 1, hidden.shape[-1]))[:, 0]


SPELLINGS = {
    "indexed": lambda hidden, ends: hidden[torch.arange(len(ends)), ends - 1],
    "sliced": lambda hidden, ends: hidden[range(hidden.shape[0]), ends - 1, :],
    "behind": lambda hidden, ends: hidden[torch.arange(len(ends)), ends - 1 - hidden.size(1)],
    "listed": lambda hidden, ends: hidden[list(range(len(hidden))), [int(end) - 1 for end in ends], ...],
    "expanded": expanded,
    "repeated": repeated,
    "along": lambda hidden, ends: torch.take_along_dim(hidden, (ends - 1)[:, None, None], 1)[:, 0],
    "along, beyond": lambda hidden, ends: torch.take_along_dim(hidden, (ends - 1 + STEPS)[:, None, None], 1)[:, 0],
    "two": lambda hidden, ends: hidden[torch.arange(len(ends))[:, None], torch.stack([ends * 0, ends - 1], 1)].sum(1),
    "again": lambda hidden, ends: (
        hidden[torch.arange(len(ends)), ends - 1] - hidden[torch.arange(len(ends)), ends // 2]
    ),
}


class Reader(nn.Module):
    """Texts through an embedding and recurrent layers; `read(hidden, ends)` is what is made of it."""

    def __init__(self, read, kind=nn.LSTM, *, batch_first=True, stacked=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.drop = nn.Embedding(50, 8), nn.Dropout(0.5)
        self.rnn = kind(8, HIDDEN, batch_first=batch_first, **options)
        self.then = nn.GRU(HIDDEN, HIDDEN, batch_first=batch_first) if stacked else None
        self.read, self.batch_first = read, batch_first

    def forward(self, ids, ends):
        hidden, _ = self.rnn(self.embedding(ids if self.batch_first else ids.T))
        if self.then is not None:
            hidden, _ = self.then(self.drop(hidden))
        return self.read(hidden, ends)


def texts():
    return torch.randint(0, 50, (ROWS, STEPS), generator=torch.Generator().manual_seed(1)), READ


def skipping(model, inputs, *, fused=True, trains=False):
    """The model with both recipes, or the second alone, and the effect of the second."""
    if fused:
        model, _ = swapped(model, inputs, trains=trains)
    return swapped(model, inputs, trains=trains, recipe="skip_padding")


@pytest.fixture(autouse=True)
def small_calls_wait(monkeypatch):
    monkeypatch.setattr(torch_waiting, "LEAST_WORK", 0)


@pytest.fixture
def looked_up(monkeypatch):
    """How many indices each lookup is of."""
    counts = []
    own = nn.functional.embedding
    monkeypatch.setattr(nn.functional, "embedding", lambda ids, *rest: counts.append(ids.numel()) or own(ids, *rest))
    return counts


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_read_stays_and_no_more_is_computed(spelling, looked_up):
    model, inputs = Reader(SPELLINGS[spelling], num_layers=2).eval(), texts()
    result, effect = skipping(model, inputs)
    assert effect.touched == ("rnn",)
    assert effect.notes[0].startswith("rnn: 22 of 45 steps are computed for the example inputs")
    looked_up.clear()
    with torch.no_grad():
        y = result(*inputs)
        assert looked_up == [22]
        assert type(y) is torch.Tensor
        assert_same(y, model(*inputs))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_librarys_layers_run_to_the_longest_row(kind, looked_up):
    model = Reader(lambda hidden, ends: hidden[ends - 1, torch.arange(len(ends))], kind, batch_first=False).eval()
    ids, ends = texts()[0], READ.clamp(max=6)
    result, effect = skipping(model, (ids, ends), fused=False)
    assert effect.notes[0].startswith("rnn: 30 of 45 steps")
    looked_up.clear()
    assert_same(result(ids, ends), model(ids, ends))
    assert looked_up == [30, 45]
    _, effect = skipping(model, (ids, READ), fused=False)
    assert effect.notes[0].startswith("rnn: 45 of 45 steps are computed for the example inputs, and 22 are read: the")


def test_layers_that_feed_each_other_stop_together(looked_up):
    model, inputs = Reader(expanded, stacked=True).eval(), texts()
    result, effect = skipping(model, inputs)
    assert effect.touched == ("rnn", "then")
    looked_up.clear()
    assert_same(result(*inputs), model(*inputs))
    assert looked_up[0] == 22


def test_one_row():
    model = Reader(expanded).eval()
    inputs = texts()[0][:1], READ[:1]
    result, effect = skipping(model, inputs)
    assert effect.notes[0].startswith("rnn: 4 of 9 steps")
    assert_same(result(*inputs), model(*inputs))


def test_calls_that_are_over_sooner_do_not_wait(monkeypatch, looked_up):
    model, inputs = Reader(expanded, num_layers=2).eval(), texts()
    result, _ = skipping(model, inputs)
    work = ROWS * STEPS * 4 * HIDDEN * (8 + 3 * HIDDEN)
    for least, expected in ((work, 22), (work + 1, 45), (LEAST_WORK, 45)):
        monkeypatch.setattr(torch_waiting, "LEAST_WORK", least)
        looked_up.clear()
        result(*inputs)
        assert looked_up == [expected]
    _, effect = skipping(model, inputs)
    assert "its calls are too small" in reasons(effect)["rnn"]


OTHERWISE = {
    "mean": (lambda hidden, _: hidden.mean(1), "by mean"),
    "last step": (lambda hidden, _: hidden[:, -1], "by __getitem__"),
    "rows in turn": (
        lambda hidden, ends: torch.stack([row[end - 1] for row, end in zip(hidden, ends, strict=True)]),
        "by unbind",
    ),
    "returned": (lambda hidden, _: hidden, "by what the model returns or keeps"),
    "kept": (lambda hidden, ends: {"last": expanded(hidden, ends), "all": [hidden]}, "by what the model returns"),
    "both": (lambda hidden, ends: expanded(hidden, ends) + hidden.sum(1), "by sum"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_read_otherwise_is_computed_whole_and_told(name):
    read, why = OTHERWISE[name]
    model, inputs = Reader(read).eval(), texts()
    result, effect = skipping(model, inputs)
    assert not effect.touched
    assert "all of its output or its last state is read, by" in reasons(effect)["rnn"]
    assert why in reasons(effect)["rnn"]
    assert_same(result(*inputs), model(*inputs))


def scaled(hidden, ends):
    first = expanded(hidden, ends)
    hidden.mul_(2)
    return first + hidden[torch.arange(len(ends)), ends - 1]


def read_twice(hidden, ends):
    first = expanded(hidden, ends)
    return first.mul_(2) + expanded(hidden, ends)


@pytest.mark.parametrize(("read", "touched"), [(scaled, ()), (read_twice, ("rnn",))])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_what_is_written_to_in_between_reads_is_as_it_was(read, touched, rows):
    model, inputs = Reader(read).eval(), tuple(each[:rows] for each in texts())
    _, effect = skipping(model, inputs)
    assert effect.touched == touched
    result, _ = swapped(model, None, recipe="skip_padding")
    with torch.no_grad():
        assert_same(result(*inputs), model(*inputs))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x * 2

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * 2


def test_gradients_that_would_be_lost_are_told():
    model, inputs = Reader(lambda hidden, ends: expanded(Doubled.apply(hidden), ends)), texts()
    _, effect = skipping(model, inputs, trains=True)
    assert not effect.touched
    result, _ = swapped(model, None, trains=True, recipe="skip_padding")
    loss = result(*inputs).sum()
    with pytest.raises(UnsupportedError, match=r"autograd's own.*exclude="):
        loss.backward()


def test_a_model_that_fails_where_layers_wait_is_told_and_left():
    def strict(hidden, ends):
        if type(hidden) is not torch.Tensor:
            raise TypeError("plain tensors only")
        return expanded(hidden, ends)

    result, effect = skipping(Reader(strict).eval(), texts())
    assert reasons(effect)["rnn"] == "the model fails where layers wait: TypeError: plain tensors only"
    result(*texts())


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_way_through_the_model_gives_what_it_gave(name):
    other, _ = OTHERWISE[name]
    model = Reader(lambda hidden, ends: expanded(hidden, ends) if len(hidden) == ROWS else other(hidden, ends)).eval()
    (ids, ends) = inputs = texts()
    result, effect = skipping(model, inputs)
    assert effect.touched == ("rnn",)
    found = result(ids[:4], ends[:4])
    assert_same(found, model(ids[:4], ends[:4]))
    leaves = torch.utils._pytree.tree_leaves(found)
    assert [type(leaf) for leaf in leaves] == [torch.Tensor] * len(leaves)


def test_what_a_model_keeps_for_itself_is_computed():
    class Keeps(Reader):
        def forward(self, ids, ends):
            hidden, (self.h, self.c) = self.rnn(self.embedding(ids))
            return expanded(hidden, ends)

    model = Keeps(None).eval()
    result, _ = swapped(model, None, recipe="skip_padding")
    inputs = texts()
    with torch.no_grad():
        assert_same(result(*inputs), model(*inputs))
    assert not result.h.requires_grad, "computed as it was called"
    assert_same(result.c + 0, model.c)


def test_gradients_are_the_originals():
    model, inputs = Reader(expanded, num_layers=2), texts()
    model.drop.p = 0.0
    result, effect = skipping(model, inputs, trains=True)
    assert effect.touched == ("rnn",)
    for each in (model, result):
        each(*inputs).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), result.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, **TOLERANCE, msg=name)


def test_states_are_given_and_modes_are_those_of_the_call():
    class Moody(Reader):
        def forward(self, ids, ends, state):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                hidden, _ = self.rnn(self.embedding(ids), state)
            return expanded(hidden, ends)

    model = Moody(None).eval()
    state = torch.randn(1, ROWS, HIDDEN), torch.randn(1, ROWS, HIDDEN)
    inputs = (*texts(), state)
    result, effect = skipping(model, inputs)
    assert effect.touched == ("rnn",)
    found, expected = result(*inputs), swapped(model, inputs)[0](*inputs)
    assert (found.dtype, found.requires_grad) == (expected.dtype, False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_written_to_in_between_is_told(mode):
    class Writes(Reader):
        def forward(self, ids, ends, factor=None):
            x = self.embedding(ids)
            hidden, _ = self.rnn(x + 0)
            hidden_of_x, _ = self.rnn(x.clone() if factor is None else x)
            if factor is not None:
                x.mul_(factor)
            return expanded(hidden, ends) + expanded(hidden_of_x, ends)

    model, inputs = Writes(None).eval(), texts()
    result, effect = skipping(model, inputs)
    assert effect.touched == ("rnn",)
    with mode():
        result(*inputs)
        with pytest.raises(UnsupportedError, match=r"what LSTM was called with was written to before .*exclude="):
            result(*inputs, 2.0)
        assert_same(result(*inputs), model(*inputs))


@pytest.mark.parametrize("spelling", ["indexed", "expanded"])
@pytest.mark.parametrize("end", [STEPS + 1, -STEPS])
def test_steps_that_are_not_there_fail_as_they_did(spelling, end):
    model, (ids, ends) = Reader(SPELLINGS[spelling]).eval(), texts()
    result, _ = skipping(model, (ids, ends))
    wrong = torch.cat([ends[:-1], torch.tensor([end])])
    with pytest.raises((IndexError, RuntimeError)) as expected:
        model(ids, wrong)
    with pytest.raises(expected.type) as found:
        result(ids, wrong)
    assert str(found.value) == str(expected.value)


def test_wrong_inputs_fail_where_they_did():
    model, (ids, ends) = Reader(expanded).eval(), texts()
    result, _ = skipping(model, (ids, ends))
    result.embedding = nn.Embedding(50, 7)
    with pytest.raises(perfkit.InvalidInputError, match=r"w_ih of layer 0 is .* expected torch.float32 \[64, 7\]"):
        result(ids, ends)


def test_layers_that_cannot_are_told_and_left():
    both = Reader(lambda hidden, ends: expanded(hidden, ends), bidirectional=True).eval()
    result, effect = skipping(both, texts())
    assert reasons(effect)["rnn"].startswith("it is bidirectional")
    assert_same(result(*texts()), both(*texts()))

    class Own(nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(input * 2, hx)

    _, effect = skipping(Reader(expanded, Own).eval(), texts())
    assert reasons(effect)["rnn"] == "this Own has a forward of its own, which may take no packed sequence"
    _, effect = swapped(nn.Linear(2, 2), torch.randn(1, 2), recipe="skip_padding")
    assert effect.notes == ("the model has no recurrent layer (nn.LSTM, nn.GRU or nn.RNN)",)


def test_an_embedding_that_counts_is_looked_up_whole(looked_up):
    model, inputs = Reader(expanded).eval(), texts()
    model.embedding.scale_grad_by_freq = True
    result, effect = skipping(model, inputs)
    assert effect.touched == ("rnn",)
    looked_up.clear()
    result(*inputs)
    assert looked_up == [45]


def test_a_copy_skips_and_what_is_compiled_does_not(looked_up):
    model, inputs = Reader(expanded).eval(), texts()
    result, _ = skipping(model, inputs)
    looked_up.clear()
    with torch.no_grad():
        expected = model(*inputs)
        assert_same(copy.deepcopy(result)(*inputs), expected)
        assert looked_up == [45, 22]
        assert_same(torch.compile(result, backend="eager")(*inputs), expected)
        result.compile(backend="eager")
        assert_same(result(*inputs), expected)
    assert set(looked_up[2:]) == {45}
    assert not any(type(each) is Deferred for each in vars(result).values())


@pytest.mark.usefixtures("hasty")
def test_the_search_looks_for_it_where_there_is_something_to_skip():
    inputs = texts()
    for model, worth in ((Reader(expanded), True), (Reader(OTHERWISE["mean"][0]), False), (nn.Linear(9, 2), False)):
        given = inputs if isinstance(model, Reader) else (torch.randn(2, 9),)
        reasons_of = {each.recipe: each.reason for each in perfkit.plan(model, example_inputs=given).candidates}
        assert bool(reasons_of["skip_padding"]) != worth, reasons_of["skip_padding"]
        assert ("fused_kernels+skip_padding" in reasons_of) == worth
