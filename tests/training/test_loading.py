"""Workers that draw and tokenise rows change no batch, no count and no loss. Losses are read where they are told."""

import multiprocessing
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset

from modeling_yan import YanConfig, YanForAutoencoding
from modeling_yan.data import prepare_tokenizer, train_tokenizer
from modeling_yan.training import pretrain
from modeling_yan.training.loading import load_updates
from modeling_yan.training.loop import Training
from modeling_yan.training.sampler import TaskSampler

TEXTS = [
    {"text": f"{name} took {number} apples. It was dark then.", "source": None, "target": None}
    for number, name in enumerate(["Mary", "John", "Ann", "Tom"] * 5)
]
PAIRS = [{"text": None, "source": f"Who has {number}?", "target": "Mary" * (number % 5 > 0)} for number in range(20)]
ROWS = TEXTS + PAIRS
KINDS = {
    "list": lambda: ROWS,
    "arrow": lambda: Dataset.from_list(ROWS),
    "stream": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer([row["text"] for row in TEXTS] * 4, vocab_size=300)
    prepare_tokenizer(tokenizer)
    return tokenizer


@pytest.fixture
def make_samplers(tokenizer):
    """Function to the samplers of two micro-batches of every update."""
    config = YanConfig(vocab_size=len(tokenizer), canvas_length=40, max_position_embeddings=48)

    def make(rows, stage, **options):
        return [
            TaskSampler(rows, tokenizer, config, stage, 3, 14, seed=0, process_index=index, num_processes=2, **options)
            for index in range(2)
        ]

    return make


def are_same(updates, others) -> bool:
    pairs = [pair for update in zip_longest(updates, others, fillvalue=()) for pair in zip_longest(*update)]
    return all(
        first.keys() == second.keys()
        and all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) for name in first)
        for first, second in pairs
    )


@pytest.mark.slow
@pytest.mark.parametrize("bucket_batches", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["autoencoder", "flow"])
def test_workers_give_the_same_batches_and_counts(make_samplers, kind, stage, bucket_batches):
    for start in (0, 5):
        mine, others = (make_samplers(KINDS[kind](), stage, bucket_batches=bucket_batches) for _ in range(2))
        state = torch.get_rng_state()
        expected = list(load_updates(mine, start))
        assert len(expected) == 14 - start
        assert are_same(expected, list(load_updates(others, start, num_workers=2)))
        assert torch.equal(torch.get_rng_state(), state)
        assert [sampler.num_skipped for sampler in mine] == [sampler.num_skipped for sampler in others]
        assert sum(sampler.num_skipped for sampler in mine) > 0


def test_rows_are_made_in_the_workers_alone(make_samplers, monkeypatch):
    samplers = make_samplers(ROWS, "flow")
    updates = load_updates(samplers, 0, num_workers=1)
    next(updates)  # the worker is there, as a copy of what is lost here
    monkeypatch.setattr(TaskSampler, "make_group", None)
    assert len(list(updates)) == 13


def test_what_rows_lack_is_said_by_a_worker(make_samplers):
    samplers = make_samplers([{"source": "Who?", "target": ""}], "flow")
    with pytest.raises(ValueError, match="1000 rows in a row have no target for task pairs"):
        list(load_updates(samplers, 0, num_workers=1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "flow"])
def test_a_run_with_workers_is_the_same_and_goes_on_with_none(arguments, runs, fresh, stage):
    options = {"stage": stage, "max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2}
    plain = arguments(**options)
    pretrain(plain)
    fresh()
    with_workers = replace(plain, output_dir=plain.output_dir + "-workers", dataloader_num_workers=2)
    pretrain(replace(with_workers, max_steps=3))
    fresh()
    pretrain(replace(with_workers, resume=True, dataloader_num_workers=0))
    fresh()
    half = replace(with_workers, output_dir=plain.output_dir + "-half")
    pretrain(replace(half, max_steps=3, dataloader_num_workers=0))
    fresh()
    pretrain(replace(half, resume=True))
    for run in (with_workers, half):
        assert runs.equal(runs.weights(plain.output_dir), runs.weights(run.output_dir))
        lines, others = ([line.get("loss") for line in runs.log(each.output_dir)] for each in (plain, run))
        assert [loss for loss in others if loss] == [loss for loss in lines if loss]


def test_losses_are_read_at_the_lines_of_the_log_and_before_a_checkpoint(arguments, runs, monkeypatch):
    steps, read = [], Training._read_losses
    monkeypatch.setattr(Training, "_read_losses", lambda self: (steps.append(self.step), read(self)))
    settings = arguments(max_steps=7, save_steps=5, logging_steps=3)
    pretrain(settings)
    assert steps == [3, 5, 6, 7]
    assert [line["step"] for line in runs.log(settings.output_dir)] == [3, 6, 7]


@pytest.mark.parametrize("bad", [2, 3, 4])
def test_a_loss_that_is_no_number_is_found_before_a_checkpoint_is_written(arguments, monkeypatch, bad):
    forward, calls = YanForAutoencoding.forward, []

    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append(output.loss)
        output.loss = output.loss * (float("inf") if len(calls) == bad else 1.0)
        return output

    monkeypatch.setattr(YanForAutoencoding, "forward", broken)
    settings = arguments(max_steps=9, save_steps=4, logging_steps=50)
    with pytest.raises(FloatingPointError, match=f"update {bad}: the loss is inf"):
        pretrain(settings)
    assert len(calls) == 4
    assert not list(Path(settings.output_dir).glob("checkpoint-*"))


def test_a_worker_that_dies_ends_the_run_with_an_error(make_samplers):
    updates = load_updates(make_samplers(ROWS, "flow"), 0, num_workers=1)
    next(updates)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match=rf"worker \(pid.*{worker.pid}\)"):
        list(updates)
