"""Texts as paths through vertices: exact against all paths, and in everything that a model does."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from transformers.generation.configuration_utils import CompileConfig

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.canvas_yan import CanvasPlan
from modeling_yan.data import AutoencoderCollator
from modeling_yan.export import export_generation
from modeling_yan.graphs_yan import UNREACHABLE, best_text, best_vertices, log_sum_of_paths
from modeling_yan.visualization import follow

VOCABULARY, LENGTH, EOS, PROMPT = 5, 3, 2, torch.tensor([[4, 1, 4]])
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
SLOTS = {"num_answer_slots": 2 * LENGTH, "copy_prompt_to_slots": True, "refine_draft": True}
EXPERTS = {"num_experts": 3, "share_expert_head": True, "expert_scope": "sequence"}
FORMS = {"one expert": {}, "experts": EXPERTS, "from noise": {"refine_draft": False, "init_noise": 0.1}}
FORMS["mamba"] = {"encoder_mixer": "mamba", "flow_mixer": "mamba"}


def make_graph(seed=0, **fields):
    torch.manual_seed(seed)
    fields = {"vertices_per_token": 2, "num_experts": 1, **SLOTS, **fields}
    fields |= {
        "train_expert_choice": "posterior",
        "mse_weight": 0.0,
        "initializer_range": 0.5,
        "freeze_encoder": False,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "mask_token_id": 3}
    config = YanConfig(
        vocab_size=VOCABULARY, canvas_length=LENGTH, max_position_embeddings=32, **SIZES, **ids, **fields
    )
    model = YanForFlowGeneration(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def all_texts():
    """Every text of a canvas: those with an end, and the longest without one."""
    others = [token for token in range(VOCABULARY) if token != EOS]
    ended = [[*tokens, EOS] for number in range(LENGTH) for tokens in itertools.product(others, repeat=number)]
    return ended + [list(tokens) for tokens in itertools.product(others, repeat=LENGTH)]


def chances(model, num_flow_steps):
    """The model's probability of each text behind the prompt."""
    texts = all_texts()
    labels = torch.full((len(texts), LENGTH), -100)
    for row, text in zip(labels, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    prompts = PROMPT.expand(len(texts), -1)
    found = model.log_likelihood(prompts, labels, num_flow_steps=num_flow_steps).exp()
    return {tuple(text): chance for text, chance in zip(texts, found.tolist(), strict=True)}


def ended(row):
    """A row up to its EOS."""
    tokens = row.tolist()
    return tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


def draw_graph(num_vertices=7, num_tokens=4, reach=3):
    """Links and emissions of two texts that no model made, and their lengths."""
    generator = torch.Generator().manual_seed(1)
    links = torch.randn(2, num_vertices, reach, generator=generator)
    targets = torch.arange(num_vertices).unsqueeze(1) + torch.arange(1, reach + 1)
    links = links.masked_fill(targets >= num_vertices, UNREACHABLE).log_softmax(-1)
    links = links.masked_fill(targets >= num_vertices, UNREACHABLE)
    return links, torch.randn(2, num_tokens, num_vertices, generator=generator), torch.tensor([4, 2])


def every_path(links, emissions, length):
    """Scores of all paths of one text: a path -> its log-probability."""
    scores = {}
    for jumps in itertools.product(range(links.shape[1]), repeat=length - 1):
        path = [0, *itertools.accumulate(jump + 1 for jump in jumps)]
        if path[-1] < len(links):
            score = sum(emissions[index, vertex] for index, vertex in enumerate(path))
            score = score + sum(links[here, jump] for here, jump in zip(path, jumps, strict=False))
            scores[tuple(path)] = float(score)
    return scores


def test_sums_and_maxima_are_those_over_all_paths():
    links, emissions, length = draw_graph()
    given = links.unsqueeze(1).expand(-1, emissions.shape[1], -1, -1), emissions, length
    sums, best = log_sum_of_paths(*given), best_vertices(*given)
    for row, number in enumerate(length.tolist()):
        scores = every_path(links[row], emissions[row], number)
        assert sums[row].item() == pytest.approx(torch.tensor(list(scores.values())).logsumexp(0).item(), abs=1e-4)
        assert tuple(best[row, :number].tolist()) == max(scores, key=scores.get)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("fewest", [0, 2])
def test_the_best_text_of_any_length_is_found(penalty, fewest):
    links, emissions, _ = draw_graph()
    tokens, ends = emissions[:, 0], emissions[:, 1]
    candidates = torch.stack([tokens - 9, tokens], dim=-1), links.unsqueeze(2).expand(-1, -1, 2, -1)
    vertices, choices, length, is_ended = best_text(candidates[1], candidates[0], ends, 4, fewest, penalty)
    assert (choices[torch.arange(4) < (length - is_ended.long()).unsqueeze(1)] == 1).all()
    for row in range(2):
        found = {}
        for number in range(1, 5):
            for has_end in [True, False] if number == 4 else [True]:
                if has_end and number <= fewest:
                    continue
                said = torch.stack([*[tokens[row]] * (number - 1), ends[row] if has_end else tokens[row]])
                scores = every_path(links[row], said, number)
                best = max(scores, key=scores.get)
                found[best, has_end] = scores[best] / number**penalty
        path, has_end = max(found, key=found.get)
        assert (tuple(vertices[row, : len(path)].tolist()), length[row], is_ended[row]) == (path, len(path), has_end)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
def test_the_probabilities_of_all_texts_add_up_to_one(fields, num_steps):
    found = list(chances(make_graph(**fields), num_steps).values())
    assert sum(found) == pytest.approx(1, abs=1e-4)
    assert torch.tensor(found).std() > 1e-4  # they differ


def test_texts_are_drawn_as_often_as_they_are_probable():
    model, number = make_graph(seed=3), 4000
    wanted = chances(model, 0)
    options = {"do_sample": True, "num_return_sequences": number, "seed": 1, "return_prompt": False}
    drawn = Counter(map(ended, model.generate(PROMPT, num_flow_steps=0, **options)))
    assert sum(abs(chance - drawn[text] / number) for text, chance in wanted.items()) / 2 < 0.05
    cold = model.generate(PROMPT, num_flow_steps=0, temperature=0.01, **options)
    assert len(set(map(ended, cold))) == 1


def test_a_temperature_divides_the_log_probability_of_each_token():
    """One of whole texts would draw the shortest ones, in which the fewest tokens can be improbable."""
    model, number = make_graph(seed=3), 4000
    options = {"do_sample": True, "num_return_sequences": number, "seed": 1, "return_prompt": False}
    drawn = model.generate(PROMPT, num_flow_steps=0, temperature=0.5, **options)[:, 0]
    logits = model.decode(model.draft(model.encode_prompt(PROMPT).latents, 2 * LENGTH))[0, 0]
    shares = torch.bincount(drawn, minlength=VOCABULARY) / number
    assert (shares - (logits / 0.5).softmax(-1)).abs().sum() / 2 < 0.03


def test_a_cold_draw_takes_one_expert_and_a_warm_one_asks_the_gate():
    model, number = make_graph(seed=3, **EXPERTS), 2000
    options = {"do_sample": True, "num_return_sequences": number, "seed": 1, "return_dict_in_generate": True}
    warm, cold = (model.generate(PROMPT, num_flow_steps=1, temperature=t, **options) for t in (1.0, 0.01))
    shares = torch.bincount(warm.experts[0][:, 0], minlength=3) / number
    assert (shares - warm.gate[0][:, 0].mean(0)).abs().sum() / 2 < 0.05
    assert len(cold.experts[0].unique()) == 1


def test_a_best_text_is_as_probable_as_its_score_says():
    model = make_graph(**EXPERTS)
    latents = model.draft(model.encode_prompt(PROMPT).latents, 2 * LENGTH)
    score, length = model.score_tokens(latents, CanvasPlan.of_config(model.config, 0))
    text = ended(model.generate(PROMPT, num_flow_steps=0, return_prompt=False)[0])
    assert (score.exp().item(), length.item()) == (pytest.approx(chances(model, 0)[text], rel=1e-4), len(text))


def test_the_least_number_of_tokens_counts_tokens_and_not_vertices():
    model = make_graph()
    for options in ({}, {"do_sample": True, "seed": 0, "num_return_sequences": 20}):
        for fewest in range(1, LENGTH + 1):
            tokens = model.generate(
                PROMPT, return_prompt=False, min_new_tokens=fewest, max_new_tokens=LENGTH, **options
            )
            assert not (tokens[:, :fewest] == EOS).any()


def test_a_penalty_of_any_size_keeps_the_least_number_of_tokens():
    model = make_graph()
    for penalty in (1.0, 100.0, 1000.0):
        options = {"min_new_tokens": LENGTH, "max_new_tokens": LENGTH, "length_penalty": penalty}
        text = model.generate(PROMPT, return_prompt=False, **options)
        assert text.shape == (1, LENGTH)
        assert EOS not in text
    with pytest.raises(ValueError, match="length_penalty=inf: must be a finite number"):
        model.generate(PROMPT, length_penalty=math.inf)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1, "num_return_sequences": 8}])
