"""Likelihoods: of all texts together one, and what experiments make of it."""

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
FORMS = {"plain": {}, "chain": CHAIN, "experts": EXPERTS, "both": EXPERTS | CHAIN}
FORMS["of tokens"] = {"num_experts": 3, "expert_scope": "token", **CHAIN}
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
    """Every canvas as a target behind one prompt."""
    return {"input_ids": torch.tensor(prompt).expand(len(ALL), -1), "labels": ALL}


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
def test_the_likelihoods_of_all_canvases_add_up_to_one(fields, num_steps):
    model = make_yan(**fields)
    found = model.log_likelihood(**all_texts([4, 1, 3]), num_flow_steps=num_steps).exp()
    assert found.sum().item() == pytest.approx(1, abs=1e-4)
    assert found.std() > 1e-4  # they differ


@torch.no_grad()
def test_experts_are_summed_over():
    model, texts = make_yan(**EXPERTS), all_texts([4, 1])
    ranked = {"expert_choice": "ranked", "num_return_sequences": 3, "num_flow_steps": 1}
    output = model.generate(texts["input_ids"][:1], **ranked, min_new_tokens=LENGTH, return_dict_in_generate=True)
    experts, gate, ends = output.experts[0][:, 0], output.gate[0][:, 0], output.trajectory[0][:, -1]
    assert sorted(experts.tolist()) == [0, 1, 2]
    expected = torch.zeros(len(ALL))
    for row, expert in enumerate(experts):
        tokens = model.decode(ends[row : row + 1]).log_softmax(-1).expand(len(ALL), -1, -1)
        expected += gate[row, expert] * tokens.gather(-1, ALL.unsqueeze(-1)).squeeze(-1).sum(-1).exp()
    torch.testing.assert_close(model.log_likelihood(**texts, num_flow_steps=1).exp(), expected)


def test_generation_finds_the_most_probable_text_of_one_expert():
    model, prompt = make_yan(), torch.tensor([[4, 1, 3]])
    text = model.generate(prompt, return_prompt=False, min_new_tokens=LENGTH)  # no EOS, behind which canvases differ
    chances = model.log_likelihood(**all_texts([4, 1, 3])).masked_fill((ALL == EOS).any(1), -torch.inf)
    assert torch.equal(ALL[chances.argmax()], text[0])


def test_a_pad_token_without_a_mask_is_masked_as_in_generation():
    model, target = make_yan(), torch.tensor([[1]])
    padded = model.log_likelihood(torch.tensor([[0, 4, 1]]), target)
    torch.testing.assert_close(padded, model.log_likelihood(torch.tensor([[4, 1]]), target))


def test_a_row_has_its_likelihood_in_every_batch():
    model = make_yan(**EXPERTS, **CHAIN)
    prompts = torch.tensor([[0, 4, 1, 3], [3, 4, 0, 0], [4, 4, 1, 1]])
    mask, labels = (prompts != 0).long(), torch.tensor([[4, 1, -100], [-100, 3, 4], [1, -100, -100]])
    together = model.log_likelihood(prompts, labels, mask)
    alone = [
        model.log_likelihood(prompt[mask_ == 1][None], label[label != -100][None])
        for prompt, mask_, label in zip(prompts, mask, labels, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    with_eos = torch.tensor([[4, 1, EOS], [3, 4, EOS], [1, EOS, EOS]])
    torch.testing.assert_close(together, model.log_likelihood(prompts, with_eos, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_flow_steps": -1}, "num_flow_steps=-1: must be an integer of at least 0"),
        ({"labels": torch.ones(1, LENGTH + 1, dtype=torch.long)}, "at most canvas_length=3"),
        ({"labels": torch.tensor([[VOCABULARY]])}, "labels"),
        ({"input_ids": torch.tensor([[VOCABULARY]])}, "input_ids"),
        ({"labels": torch.tensor([[1], [2]])}, "labels"),
    ],
)
def test_a_likelihood_of_nothing_is_refused(change, message):
    given = {"input_ids": torch.tensor([[4, 1]]), "labels": torch.tensor([[1]]), **change}
    with pytest.raises(ValueError, match=message):
        make_yan().log_likelihood(**given)


def test_a_text_of_a_graph_ends_at_its_eos():
    model = make_yan(vertices_per_token=2, num_answer_slots=2 * LENGTH)
    given = torch.tensor([[4, 1]]).repeat(2, 1)
    with_end, without = ([[4, EOS, -100], [4, EOS, EOS]], [[4, -100, -100], [4, -100, -100]])
    found = [model.log_likelihood(given, torch.tensor(labels)) for labels in (with_end, without)]
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match="labels of row 1: must have no tokens after an EOS"):
        model.log_likelihood(given, torch.tensor([[4, EOS, EOS], [4, EOS, 1]]))


@pytest.mark.parametrize("fields", [CHAIN | {"crf_candidates": 8}, {"vertices_per_token": 2}, CHAIN | EXPERTS])
@pytest.mark.parametrize("size", [4, 5, 12])
def test_a_vocabulary_of_another_size_has_as_many_candidates_as_when_it_is_loaded(fields, size, tmp_path):
    model = make_yan(**fields, num_answer_slots=2 * LENGTH, tie_word_embeddings=True)
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path)
    prompt, labels = torch.tensor([[1, 3]]), torch.tensor([[3, 1]])
    models = [model, YanForFlowGeneration.from_pretrained(tmp_path).eval()]
    torch.testing.assert_close(*(each.log_likelihood(prompt, labels) for each in models))
    assert torch.equal(*(each.generate(prompt) for each in models))
    assert torch.equal(*(each.generate(prompt, do_sample=True, seed=1) for each in models))


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


def test_experts_of_tokens_and_diffusion_have_none(script):
    assert not script.has_likelihood(make_yan(num_experts=3, expert_scope="token"), "yan")
    assert script.has_likelihood(make_yan(**EXPERTS), "yan")
    assert not script.has_likelihood(None, "masked_diffusion")
