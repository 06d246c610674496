"""The best text of a canvas, against trying every length."""

import pytest
import torch

from modeling_yan import decoding_yan
from modeling_yan.decoding_yan import argmax_until_eos


@pytest.fixture(params=["plain", "compiled"], autouse=True)
def _form(request, monkeypatch):
    """A compiler gets another form of the search for the highest logits."""
    monkeypatch.setattr(decoding_yan, "use_custom_ops", lambda: request.param == "compiled")


def by_trying(logits, eos):
    """The best text of one canvas, logits (L, V), by the sum of its logits for every length."""
    logits, others = logits.double(), [token for token in range(logits.shape[-1]) if token not in eos]
    best, index = logits[:, others].max(-1)
    tokens = torch.tensor(others)[index]
    end, which = logits[:, eos].max(-1)
    scores = [best[:length].sum() + end[length:].sum() for length in range(len(logits) + 1)]
    length = int(torch.stack(scores).argmax())
    return [*tokens[:length].tolist(), *torch.tensor(eos)[which][length:].tolist()]


@pytest.mark.parametrize("eos", [(2,), (0,), (8,), (2, 5), (8, 0, 4)])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_it_is_the_best_of_all_lengths(eos, length):
    logits = torch.randn(20, length, 9)
    logits[..., list(eos)] += 1.0
    found = argmax_until_eos(logits, eos).tolist()
    assert found == [by_trying(row, list(eos)) for row in logits]
    if length == 7:
        num_written = {sum(token not in eos for token in row) for row in found}
        assert len(num_written) > 3


def test_what_stands_behind_a_doubt_is_kept():
    """Place by place the second token would be an EOS, and the rest of the text lost."""
    probabilities = torch.tensor([[0.0, 0.9, 0.1], [0.5, 0.3, 0.2], [0.1, 0.0, 0.9], [0.97, 0.02, 0.01]])
    logits = probabilities.clamp(min=1e-6).log().unsqueeze(0)
    assert logits.argmax(-1).tolist() == [[1, 0, 2, 0]]
    assert argmax_until_eos(logits, (0,)).tolist() == [[1, 1, 2, 0]]


def test_without_an_id_that_ends_a_text_every_token_is_the_likeliest():
    logits = torch.randn(3, 5, 7)
    assert torch.equal(argmax_until_eos(logits), logits.argmax(-1))


def test_forbidden_ends_and_tokens():
    logits = torch.randn(1, 6, 5)
    logits[..., 2] += 100
    logits[:, :3, 2] = -torch.inf
    logits[..., 4] = -torch.inf
    text = argmax_until_eos(logits, (2,))[0]
    assert text[3:].tolist() == [2, 2, 2]
    assert text[:3].tolist() == logits[0, :3].argmax(-1).tolist()
    logits[..., 2] = -torch.inf
    assert torch.equal(argmax_until_eos(logits, (2,)), logits.argmax(-1))
    logits[:, :, [0, 1, 3]], logits[..., 2] = -torch.inf, 0.0
    assert argmax_until_eos(logits, (2,)).tolist() == [[2] * 6]


def test_a_long_sure_text_does_not_blur_where_it_ends():
    logits = torch.zeros(1, 8192, 3)
    logits[:, :8000, 1] = logits[:, 8000:, 2] = 30.0
    logits[:, 8000, 1] = 30.001
    assert (argmax_until_eos(logits, (2,)) == 1).sum() == 8001


def test_half_precision_and_an_untouched_input():
    logits = torch.randn(2, 6, 9, dtype=torch.bfloat16)
    before = logits.clone()
    assert argmax_until_eos(logits, (2,)).tolist() == [by_trying(row, [2]) for row in logits]
    assert torch.equal(logits, before)
