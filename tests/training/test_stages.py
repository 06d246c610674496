"""What a stage is: its tasks, the layout of its batches, and runs that an earlier version began."""

import json
from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator

from modeling_yan.baselines import INPUT_ADAPTERS
from modeling_yan.data import TEXT_TASKS
from modeling_yan.training import PretrainingArguments
from modeling_yan.training.checkpoints import SETTINGS_FILE, find_checkpoint
from modeling_yan.training.stages import STAGES, find_stage
from modeling_yan.training.streams import PAIRS, TEXT

BATCH = {
    "input_ids": torch.tensor([[5, 6]]),
    "attention_mask": torch.ones(1, 2, dtype=torch.long),
    "labels": torch.tensor([[7, 2]]),
}


def test_there_are_two_stages_and_one_of_every_baseline():
    assert list(STAGES) == ["autoencoder", "flow", *INPUT_ADAPTERS]
    assert {name for name, stage in STAGES.items() if stage.is_baseline} == set(INPUT_ADAPTERS)
    assert [name for name, stage in STAGES.items() if stage.has_flow] == ["flow"]
    assert [name for name, stage in STAGES.items() if stage.corrupts] == ["autoencoder"]
    with pytest.raises(ValueError, match="stage='both': must be one of autoencoder, flow, decoder"):
        find_stage("both")


@pytest.mark.parametrize("name", STAGES)
def test_pairs_are_pairs_in_every_stage_and_text_is_what_the_stage_makes_of_it(name):
    assert STAGES[name].tasks(PAIRS) == (PAIRS,)
    assert STAGES[name].tasks(TEXT) == ((TEXT,) if name == "autoencoder" else tuple(TEXT_TASKS))


@pytest.mark.parametrize("name", STAGES)
def test_a_batch_has_the_layout_of_the_stage(name):
    found = STAGES[name].inputs(BATCH, pad_token_id=0)
    expected = INPUT_ADAPTERS[name](BATCH, 0) if name in INPUT_ADAPTERS else BATCH
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in BATCH)


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path):
    arguments = PretrainingArguments("flow", "preset", "tokenizer", str(tmp_path), train_file=["rows"], resume=True)
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    accelerator = Accelerator(cpu=True)
    (checkpoint / SETTINGS_FILE).write_text(json.dumps({**asdict(arguments), "num_places": 1}))
    assert find_checkpoint(arguments, accelerator) == checkpoint
    (checkpoint / SETTINGS_FILE).write_text(json.dumps({**asdict(arguments), "num_places": 2}))
    with pytest.raises(ValueError, match=r"num_microbatches=1 \(was 2\)"):
        find_checkpoint(arguments, accelerator)
