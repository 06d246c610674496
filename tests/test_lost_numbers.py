"""A single weight that is no number is noticed, also where a kernel or the search for the best chain hides it."""

import pytest
import torch

# of every part whose NaN a kernel, a maximum or a choice may hide
WEIGHTS = [
    "flow.layers.0.cross_attention.q_proj.weight",
    "flow.layers.1.cross_attention.k_proj.bias",
    "flow.modulation.proj.bias",
    "flow.gate.hidden_proj.weight",
    "transitions.norm.weight",
    "transitions.from_proj.weight",
    "transitions.to_proj.weight",
    "transitions.gate.bias",
    "decoder.layers.0.feed_forward.up_proj.weight",
    "lm_head.bias",
]


@pytest.fixture
def model(make_model):
    model = make_model(initializer_range=0.3, crf_rank=4, crf_candidates=6, num_flow_steps=2)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def names_of(model):
    mixer = [name for name, _ in model.named_parameters() if name.startswith("model.layers.0") and "proj" in name]
    return [*WEIGHTS, *mixer]


@pytest.mark.parametrize("padding", [0, 2])
def test_one_weight_that_is_nan_is_noticed(model, padding):
    prompts = torch.randint(4, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    mask[0, :padding] = 0
    weights, unnoticed = dict(model.named_parameters()), []
    for name in names_of(model):
        weight = weights[name].data.view(-1)
        kept = weight[3].item()
        weight[3] = torch.nan
        try:
            model.generate(prompts, attention_mask=mask)
            message = ""
        except FloatingPointError as error:
            message = str(error)
        if name not in message:
            unnoticed.append(name)
        weight[3] = kept
    assert unnoticed == []
    assert model.generate(prompts, attention_mask=mask).min() >= 0


def test_only_the_row_with_nan_is_lost(model):
    embeddings = torch.randn(3, 6, 32)
    expected = model(inputs_embeds=embeddings).logits
    embeddings[1, 2, 5] = torch.nan
    logits = model(inputs_embeds=embeddings).logits
    assert logits[1].isnan().all()
    # vector kernels may round the neighbours of a NaN in another way, by the processor
    torch.testing.assert_close(logits[::2], expected[::2], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
