"""The likelihood that experiments compare models by: of all texts together it is one."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.baselines import make_baseline
from modeling_yan.data import FlowCollator

from .test_experiments import CHECKPOINT, ROWS

VOCABULARY, LENGTH, EOS = 5, 3, 2
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
EXPERTS = {"num_experts": 3, "expert_scope": "sequence"}
CHAIN = {"crf_rank": 4, "crf_candidates": 3}
ALL = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


@pytest.fixture
def script(load_script):
    return load_script("likelihood")


def make_yan(**fields):
    torch.manual_seed(0)
    fields = {"train_expert_choice": "posterior", "num_experts": 1, "num_answer_slots": LENGTH, **fields}
    fields |= {"mse_weight": 0.0, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0, "mask_token_id": 3}
    config = YanConfig(vocab_size=VOCABULARY, canvas_length=LENGTH, initializer_range=0.5, **SIZES, **fields)
    model = YanForFlowGeneration(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def all_texts(prompt):
    """A batch of every canvas for one prompt."""
    ids = torch.tensor(prompt).expand(len(ALL), -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ALL}


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("fields", [{}, CHAIN, EXPERTS, EXPERTS | CHAIN], ids=["plain", "chain", "experts", "both"])
@torch.no_grad()
def test_the_likelihoods_of_all_canvases_add_up_to_one(script, fields, num_steps):
    model = make_yan(**fields)
    found = script.canvas_log_likelihood(model, "yan", all_texts([4, 1, 3]), num_steps).exp()
    assert found.sum().item() == pytest.approx(1, abs=1e-4)
    assert found.std() > 1e-4  # they differ
    assert torch.equal(found, script.canvas_log_likelihood(model, "yan", all_texts([4, 1, 3]), num_steps).exp())


@torch.no_grad()
def test_experts_are_summed_over(script):
    model = make_yan(**EXPERTS)
    batch = all_texts([4, 1])
    prompt = model.encode_prompt(batch["input_ids"], batch["attention_mask"])
    shares, texts = [], []
    for expert in range(3):
        latents, gate = script.lead_to(model, prompt, expert, LENGTH, 1)
        shares.append(gate.exp())
        texts.append(model.decode(latents).log_softmax(-1).gather(-1, ALL.unsqueeze(-1)).squeeze(-1).sum(-1).exp())
    torch.testing.assert_close(torch.stack(shares).sum(0), torch.ones(len(ALL)))
    expected = sum(share * text for share, text in zip(shares, texts, strict=True))
    torch.testing.assert_close(script.canvas_log_likelihood(model, "yan", batch, 1).exp(), expected)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@torch.no_grad()
def test_an_autoregressive_model_has_the_likelihood_of_its_loss(script, kind):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    }
    config = YanConfig(vocab_size=len(tokenizer), canvas_length=16, num_decoder_layers=1, **SIZES, **ids)
    model = make_baseline(kind, config).eval()
    rows = [*ROWS[:3], {"source": "Where?", "target": "here " * 16}]  # the last does not fit
    batch = FlowCollator(tokenizer, max_source_length=32, canvas_length=16)(ROWS[:3])
    expected = model(**script.INPUT_ADAPTERS[kind](batch, tokenizer.pad_token_id)).loss.item()
    assert script.nats_per_token(model, kind, tokenizer, rows, 0, 16, 32) == pytest.approx(expected, rel=1e-5)


def test_chains_of_experts_and_diffusion_have_none(script):
    assert not script.has_likelihood(make_yan(num_experts=3, expert_scope="chain"), "yan")
    assert not script.has_likelihood(make_yan(num_experts=3, expert_scope="token"), "yan")
    assert script.has_likelihood(make_yan(**EXPERTS), "yan")
    assert not script.has_likelihood(None, "masked_diffusion")
