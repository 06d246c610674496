"""Baselines go through the loop of YAN's stages: the same rows, checkpoints, resuming; and their learning rates."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from modeling_yan import YanConfig
from modeling_yan.baselines import INPUT_ADAPTERS
from modeling_yan.data import read_rows
from modeling_yan.training import pretrain, pretrain_with_best_rate, sweep
from modeling_yan.training.loop import make_sampler


@pytest.fixture
def variant():
    """The baselines have no variants: one is enough."""
    return "attention"


@pytest.fixture
def of_pairs(arguments, data):
    """Function from overrides to the arguments of a short run on pairs."""
    pairs = [str(data / "pairs.jsonl")]
    settings = {"train_file": pairs, "validation_file": pairs, "config_overrides": "attention_conv_kernel=3"}
    return lambda **overrides: arguments(num_samples=1, **settings, **overrides)


def load(stage, folder):
    auto = AutoModelForSeq2SeqLM if "encoder_decoder" in stage else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("stage", INPUT_ADAPTERS)
def test_all_models_get_the_same_rows_in_the_same_order(stage, of_pairs, data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    rows, config = read_rows(data / "pairs.jsonl"), YanConfig.from_pretrained(of_pairs().config)
    flow, other = (make_sampler(of_pairs(stage=name), rows, tokenizer, config) for name in ("flow", stage))
    for batch, expected in zip(other, flow, strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(expected[name])) for name in batch)


@pytest.mark.slow
@pytest.mark.parametrize("stage", INPUT_ADAPTERS)
def test_a_baseline_is_trained_validated_saved_and_resumed_bit_for_bit(stage, of_pairs, runs, fresh, tmp_path):
    whole = of_pairs(stage=stage, output_dir=str(tmp_path / "whole"), max_steps=4, save_steps=2)
    pretrain(whole)
    fresh()
    pretrain(replace(whole, output_dir=str(tmp_path / "parts"), max_steps=2))
    fresh()
    pretrain(replace(whole, output_dir=str(tmp_path / "parts"), resume=True))
    assert runs.equal(runs.weights(tmp_path / "whole"), runs.weights(tmp_path / "parts"))
    lines = runs.log(tmp_path / "whole")
    assert all({"loss", "tokens_per_second", "mfu"} <= line.keys() for line in lines if "learning_rate" in line)
    validations = [line for line in lines if "pairs/exact" in line]
    assert [line["step"] for line in validations] == [2, 4]
    assert all(0 <= line["pairs/exact"] <= line["pairs/tokens"] <= 1 for line in validations)
    load(stage, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", INPUT_ADAPTERS)
def test_a_baseline_learns_its_rows(stage, of_pairs, runs):
    settings = {"max_steps": 40, "save_steps": 40, "per_device_train_batch_size": 10, "learning_rate": 1e-2}
    pretrain(of_pairs(stage=stage, logging_steps=10, **settings))
    lines = runs.log(of_pairs().output_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]


def test_the_best_rate_goes_on_from_its_trial(of_pairs, runs, fresh, tmp_path):
    settings = of_pairs(stage="decoder", max_steps=10, save_steps=10)
    assert pretrain_with_best_rate(settings, [1e-9, 1e-2], trial_share=0.5) == 1e-2
    record = json.loads((tmp_path / "out" / "learning_rates.json").read_text())
    losses = {trial["learning_rate"]: trial["loss"] for trial in record["trials"]}
    assert record["chosen"] == 1e-2
    assert record["updates"] == 5
    assert losses[1e-2] < losses[1e-9]
    assert [line["step"] for line in runs.log(tmp_path / "out") if "learning_rate" in line] == list(range(1, 11))
    fresh()
    pretrain(replace(settings, output_dir=str(tmp_path / "direct")))
    assert runs.equal(runs.weights(tmp_path / "out"), runs.weights(tmp_path / "direct"))


def test_a_rate_that_diverges_is_not_chosen(of_pairs):
    assert pretrain_with_best_rate(of_pairs(stage="decoder", max_steps=4), [1e30, 1e-3], trial_share=0.5) == 1e-3


def test_a_loss_that_is_no_number_is_not_the_lowest(of_pairs, monkeypatch, tmp_path):
    found = {1e-1: {"pairs/loss": math.nan}, 1e-2: {"pairs/loss": 1.0}, 1e-3: {}}
    monkeypatch.setattr(sweep, "_try", lambda arguments, rate, steps: found[rate])
    settings = of_pairs(stage="decoder", output_dir=str(tmp_path / "sweep"))
    (tmp_path / "sweep").mkdir()
    assert sweep.choose_learning_rate(settings, list(found), 2) == 1e-2
    assert sweep.choose_learning_rate(settings, [1e-3, 1e-2, 1e-1], 2) == 1e-2
    with pytest.raises(ValueError, match=r"learning_rates=\[0.5\]: must be those of .*learning_rates.json"):
        sweep.choose_learning_rate(settings, [0.5], 2)
    (tmp_path / "sweep" / "learning_rates.json").unlink()
    with pytest.raises(FloatingPointError, match="no trial has a finite loss"):
        sweep.choose_learning_rate(settings, [1e-1, 1e-3], 2)


@pytest.mark.parametrize(
    ("rates", "share", "message"),
    [([], 0.2, "learning_rates="), ([1e-3, 0.0], 0.2, "each above 0"), ([1e-3], 1.0, "trial_share=1.0")],
)
def test_bad_sweeps_are_refused(of_pairs, rates, share, message):
    with pytest.raises(ValueError, match=message):
        pretrain_with_best_rate(of_pairs(stage="decoder"), rates, share)


def test_a_sweep_needs_held_out_rows(of_pairs):
    with pytest.raises(ValueError, match="validation_file"):
        pretrain_with_best_rate(replace(of_pairs(stage="decoder"), validation_file=[]), [1e-3])