def test_forbidden_tokens_are_not_written_where_the_end_is_forbidden_too(form, options):
    model = make_graph(**FORMS[form])
    for allowed in (0, 4):
        suppressed = [token for token in range(VOCABULARY) if token != allowed]
        texts = model.generate(PROMPT, return_prompt=False, suppress_tokens=suppressed, **options)
        assert texts.unique().tolist() == [allowed]
        assert texts.shape[1] == LENGTH


@pytest.mark.parametrize("fields", [{}, {"vertices_per_token": 1, "crf_rank": 4}])
def test_what_is_forbidden_stays_so_at_any_temperature(fields):
    model = make_graph(**fields)
    options = {"do_sample": True, "seed": 1, "temperature": 1e9, "num_return_sequences": 64}
    texts = model.generate(PROMPT, return_prompt=False, suppress_tokens=[0, 3], **options)
    assert set(texts.unique().tolist()) <= {0, 1, EOS, 4}
    after_end = (texts == EOS).cumsum(1) > 0
    assert (texts[~after_end] != 0).all()  # elsewhere it is padding
    assert len(texts.unique(dim=0)) > 3


def test_a_text_goes_on_in_the_next_canvas():
    model = make_graph()
    tokens = model.generate(PROMPT, return_prompt=False, min_new_tokens=2 * LENGTH, max_new_tokens=2 * LENGTH)
    assert tokens.shape == (1, 2 * LENGTH)
    assert not (tokens == EOS).any()


