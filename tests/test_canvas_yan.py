"""Every way to a canvas is one; where nothing is drawn, its text comes from the expert that makes it most probable."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.generation import configuration_utils
from transformers.generation.configuration_utils import CompileConfig

import modeling_yan
from modeling_yan import canvas_yan, generation_yan
from modeling_yan.canvas_yan import CanvasPlan, YanPrompt
from modeling_yan.export.program import YanCanvasProgram
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


def test_a_canvas_that_is_cut_at_its_first_eos_has_no_length_to_weigh(make_model):
    model, ids = make_lively(make_model, crf_rank=4), torch.randint(4, 64, (2, 6))
    model.generate(ids, eos_strategy="first", length_penalty=1.0)
    with pytest.raises(
        ValueError, match=r"length_penalty=2.0: must be 1 without eos_strategy='likeliest', found 'first"
    ):
        model.generate(ids, eos_strategy="first", length_penalty=2.0)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("penalty", [1.0, 0.0])
@torch.no_grad()
def test_the_text_is_the_most_probable_for_its_length(make_model, rank, penalty, monkeypatch):
    monkeypatch.setattr(configuration_utils.logger, "warning", pytest.fail)  # transformers' of options without beams
    model, ids = make_lively(make_model, crf_rank=rank), torch.randint(4, 64, (32, 6))
    options = {"num_flow_steps": 1, "return_prompt": False, "length_penalty": penalty}
    options |= {"max_new_tokens": 8, "return_dict_in_generate": True}
    output = model.generate(ids, **options)
    ranked = model.generate(ids, expert_choice="ranked", num_return_sequences=3, **options)
    gate_log_probs = output.gate[0][:, 0].log().sort(-1, descending=True).values  # as ranked: the most probable first
    latents = ranked.trajectory[0][:, -1]
    logits = model.decode(latents)
    texts = model.most_likely(logits, latents, (EOS,), length_penalty=penalty)
    if rank:
        scores = model.transitions.log_likelihood(model.get_input_embeddings(), logits, latents, texts)
    else:
        scores = token_log_likelihood(logits, texts).sum(-1)
    lengths = torch.tensor([length_of(text) for text in texts.tolist()])
    best = ((scores.view(32, 3) + gate_log_probs) / lengths.view(32, 3) ** penalty).argmax(-1)
    assert len(best.unique()) > 1  # not always the gate's favourite
    chosen = ranked.sequences.view(32, 3, -1)[torch.arange(32), best]
    width = output.sequences.shape[1]
    assert torch.equal(output.sequences, chosen[:, :width])
    assert (chosen[:, width:] == model.generation_config.pad_token_id).all()


@pytest.mark.parametrize("fields", [{"expert_scope": "token"}, {}, {"crf_rank": 4}], ids=str)
@pytest.mark.parametrize("num_flow_steps", [0, 1, 3])
def test_forward_and_generate_solve_the_same_canvas(make_model, fields, num_flow_steps):
    model, ids = make_lively(make_model, num_answer_slots=8, **fields), torch.randint(4, 64, (8, 6))
    output = model(ids, num_flow_steps=num_flow_steps)
    tokens = model.generate(ids, num_flow_steps=num_flow_steps, return_prompt=False)
    assert torch.equal(model.most_likely(output.logits, output.latents)[:, : tokens.shape[1]], tokens)


@pytest.mark.parametrize("way", ["forward", "generate", "compiled", "exported"])
def test_every_way_to_a_canvas_calls_solve_canvas(make_model, monkeypatch, way):
    model, ids, plans, solve = make_model(), torch.randint(4, 64, (2, 6)), [], canvas_yan.solve_canvas

    def watch(*arguments):
        plans.append(arguments[3])
        return solve(*arguments)

    monkeypatch.setattr(canvas_yan, "solve_canvas", watch)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(generation_yan, "_programs", {})
    if way == "forward":
        model(ids)
    elif way == "exported":
        plan = CanvasPlan.of_config(model.config, 2)
        YanCanvasProgram(model, 8, plan, 0)(ids, torch.ones_like(ids))
    else:
        model.generate(ids, compile_config=CompileConfig() if way == "compiled" else None)
    assert [plan.wants_tokens for plan in plans] == [way != "forward"]


def test_the_velocity_is_told_everything_when_it_is_made(make_model):
    """Nobody sets an attribute of it from outside: the words `velocity.name =` stand nowhere."""
    files = Path(modeling_yan.__file__).parent.glob("*_yan.py")
    assert not [path.name for path in files if re.search(r"\bvelocity\.\w+ = ", path.read_text())]


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_prompt_is_repeated_with_all_that_is_its_own(num_rows, has_mask):
    latents, mask = torch.randn(num_rows, 3, 4), torch.ones(num_rows, 3).cumsum(0)
    for positions in (None, torch.arange(3)[None], torch.arange(3 * num_rows).view(num_rows, 3)):
        repeated = YanPrompt(latents, mask if has_mask else None, positions).repeat(2)
        assert torch.equal(repeated.latents[::2], latents)
        assert torch.equal(repeated.latents[1::2], latents)
        assert torch.equal(repeated.attention_mask[1::2], mask) if has_mask else repeated.attention_mask is None
        if positions is None:
            assert repeated.position_ids is None
        else:
            expected = positions.expand(num_rows, -1)
            assert torch.equal(repeated.position_ids.expand(2 * num_rows, -1)[1::2], expected)
