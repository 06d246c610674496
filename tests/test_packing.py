"""A model with packed weights computes what the plain one computes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_yan.data import generate_stories
from modeling_yan.evaluation import generate_answers
from modeling_yan.export import with_int8_weights, with_packed_weights

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
CHECKPOINTS = {"attention": "yan-transformer-tiny", "mamba": "yan-mamba-tiny"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (300, 5)])
def test_a_packed_layer_computes_the_same(shape, bias):
    layer, states = nn.Sequential(nn.Linear(5, 7, bias=bias)), torch.randn(shape)
    packed = with_packed_weights(layer)
    torch.testing.assert_close(packed(states), layer(states), rtol=1e-5, atol=1e-6)
    assert packed[0].weight.shape == (7, 5)
    assert packed[0].weight.is_meta


def test_a_packed_model_writes_the_same_tokens(make_model):
    model = make_model(num_experts=8)  # some have no token
    before = copy.deepcopy(model.state_dict())
    prompts = torch.randint(4, 64, (3, 6))
    packed = with_packed_weights(model)
    for expert_choice in ("argmax", "mixture"):
        plain = model.generate(prompts, expert_choice=expert_choice)
        assert torch.equal(packed.generate(prompts, expert_choice=expert_choice), plain)
    assert packed.num_parameters() == model.num_parameters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hooks_stay_and_autocast_is_allowed(make_model):
    model, prompts = make_model(), torch.randint(4, 64, (3, 6))
    hooked = copy.deepcopy(model)
    hooked.lm_head.register_forward_hook(lambda module, arguments, output: -output)
    plain, expected = (each.generate(prompts) for each in (model, hooked))
    assert not torch.equal(plain, expected)
    packed = with_packed_weights(hooked)
    assert torch.equal(packed.generate(prompts), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed.generate(prompts).shape[0] == 3


def test_the_bundled_models_packed_give_the_same_answers(variant):
    folder = Path(__file__).parents[1] / "examples" / "checkpoints" / CHECKPOINTS[variant]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = generate_stories(40, seed=1, max_sentences=4, answer_slot="<mask>" * 8 + " ")
    sources = [row["source"] for row in rows]
    packed = with_packed_weights(model)
    plain, answers = (generate_answers(each, tokenizer, sources, canvas_length=8) for each in (model, packed))
    assert answers == plain


def test_a_model_that_can_not_be_packed(tiny_model):
    with pytest.raises(ValueError, match=r"on cpu in torch.bfloat16: must be on the CPU in torch.float32"):
        with_packed_weights(copy.deepcopy(tiny_model).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"a model on meta in torch.float32: must be on the CPU"):
        with_int8_weights(with_packed_weights(tiny_model))