@pytest.mark.slow
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
def test_it_learns_and_is_the_same_when_loaded(fields, tmp_path):
    model = make_graph(**fields)
    before = chances(model, 2)[4, 1, EOS]
    model.train()
    labels, optimizer = torch.tensor([[4, 1, EOS]]), torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        output = model(PROMPT, torch.ones_like(PROMPT), labels=labels, num_flow_steps=2)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.graph.parameters())
    model.eval()
    assert chances(model, 2)[4, 1, EOS] > 10 * before
    model.save_pretrained(tmp_path)
    loaded = YanForFlowGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(PROMPT, torch.ones_like(PROMPT)).logits, model(PROMPT, torch.ones_like(PROMPT)).logits)


def test_logits_are_those_of_the_path():
    """Without labels of the best path, with labels of the path that says them best."""
    model, mask = make_graph(), torch.ones_like(PROMPT)
    latents = model.draft(model.encode_prompt(PROMPT).latents, 2 * LENGTH)
    vertices = [model.decode(latents)[0, vertex] for vertex in range(2 * LENGTH)]
    output = model(PROMPT, mask, num_flow_steps=0)
    assert output.logits.shape == (1, LENGTH, VOCABULARY)
    told = model(PROMPT, mask, labels=torch.tensor([[-100, 4, 1]]), num_flow_steps=0)
    assert told.logits.shape == (1, 3, VOCABULARY)
    for row in (output.logits[0, 0], told.logits[0, 1]):  # a path begins at the first vertex
        torch.testing.assert_close(row, vertices[0])
    assert any(torch.allclose(told.logits[0, 2], each) for each in vertices[1:])


def test_a_row_does_not_depend_on_its_batch():
    model, other = make_graph(), torch.tensor([[1, 4, 0, 0]])
    rows, mask = (
        torch.cat([torch.nn.functional.pad(PROMPT, (0, 1)), other]),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
    )
    together = model.generate(rows, attention_mask=mask, return_prompt=False)
    for index, prompt in enumerate((PROMPT, other[:, :2])):
        assert ended(model.generate(prompt, return_prompt=False)[0]) == ended(together[index])
    labels = torch.tensor([[4, EOS, -100], [1, 1, 1]])
    losses = [model(row[None], one[None], labels=label[None]).loss for row, one, label in zip(rows, mask, labels)]
    torch.testing.assert_close(model(rows, mask, labels=labels).loss, torch.stack(losses).mean())


