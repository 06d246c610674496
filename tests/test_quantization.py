"""A model with int8 weights writes what the plain one writes, but for near ties."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from modeling_yan.data import generate_stories
from modeling_yan.evaluation import generate_answers
from modeling_yan.export import with_int8_weights, with_packed_weights

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
    layer = quantized.flow.experts.heads.heads[0][0]
    assert layer.weight().dtype == quantized.lm_head.weight().dtype == torch.qint8


def test_a_model_that_can_not_be_quantized(tiny_model):
    with pytest.raises(ValueError, match=r"on cpu in torch.bfloat16: must be on the CPU in torch.float32"):
        with_int8_weights(tiny_model.to(torch.bfloat16))
    with pytest.raises(ValueError, match="a model with int8 weights: must be the model that it was made from"):
        with_int8_weights(with_int8_weights(tiny_model.float()))


# --- quantization by others


class Int8Linear(nn.Linear):
    """A linear layer as bitsandbytes has it: the weight is integers, the bias is not, and its output is theirs."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias, self.scale = layer.bias, scale

    def forward(self, states):
        assert states.numel(), "there is no scale for nothing"
        return nn.functional.linear(states, self.weight * self.scale, self.bias)


def with_layers(model, make):
    """The model, whose linear layers but for the head are what `make` makes of them."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not isinstance(layer, Int8Linear) and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make(layer))
    return model


@pytest.fixture
def prompts():
    return torch.randint(4, 64, (2, 6), generator=torch.Generator().manual_seed(1))


def test_weights_of_integers_are_no_hindrance(make_model, prompts):
    model = with_layers(make_model(initializer_range=0.3, num_experts=8), Int8Linear)
    exact = with_layers(make_model(initializer_range=0.3, num_experts=8), lambda layer: layer)
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear):
            exact.get_submodule(name).weight.data = layer.weight * layer.scale
    model.config.freeze_encoder = model.config.freeze_flow = True
    model.apply_freeze_switches()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "decoder.layers.0.feed_forward.up_proj.bias" in trained
    assert not any(name.startswith(("flow", "model.layers")) or name.endswith("up_proj.weight") for name in trained)
    assert torch.equal(model.generate(prompts), exact.generate(prompts))


def test_torchs_own_dynamic_quantization(make_model, prompts):
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert quantized.generate(prompts).shape == model.generate(prompts).shape


@pytest.mark.parametrize("form", [with_int8_weights, with_packed_weights])
def test_what_only_generates_is_not_saved(tiny_model, prompts, form, tmp_path):
    other = form(tiny_model)
    with pytest.raises(NotImplementedError, match="is no checkpoint: save the one that it was made from"):
        other.save_pretrained(tmp_path / "model")
    tiny_model.save_pretrained(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
def test_bitsandbytes(options):
    pytest.importorskip("bitsandbytes")
    # on some CPUs it takes no layer with a number of outputs that 32 does not divide
    check_answers(BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head", "expert_proj"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"])
def test_torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    check_answers(TorchAoConfig(getattr(quantization, name)()))


def check_answers(quantization_config):
    folder = Path(__file__).parents[1] / "examples" / "checkpoints" / CHECKPOINTS["attention"]
    rows = generate_stories(8, seed=1, max_sentences=4, answer_slot="<mask>" * 8 + " ")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config).eval()
    sources = [row["source"] for row in rows]
    answers = generate_answers(model, AutoTokenizer.from_pretrained(folder), sources, canvas_length=8)
    assert sum(answer == row["target"] for answer, row in zip(answers, rows)) >= 7
