import math

import pytest
import torch
from tiny import VOCABULARY, character_tokenizer, llama

from attnrewrite.errors import AttnRewriteError
from attnrewrite.evaluation import encode, perplexity, read_text, strip_loss


class Fixed(torch.nn.Module):
    """Predicts from a table: the next token's logits depend on the present token."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table[ids]


def test_uniform_model_has_the_vocabulary_as_perplexity():
    found = perplexity(Fixed(torch.zeros(7, 7)), torch.arange(7)[None], seq_len=3)
    assert found.perplexity == pytest.approx(7)
    assert found.tokens == 4
    assert found.seconds >= 0


def test_loss_weighs_every_prediction_alike():
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0]])
    scores = table.log_softmax(-1)
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5), (6, 0)]
    expected = -sum(scores[a, b].item() for a, b in pairs) / len(pairs)
    found = perplexity(Fixed(table), ids, seq_len=3)
    assert (found.tokens, found.loss) == (5, pytest.approx(expected, rel=1e-6))
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_a_lone_last_token_predicts_nothing():
    assert perplexity(Fixed(torch.zeros(7, 7)), torch.arange(7)[None], seq_len=6).tokens == 5


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept_and_no_gradient_is_made(training):
    model = llama().train(training)
    perplexity(model, torch.arange(20)[None], seq_len=8)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_reaches_the_end():
    seen = []
    perplexity(llama(), torch.arange(20)[None], seq_len=8, progress=seen.append)
    assert seen == [8, 16, 20]


def test_strip_loss_is_differentiable_and_agrees():
    model, ids = llama(), torch.arange(16)[None]
    loss = strip_loss(model, ids)
    loss.backward()
    assert model.lm_head.weight.grad is not None
    assert loss.item() == pytest.approx(perplexity(model, ids, seq_len=16).loss, rel=1e-6)


@pytest.mark.parametrize(("count", "seq_len"), [(1, 8), (8, 1)])
def test_nothing_to_predict(count, seq_len):
    with pytest.raises(AttnRewriteError, match="at least 2") as raised:
        perplexity(llama(), torch.zeros(1, count, dtype=torch.long), seq_len=seq_len)
    assert raised.value.code == "AR102"


def test_the_text_that_ships_is_long_enough_and_plain():
    text = read_text()
    assert 1300 <= len(text.split()) <= 2000
    assert text.isascii()
    assert encode(character_tokenizer(), text).max() < VOCABULARY


def test_reading_a_text_that_is_none(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(AttnRewriteError) as raised:
        read_text(tmp_path / "bytes")
    assert raised.value.code == "AR602"
