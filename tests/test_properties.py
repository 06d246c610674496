"""What holds for every input: batches, padding, order, kernels, saving, and the numbers that experts have."""

import tempfile
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.mamba_yan import selective_scan

VOCABULARY, CANVAS, WIDEST = 64, 8, 14
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1}
SIZES |= {"num_flow_layers": 1, "num_decoder_layers": 1, "max_position_embeddings": 48, "canvas_length": CANVAS}
SIZES |= {"state_size": 4, "num_flow_steps": 2, "initializer_range": 0.2}
SIZES |= {f"freeze_{part}": False for part in ("encoder", "decoder", "embeddings")}
SLOTS = {"num_answer_slots": CANVAS, "attention_conv_kernel": 3}
BERT = {"model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 4, "intermediate_size": 32, "initializer_range": 0.2, "max_position_embeddings": 48}
KINDS = {
    "paper": {},
    "shared": {"expert_scope": "sequence"},
    "token": {"train_expert_choice": "posterior", "crf_rank": 4, "num_answer_slots": CANVAS},
    "sequence": {"train_expert_choice": "posterior", "expert_scope": "sequence", "refine_draft": True, **SLOTS},
    "one head": {
        "train_expert_choice": "posterior",
        "expert_scope": "sequence",
        "share_expert_head": True,
        "num_answer_slots": CANVAS,
        "copy_prompt_to_slots": True,
    },
    "chain": {"train_expert_choice": "posterior", "expert_scope": "sequence", "crf_rank": 4, **SLOTS},
    "pretrained": {"train_expert_choice": "posterior", "encoder": BERT, "crf_rank": 4, "num_answer_slots": CANVAS},
}
TERMS = ("loss nll_loss mse_loss ce_loss text_loss draft_loss crf_loss gate_entropy load_balance_loss").split()
every_kind = pytest.mark.parametrize("kind", KINDS)
few = settings(
    derandomize=True,
    deadline=None,
    max_examples=3,
    database=None,
    phases=[Phase.generate],  # the smallest counterexample takes long to find
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

tokens = st.integers(4, VOCABULARY - 1)
row = st.lists(tokens, min_size=1, max_size=WIDEST - 5)
prompts = st.lists(row, min_size=2, max_size=4)


@cache
def make_model(mixer, kind="paper", **overrides) -> YanForFlowGeneration:
    """A model in which every part matters, the same in every call."""
    torch.manual_seed(0)
    model = YanForFlowGeneration(
        YanConfig(**{**SIZES, **KINDS[kind], **overrides}, encoder_mixer=mixer, flow_mixer=mixer)
    )
    for name, weight in model.named_parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
        elif "flow.gate" in name and name.endswith("weight"):
            nn.init.normal_(weight, std=0.5)
    return model.eval()


def as_batch(rows, width=WIDEST, places=None, junk=0) -> dict[str, torch.Tensor]:
    """Rows of ids with their mask; `places` says where the ids of each row stand, and `junk` what stands elsewhere."""
    ids, mask = torch.full((len(rows), width), junk), torch.zeros(len(rows), width, dtype=torch.long)
    for index, tokens in enumerate(rows):
        where = sorted(places[index][: len(tokens)]) if places else list(range(len(tokens)))
        ids[index, where], mask[index, where] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def as_labels(rows) -> torch.Tensor:
    """The rows, cut to the canvas, as labels."""
    batch = as_batch([tokens[:CANVAS] for tokens in rows], CANVAS)
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def alone(rows, **options):
    """Batches of one row each, without padding."""
    return [as_batch([tokens], len(tokens), **options) for tokens in rows]


def written(model, batch, **options) -> torch.Tensor:
    """Two canvases of ids."""
    return model.generate(
        **batch, max_new_tokens=2 * CANVAS, min_new_tokens=2 * CANVAS, return_prompt=False, **options
    )


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_kind
@few
@given(rows=prompts)
@torch.no_grad()
def test_a_batch_equals_its_rows(variant, kind, rows):
    model, batch = make_model(variant, kind), as_batch(rows)
    logits, texts = model(**batch).logits, written(model, batch)
    for index, single in enumerate(alone(rows)):
        assert_same(model(**single).logits[0], logits[index])
        assert torch.equal(written(model, single)[0], texts[index])


@every_kind
@few
@given(rows=prompts)
@torch.no_grad()
def test_the_terms_of_a_batch_are_the_means_of_its_rows(variant, kind, rows):
    model, labels = make_model(variant, kind), as_labels(rows[::-1])
    whole = model(**as_batch(rows), labels=labels)
    singles = [model(**single, labels=labels[index, None]) for index, single in enumerate(alone(rows))]
    for name in TERMS:
        if name in whole:
            assert_same(torch.stack([single[name] for single in singles]).mean(), whole[name])


@every_kind
@few
@given(rows=prompts, data=st.data())
@torch.no_grad()
def test_neither_place_nor_content_of_padding_matters(variant, kind, rows, data):
    """On the left, on the right or between the tokens, however much of it."""
    model, labels = make_model(variant, kind), as_labels(rows[::-1])
    width = data.draw(st.integers(WIDEST, 2 * WIDEST))
    places = [data.draw(st.permutations(range(width))) for _ in rows]
    plain, padded = as_batch(rows), as_batch(rows, width, places, junk=data.draw(tokens))
    assert_same(model(**padded).logits, model(**plain).logits)
    assert torch.equal(written(model, padded), written(model, plain))
    actual, expected = model(**padded, labels=labels), model(**plain, labels=labels)
    for name in (*TERMS, "logits"):
        if name in expected:
            assert_same(actual[name], expected[name])


@every_kind
@few
@given(rows=prompts, data=st.data())
@torch.no_grad()
def test_logits_stand_where_the_labels_stand(variant, kind, rows, data):
    model, batch, labels = make_model(variant, kind), as_batch(rows), as_labels(rows)
    width = data.draw(st.integers(CANVAS - 2, CANVAS))
    places = [data.draw(st.permutations(range(width))) for _ in rows]
    moved = as_batch([tokens[:width] for tokens in rows], width, places)
    is_label = moved["attention_mask"].bool()
    labels = labels[:, :width]
    elsewhere = moved["input_ids"].masked_fill(~is_label, -100)
    actual, expected = model(**batch, labels=elsewhere), model(**batch, labels=labels)
    assert_same(actual.loss, expected.loss)
    for name in ("logits", "latents"):
        assert actual[name].shape == expected[name].shape
        assert_same(actual[name][is_label], expected[name][labels != -100])


@every_kind
@few
@given(rows=prompts, data=st.data())
@torch.no_grad()
def test_rows_may_come_in_any_order(variant, kind, rows, data):
    model, batch = make_model(variant, kind), as_batch(rows)
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = {name: tensor[order] for name, tensor in batch.items()}
    assert_same(model(**shuffled).logits, model(**batch).logits[order])
    assert torch.equal(written(model, shuffled), written(model, batch)[order])


@every_kind
@few
@given(rows=prompts, seed=st.integers(0, 2**31 - 1))
@torch.no_grad()
def test_what_is_drawn_does_not_depend_on_the_rows_behind(variant, kind, rows, seed):
    model = make_model(variant, kind)
    whole, first = (written(model, as_batch(part), do_sample=True, seed=seed) for part in (rows, rows[:1]))
    assert torch.equal(whole[:1], first)


@every_kind
@few
@given(rows=prompts)
@torch.no_grad()
def test_eager_attention_equals_sdpa(variant, kind, rows):
    model, batch, labels = make_model(variant, kind), as_batch(rows), as_labels(rows)
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        output = model(**batch, labels=labels)
        results.append({"loss": output.loss, "logits": output.logits, "tokens": written(model, batch)})
    assert_same(*results)


@pytest.mark.slow
@every_kind
@few
@given(rows=prompts, order=st.permutations(range(4)))
@torch.no_grad()
def test_experts_may_have_any_numbers(variant, kind, rows, order):
    model, batch, labels = make_model(variant, kind), as_batch(rows), as_labels(rows)
    renumbered = make_model(variant, kind, initializer_range=0.21)  # another one, to be overwritten
    renumbered.load_state_dict(model.state_dict())
    if kind == "one head":
        renumbered.flow.experts.embedding.weight.copy_(model.flow.experts.embedding.weight[order])
    else:
        for weight in renumbered.flow.experts.heads.weights():
            weight.copy_(weight[order])
    gate = renumbered.flow.gate.expert_proj
    gate.weight.copy_(gate.weight[order]), gate.bias.copy_(gate.bias[order])
    expected, actual = (each(**batch, labels=labels) for each in (model, renumbered))
    assert_same(actual.expert_usage, expected.expert_usage[order])
    for name in (*TERMS, "logits"):
        if name in expected:
            assert_same(actual[name], expected[name])
    for options in ({}, {"expert_choice": "mixture"}):
        assert torch.equal(written(renumbered, batch, **options), written(model, batch, **options))


@pytest.mark.slow
@settings(few, max_examples=8)
@given(rows=prompts, kind=st.sampled_from(sorted(KINDS)), data=st.data())
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(variant, rows, kind, data):
    choices = {
        "num_experts": st.integers(1, 4),
        "tie_word_embeddings": st.booleans(),
        "attention_conv_kernel": st.sampled_from([0, 3, 5]),
        "conv_kernel": st.integers(1, 5),
        "expand": st.integers(1, 3),
        "moe_intermediate_size": st.sampled_from([None, 1, 48]),
        "num_attention_heads": st.sampled_from([1, 2, 32]),
        "cross_attention_layers": st.sampled_from([None, [0]]),
        "eos_token_id": st.sampled_from([2, 3]),
    }
    model = make_model.__wrapped__(variant, kind, **{name: data.draw(choice) for name, choice in choices.items()})
    batch = as_batch(rows)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = YanForFlowGeneration.from_pretrained(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert_same(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(written(loaded, batch), written(model, batch))


@pytest.mark.parametrize("variant", ["mamba"])
@torch.no_grad()
def test_mamba_reads_and_writes_every_length(variant):
    """From 1 to 70, with padding and without, and the scan as its recurrence."""
    longest = 70
    model = make_model(variant, max_position_embeddings=longest)
    ids = torch.randint(4, VOCABULARY, (longest, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(longest, longest).tril().long()
    latents = model.model(ids, mask).last_hidden_state
    logits = model(ids, mask).logits
    x, dt, b, c = (torch.rand(2, 3, longest, size) for size in (6, 6, 4, 4))
    a_matrix, state, steps = -torch.rand(2, 6, 4), 0, []
    for step in range(longest):
        decay = torch.exp(dt[:, :, step, :, None] * a_matrix[:, None])
        state = decay * state + b[:, :, step, None, :] * (dt[:, :, step] * x[:, :, step])[..., None]
        steps.append((state * c[:, :, step, None, :]).sum(-1))
        length, single = step + 1, ids[step, None, : step + 1]
        assert_same(
            selective_scan(x[:, :, :length], dt[:, :, :length], a_matrix, b[:, :, :length], c[:, :, :length]),
            torch.stack(steps, 2),
        )
        assert_same(model.model(single).last_hidden_state[0], latents[step, :length])
        assert_same(model(single).logits[0], logits[step])
        assert model(single, labels=single % 60 + 4, canvas_length=length).loss.isfinite()
