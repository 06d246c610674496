"""Targets of several canvases: the rows of each are what `generate` asks for, and a model learns to go on."""

import random

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.data import CompletionCollator, FlowCollator, split_targets
from modeling_yan.training.sampler import TaskSampler

ROW = {"source": [10, 11], "target": [20, 21, 22, 23, 24]}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
PARTS = [([10, 11], [20, 21], True), ([10, 11, 20, 21], [22, 23], True), ([10, 11, 20, 21, 22, 23], [24], False)]


def as_lists(rows):
    return [(list(row["source"]), list(row["target"]), row["goes_on"]) for row in rows]


def test_a_row_for_every_canvas(tokenizer):
    assert as_lists(split_targets([ROW], tokenizer, 2)) == PARTS


def test_a_target_that_fills_its_canvases_ends_in_one_more(tokenizer):
    rows = split_targets([{**ROW, "target": [20, 21, 22, 23]}], tokenizer, 2)
    assert as_lists(rows)[-1] == ([10, 11, 20, 21, 22, 23], [], False)
    labels = FlowCollator(tokenizer, 8, 2)(rows)["labels"]
    assert labels.tolist() == [[20, 21], [22, 23], [tokenizer.eos_token_id, -100]]


def test_what_fits_stays_as_it_is(tokenizer):
    rows = [{"source": "Mary", "target": "the hat", "task": "x"}]
    assert split_targets(rows, tokenizer, 8) == rows


def test_texts_are_split_behind_the_special_tokens_of_the_prompt(tokenizer):
    row = {"source": "Where is Mary?", "target": "Mary is in the garden with the apple."}
    ids = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
    rows = split_targets([row], tokenizer, 3)
    assert [token for part in rows for token in part["target"]] == ids
    for index, part in enumerate(rows):
        assert list(part["source"]) == tokenizer(row["source"])["input_ids"] + ids[: 3 * index]


def test_a_target_in_its_sources_place_has_one_canvas(tokenizer):
    row = {"source": [10, tokenizer.mask_token_id, 12], "target": [10, 11, 12]}
    assert split_targets([row], tokenizer, 2) == [row]


def test_the_collator_counts_none_of_them_as_cut(tokenizer):
    collator = FlowCollator(tokenizer, 8, 2)
    batch = collator(split_targets([ROW], tokenizer, 2))
    assert batch["labels"].tolist() == [[20, 21], [22, 23], [24, tokenizer.eos_token_id]]
    assert collator.num_cut_targets == 0
    with pytest.raises(ValueError, match=r"a target of 2 tokens that goes on .* must have canvas_length=4"):
        FlowCollator(tokenizer, 8, 4)(split_targets([ROW], tokenizer, 2))


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [([], 2, "rows="), ([{"text": "x"}], 2, "must have source and target"), ([ROW], 0, "canvas_length is 0")],
)
def test_what_can_not_be_split(tokenizer, rows, length, message):
    with pytest.raises(ValueError, match=message):
        split_targets(rows, tokenizer, length)


def test_a_completion_of_several_canvases(tokenizer):
    text = tokenizer("Mary is in the garden.", add_special_tokens=False)["input_ids"]
    row = {"input_ids": [10, 11, *text], "labels": [-100, -100, *text]}
    labels = CompletionCollator(tokenizer, 16, 2)([row])["labels"]
    assert len(labels) == len(text) // 2 + 1
    assert labels[labels >= 0].tolist() == [*text, tokenizer.eos_token_id]


def test_pretraining_draws_one_canvas_of_a_row(tokenizer):
    config = YanConfig(vocab_size=len(tokenizer), canvas_length=2, max_position_embeddings=32, **SIZES)
    sampler = TaskSampler([ROW], tokenizer, config, "flow", batch_size=64, length=1, seed=0)
    batch = sampler.batch("pairs", random.Random(0))
    found = {tuple(labels[labels >= 0].tolist()) for labels in batch["labels"]}
    assert found == {(20, 21), (22, 23), (24, tokenizer.eos_token_id)}
    assert sampler.num_cut_targets == 0


def test_a_model_learns_to_go_on(tokenizer, tmp_path):
    """Two texts of three canvases that begin alike, through the stock Trainer."""
    targets = [[20, 21, 22, 23, 24, 25, 26, 27, 28], [20, 21, 22, 23, 34, 35, 36, 37, 38]]
    rows = [{"source": [10 + index, 15], "target": target} for index, target in enumerate(targets)]
    torch.manual_seed(0)
    fields = {"canvas_length": 4, "num_answer_slots": 4, "refine_draft": True, "num_experts": 1}
    fields |= {"train_expert_choice": "posterior", "mse_weight": 0.0, "max_train_flow_steps": 1}
    fields |= {"freeze_encoder": False, "freeze_decoder": False, "freeze_embeddings": False}
    model = YanForFlowGeneration(YanConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **SIZES, **fields))
    settings = {"max_steps": 120, "learning_rate": 5e-3, "per_device_train_batch_size": 6, "use_cpu": True}
    settings |= {"remove_unused_columns": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    parts = split_targets(rows, tokenizer, model.config.canvas_length)
    Trainer(model, TrainingArguments(str(tmp_path), **settings), FlowCollator(tokenizer, model=model), parts).train()
    prompts = torch.tensor([row["source"] for row in rows])
    texts = model.eval().generate(prompts, max_new_tokens=16, return_prompt=False)
    assert texts.tolist() == [[*target, tokenizer.eos_token_id] for target in targets]
