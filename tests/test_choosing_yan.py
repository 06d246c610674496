"""Where nothing is drawn, a text comes from the expert that makes it the most probable, not from the favourite."""

import pytest
import torch
from torch import nn

from modeling_yan.flow_matching_yan import token_log_likelihood

FIELDS = {"train_expert_choice": "posterior", "expert_scope": "sequence", "num_experts": 3, "initializer_range": 0.3}
EOS = 2


@pytest.fixture
def variant():
    return "attention"  # no mixer takes part


def make_lively(make_model, **fields):
    model = make_model(**{**FIELDS, **fields})
    for parameter in model.flow.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def length_of(text):
    """Number of tokens up to the first EOS, which counts."""
    return text.index(EOS) + 1 if EOS in text else len(text)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("penalty", [1.0, 0.0])
@torch.no_grad()
def test_the_text_is_the_most_probable_for_its_length(make_model, rank, penalty):
    model, ids = make_lively(make_model, transition_rank=rank), torch.randint(4, 64, (8, 6))
    options = {"num_flow_steps": 1, "return_prompt": False, "length_penalty": penalty}
    options |= {"max_new_tokens": 8, "return_dict_in_generate": True}
    output = model.generate(ids, **options)
    ranked = model.generate(ids, expert_choice="ranked", num_return_sequences=3, **options)
    log_gate = output.gate[0][:, 0].log().sort(-1, descending=True).values  # as ranked: the most probable first
    latents = ranked.trajectory[0][:, -1]
    logits = model.decode(latents)
    texts = model.most_likely(logits, latents, (EOS,), length_penalty=penalty)
    if rank:
        scores = model.transitions.log_likelihood(model.get_input_embeddings(), logits, latents, texts)
    else:
        scores = token_log_likelihood(logits, texts).sum(-1)
    lengths = torch.tensor([length_of(text) for text in texts.tolist()])
    best = ((scores.view(8, 3) + log_gate) / lengths.view(8, 3) ** penalty).argmax(-1)
    assert len(best.unique()) > 1  # not always the gate's favourite
    chosen = ranked.sequences.view(8, 3, -1)[torch.arange(8), best]
    width = output.sequences.shape[1]
    assert torch.equal(output.sequences, chosen[:, :width])
    assert (chosen[:, width:] == model.generation_config.pad_token_id).all()
