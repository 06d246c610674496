"""Baselines are as large as the YAN that they are compared with."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.baselines import BASELINES, CONVOLVED, count_parameters, make_baseline, match_size
from modeling_yan.baselines.sizes import main

PRESETS = sorted((Path(__file__).parents[2] / "configuration").glob("yan-*"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_has_the_parameters_of_its_yan(preset, kind):
    config = YanConfig.from_pretrained(preset)
    if kind in CONVOLVED:
        config.attention_conv_kernel = config.attention_conv_kernel or 9  # the base presets have no convolution
    with torch.device("meta"):
        baseline = make_baseline(kind, config)
        wanted = YanForFlowGeneration(config).num_parameters()
    assert baseline.num_parameters() == pytest.approx(wanted, rel=0.001)
    assert baseline.config.eos_token_id == config.eos_token_id
    assert baseline.config.pad_token_id == config.pad_token_id
    assert baseline.generation_config.eos_token_id == config.eos_token_id


@pytest.mark.parametrize("preset", PRESETS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_fewer_or_more_experts_at_equal_size(preset, num_experts):
    config = YanConfig.from_pretrained(preset)
    changed = match_size(config, num_experts=num_experts)
    assert changed.num_experts == num_experts
    assert changed.hidden_size == config.hidden_size
    assert count_parameters(changed) == pytest.approx(count_parameters(config), rel=0.001)


def test_the_same_config_keeps_its_width(tiny_config):
    assert match_size(tiny_config).intermediate_size == tiny_config.intermediate_size


def test_the_command_writes_a_preset(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path / "four")
    main(["--config", str(tmp_path / "four"), "--num_experts", "1", "--output", str(tmp_path / "one")])
    written = YanConfig.from_pretrained(tmp_path / "one")
    assert written.num_experts == 1
    assert count_parameters(written) == pytest.approx(count_parameters(tiny_config), rel=0.01)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_saved_baseline_loads_with_the_auto_classes(kind, make_config, tmp_path):
    baseline = make_baseline(kind, make_config(hidden_size=16, attention_conv_kernel=3)).eval()
    baseline.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if "encoder_decoder" in kind else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(baseline)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    expected = baseline.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert torch.equal(loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4), expected)


def test_an_unknown_kind_and_a_yan_that_is_too_small_or_lacks_a_convolution_are_refused(tiny_config):
    with pytest.raises(ValueError, match="kind='gru': must be one of decoder, encoder_decoder, masked_diffusion"):
        make_baseline("gru", tiny_config)
    with pytest.raises(ValueError, match="kind='decoder_conv': needs a config with attention_conv_kernel above 0"):
        make_baseline("decoder_conv", tiny_config)
    with pytest.raises(ValueError, match="no room for feed-forward layers"):
        match_size(tiny_config, num_encoder_layers=80)
