"""What collators cut and say of it, and what their random draws depend on."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from modeling_yan.data import AutoencoderCollator, CompletionCollator, FlowCollator, collators

MASK = 3


@pytest.mark.parametrize("head", [[], [1], [MASK] * 3, [1, MASK, MASK]])
def test_a_long_source_keeps_its_answer_slot_and_its_end(tokenizer, head):
    slot = head if MASK in head else []
    batch = FlowCollator(tokenizer, 8, 8)([{"source": [*head, *range(20, 40)], "target": [11]}])
    assert batch["input_ids"].tolist() == [[*slot, *range(32 + len(slot), 40)]]


def test_stage_one_cuts_a_long_source_as_the_flow_does(tokenizer):
    source = range(20, 40)
    cut = FlowCollator(tokenizer, 8, 8)([{"source": source, "target": [11]}])["input_ids"][0].tolist()
    collator = AutoencoderCollator(tokenizer, 12, num_answer_slots=4, copy_prompt_to_slots=True)
    batch = collator([{"source": source, "target": [11]}])
    assert batch["input_ids"].tolist() == [[*cut[:4], *cut]]
    assert collator.num_truncated == 1


def test_stage_one_keeps_the_special_token_before_a_long_source(tokenizer, monkeypatch):
    collator = AutoencoderCollator(tokenizer, 8, mask_ratio=0.0, target_mask_ratio=0.0, multiple_of=1)
    monkeypatch.setattr(collator, "_leading_ids", {20})
    assert collator([{"source": range(20, 40), "target": [11]}])["input_ids"].tolist() == [[20, *range(34, 40), 11]]


def test_what_is_cut_is_said_once(tokenizer, monkeypatch):
    warnings = []
    monkeypatch.setattr(collators.logger, "warning", warnings.append)
    collator = FlowCollator(tokenizer, max_source_length=4, canvas_length=4)
    collator([{"source": [10] * 4, "target": [11] * 3}])
    assert not warnings
    for _ in range(2):
        collator([{"source": [10] * 5, "target": [11] * 3}, {"source": [10], "target": [11] * 6}])
    assert ["5 tokens to max_source_length=4" in warnings[0], "6 tokens to canvas_length=4" in warnings[1]] == [
        True
    ] * 2
    assert (len(warnings), collator.num_truncated, collator.num_cut_targets) == (2, 2, 2)


@pytest.mark.parametrize("collator_class", [FlowCollator, CompletionCollator])
def test_lengths_come_from_the_model(tokenizer, tiny_model, collator_class):
    tiny_model.config.num_answer_slots = 8
    collator = collator_class(tokenizer, model=tiny_model)
    pairs = getattr(collator, "pairs", collator)
    assert (pairs.max_source_length, pairs.canvas_length) == (40, 8)
    pairs = getattr(collator := collator_class(tokenizer, 12, model=tiny_model), "pairs", collator)
    assert (pairs.max_source_length, pairs.canvas_length) == (12, 8)
    for limits in ({"max_source_length": 41}, {"canvas_length": 9}):
        with pytest.raises(ValueError, match=rf"{next(iter(limits))}=\d+: must be at most"):
            collator_class(tokenizer, **limits, model=tiny_model)
    with pytest.raises(ValueError, match="canvas_length is None"):
        collator_class(tokenizer, max_source_length=8)


def test_a_collator_goes_on_in_another_process_where_it_was(tokenizer):
    rows = [{"input_ids": list(range(10, 40))}] * 8
    collator = AutoencoderCollator(tokenizer, 32, seed=1)
    collator(rows)
    sent = pickle.loads(pickle.dumps(collator))
    shared = (torch.Tensor, torch.Generator)  # which spawned workers would get through shared memory
    assert not any(isinstance(value, shared) for value in collator.draws.__getstate__().values())
    assert torch.equal(sent(rows)["input_ids"], collator(rows)["input_ids"])


@pytest.mark.slow
def test_spawned_workers_collate(tokenizer):
    options = {"num_workers": 1, "multiprocessing_context": "spawn", "batch_size": 2}
    collator = AutoencoderCollator(tokenizer, 32)
    batches = list(DataLoader([{"input_ids": [10, 11, 12]}] * 4, collate_fn=collator, **options))
    assert [batch["labels"].shape for batch in batches] == [(2, 8)] * 2


def test_once_it_knows_the_epoch_the_batch_alone_decides(tokenizer):
    rows = [{"input_ids": list(range(10, 40))}, {"source": [10, 11], "target": [20] * 9}] * 8
    one, other = AutoencoderCollator(tokenizer, 40), AutoencoderCollator(tokenizer, 40)
    other(rows)
    seen = []
    for epoch in (0, 1):
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        one(rows[:3])
        seen.append(one(rows)["input_ids"])
        assert torch.equal(seen[-1], other(rows)["input_ids"])
    assert not torch.equal(*seen)
    assert not torch.equal(seen[1], AutoencoderCollator(tokenizer, 40, seed=1)(rows)["input_ids"])
