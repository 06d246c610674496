"""A model with merged projections computes what the plain one computes, with fewer matrices."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_yan.data import generate_stories
from modeling_yan.evaluation import generate_answers
from modeling_yan.export import with_int8_weights, with_merged_projections
from modeling_yan.mamba_yan import YanBidirectionalMamba

MAMBA_CHECKPOINT = Path(__file__).parents[1] / "examples" / "checkpoints" / "yan-mamba-tiny"


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("expand", [1, 2])
@torch.no_grad()
def test_a_merged_mixer_computes_the_same(make_config, use_bias, expand):
    mixer = YanBidirectionalMamba(make_config(use_bias=use_bias, expand=expand))
    mixer.forward_mamba.reset_parameters()
    mixer.backward_mamba.reset_parameters()
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    states = torch.randn(2, 7, 32)
    expected = mixer(states, mask)
    merged = with_merged_projections(mixer)
    torch.testing.assert_close(merged(states, mask), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(mixer(states, mask), expected)  # the original is as it was
    assert merged.out_proj.weight.shape == (32, 2 * expand * 32)
    num_removed = sum(p.numel() for p in mixer.parameters()) - sum(p.numel() for p in merged.parameters())
    assert num_removed == 2 * 32 * 32 + use_bias * 2 * 32


def test_a_merged_model_writes_the_same_tokens(make_model, variant):
    model = make_model()
    prompts = torch.randint(4, 64, (3, 6))
    assert torch.equal(with_merged_projections(model).generate(prompts), model.generate(prompts))


def test_the_bundled_mamba_merged_answers_the_same_and_can_be_quantised_too():
    model = AutoModelForCausalLM.from_pretrained(MAMBA_CHECKPOINT).eval()
    tokenizer = AutoTokenizer.from_pretrained(MAMBA_CHECKPOINT)
    rows = generate_stories(40, seed=1, max_sentences=4, answer_slot="<mask>" * 8 + " ")
    sources = [row["source"] for row in rows]
    merged = with_merged_projections(model)
    plain, answers, quantised = (
        generate_answers(each, tokenizer, sources, canvas_length=8)
        for each in (model, merged, with_int8_weights(merged))
    )
    assert answers == plain
    assert sum(one == other for one, other in zip(plain, quantised, strict=True)) >= 36
