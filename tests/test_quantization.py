"""A model with int8 weights writes what the plain one writes, but for near ties."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_yan.data import generate_stories
from modeling_yan.evaluation import generate_answers
from modeling_yan.export import with_int8_weights

CHECKPOINTS = {"attention": "yan-transformer-tiny", "mamba": "yan-mamba-tiny"}


def test_int8_weights_answer_like_the_plain_ones(variant):
    folder = Path(__file__).parents[1] / "examples" / "checkpoints" / CHECKPOINTS[variant]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = generate_stories(40, seed=1, max_sentences=4, answer_slot="<mask>" * 8 + " ")
    sources = [row["source"] for row in rows]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantized = with_int8_weights(model)
    plain, answers = (generate_answers(each, tokenizer, sources, canvas_length=8) for each in (model, quantized))
    assert sum(one == other for one, other in zip(plain, answers)) >= 36
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    layer = quantized.flow.experts.heads[0].up_proj
    assert layer.weight().dtype == quantized.lm_head.weight().dtype == torch.qint8


def test_a_model_that_can_not_be_quantized(tiny_model):
    with pytest.raises(ValueError, match=r"on cpu in torch.bfloat16: must be on the CPU in torch.float32"):
        with_int8_weights(tiny_model.to(torch.bfloat16))