def test_slots_hold_each_prompt_token_as_often_as_a_token_has_vertices():
    model = make_graph()
    given = model.with_answer_slots(PROMPT, torch.ones_like(PROMPT))
    assert given["input_ids"].tolist() == [[4, 4, 1, 1, 4, 4, 4, 1, 4]]
    short = model.with_answer_slots(torch.tensor([[4, 0]]), torch.tensor([[1, 0]]))
    assert short["input_ids"].tolist() == [[4, 4, 3, 3, 3, 3, 4, 0]]


def test_the_first_stage_sees_the_same_slots(bundled_tokenizer):
    tokenizer = bundled_tokenizer
    slots = {"num_answer_slots": 12, "copy_prompt_to_slots": True, "vertices_per_token": 2}
    row = {"source": [7, 8, 9], "target": [11, 12]}
    batch = AutoencoderCollator(tokenizer, max_length=32, target_mask_ratio=0.0, **slots)([row])
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    assert batch["labels"][0, :12].tolist() == [11, 11, 12, 12] + [eos] * 8
    assert mask not in batch["input_ids"][0, :4].tolist()


def test_lost_numbers_are_an_error():
    for name, _ in make_graph().graph.named_parameters():
        model = make_graph()
        torch.nn.init.constant_(model.graph.get_parameter(name), math.nan)
        for options in ({}, {"do_sample": True, "seed": 0}):
            with pytest.raises(FloatingPointError, match=re.escape(f"graph.{name}")):
                model.generate(PROMPT, **options)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, EXPERTS], ids=["one expert", "experts"])
def test_compiled_and_exported_programs_write_the_same(fields):
    model = make_graph(**fields)
    tokens = model.generate(PROMPT, return_prompt=False, min_new_tokens=LENGTH)
    compiled = CompileConfig(backend="eager")
    assert torch.equal(
        model.generate(PROMPT, return_prompt=False, min_new_tokens=LENGTH, compile_config=compiled), tokens
    )
    program = export_generation(model, batch_size=1, prompt_length=PROMPT.shape[1]).module()
    assert ended(program(PROMPT, torch.ones_like(PROMPT))[0]) == ended(model.generate(PROMPT, return_prompt=False)[0])


def test_a_followed_path_has_the_points_of_its_tokens_vertices(bundled_tokenizer):
    torch.manual_seed(0)
    graph = {"vertices_per_token": 2, **SLOTS, "num_answer_slots": 16, "train_expert_choice": "posterior"}
    sizes = {"vocab_size": len(bundled_tokenizer), "canvas_length": 8, "max_position_embeddings": 64, **SIZES}
    model = YanForFlowGeneration(YanConfig(**sizes, **graph, **EXPERTS, mse_weight=0.0, initializer_range=0.5)).eval()
    path = follow(model, bundled_tokenizer, "Where is the hat?", 2)
    number = len(path.tokens)
    assert (path.points.shape, path.gate.shape, len(path.experts)) == ((number, 3, 2), (number, 3), number)


REFUSED = {
    "crf_rank": (4, "crf_rank=4: must be 0 with vertices_per_token=2"),
    "mse_weight": (1.0, "mse_weight=1.0: must be 0 with vertices_per_token=2"),
    "train_expert_choice": ("sample", "'posterior' with vertices_per_token=2"),
    "expert_scope": ("token", "'sequence' with vertices_per_token=2 and num_experts=3"),
    "canvas_length": (17, "at most max_position_embeddings=32 / vertices_per_token=2"),
    "vertices_per_token": (0, "vertices_per_token=0: must be greater than 0"),
    "num_answer_slots": (5, "refine_draft=True: must be False without answer slots"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_do_not_fit_a_graph_are_refused(name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_graph(**EXPERTS).config.with_fields(**{name: value})


def test_what_a_graph_cannot_do_is_refused(bundled_tokenizer):
    model = make_graph(refine_draft=False)
    with pytest.raises(ValueError, match="vertices_per_token=2: must be 1 to fill gaps"):
        model.fill(bundled_tokenizer, "a <mask> b")
    with pytest.raises(ValueError, match="the canvas has 17 tokens: must be 1 to max_position_embeddings=32 / vert"):
        model.generate(PROMPT, canvas_length=17)
    with pytest.raises(ValueError, match="at least 1 with num_answer_slots=6 / vertices_per_token=2"):
        model.generate(PROMPT, canvas_length=4, num_flow_steps=0)
