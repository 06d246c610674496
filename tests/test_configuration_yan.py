"""YanConfig refuses wrong values by name, survives a round trip, and the presets have the sizes that they promise."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

from modeling_yan import YanConfig, YanForFlowGeneration, YanGenerationConfig
from modeling_yan import configuration_yan as model_fields
from modeling_yan import objective_config_yan as objective_fields
from modeling_yan.configuration_yan import TOKEN_ID_FIELDS
from modeling_yan.fields_yan import REMOVED
from modeling_yan.objective_config_yan import NON_NEGATIVE_FIELDS

POSITIVE_FIELDS = model_fields.POSITIVE_FIELDS + objective_fields.POSITIVE_FIELDS
PROBABILITY_FIELDS = model_fields.PROBABILITY_FIELDS
PRESETS = Path(__file__).parents[1] / "configuration"
WRONG_VALUES = [
    # field, wrong value, what the message says is allowed
    ("num_experts", 0, "greater than 0"),
    ("num_experts", -3, "greater than 0"),
    ("flow_sigma", 0.0, "greater than 0"),
    ("flow_sigma", float("inf"), "greater than 0"),
    ("flow_sigma", float("nan"), "greater than 0"),
    ("gate_temperature", -1.0, "greater than 0"),
    ("time_alpha", 0.0, "greater than 0"),
    ("nll_weight", -0.1, "at least 0"),
    ("ce_weight", -1, "at least 0"),
    ("gate_entropy_weight", -0.01, "at least 0"),
    ("mmd_weight", float("inf"), "at least 0"),
    ("latent_noise", -0.5, "at least 0"),
    ("hidden_dropout", 1.0, "[0, 1)"),
    ("decoder_dropout", -0.1, "[0, 1)"),
    ("mask_ratio", 0.6, "[0, 0.5]"),
    ("mask_ratio", float("nan"), "[0, 0.5]"),
    ("encoder_mixer", "rnn", "attention, mamba"),
    ("flow_mixer", "Mamba", "attention, mamba"),
    ("train_expert_choice", "best", "argmax, sample, posterior"),
    ("expert_scope", "word", "token, sequence"),
    ("attention_conv_kernel", 4, "0 or a positive odd number"),
    ("attention_conv_kernel", -3, "0 or a positive odd number"),
    ("num_attention_heads", 5, "divisor of hidden_size=32"),
    ("cross_attention_layers", [], "non-empty"),
    ("cross_attention_layers", [0, 0], "without repetition"),
    ("cross_attention_layers", [0, 2], "num_flow_layers=2"),
    ("cross_attention_layers", [-1], "num_flow_layers=2"),
    ("canvas_length", 49, "max_position_embeddings=48"),
    ("max_train_flow_steps", 2, "min_train_flow_steps=3"),
    ("num_flow_steps", 0, "at least 1 without answer slots for the canvas"),
    ("min_train_flow_steps", 0, "1 or more, or 0 as max_train_flow_steps"),
    ("min_train_flow_steps", -1, "at least 0"),
    ("pad_token_id", 64, "vocab_size=64"),
    ("eos_token_id", -1, "vocab_size=64"),
]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_flow_layers": 2,
    "max_position_embeddings": 48,
    "canvas_length": 8,
    "min_train_flow_steps": 3,
}


def assert_refused(field, value, allowed):
    with pytest.raises(ValueError, match=re.escape(allowed)) as error:
        YanConfig(**{**SMALL, field: value})
    assert str(error.value).startswith(f"{field}={value!r}: must be ")


def count_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in YanForFlowGeneration(config).parameters())


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG_VALUES)
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(field, value, allowed):
    assert_refused(field, value, allowed)


@pytest.mark.parametrize("field", POSITIVE_FIELDS)
def test_every_size_must_be_positive(field):
    assert_refused(field, -1.0 if isinstance(getattr(YanConfig(**SMALL), field), float) else -1, "greater than 0")


@pytest.mark.parametrize("field", NON_NEGATIVE_FIELDS)
def test_every_weight_may_be_zero_but_not_negative(field):
    assert getattr(YanConfig(**{**SMALL, field: 0.0}), field) == 0
    assert_refused(field, -0.5, "at least 0")


@pytest.mark.parametrize("field", PROBABILITY_FIELDS)
def test_every_probability_must_be_below_one(field):
    assert_refused(field, 1.0, "[0, 1)")


@pytest.mark.parametrize("field", TOKEN_ID_FIELDS)
def test_every_token_id_must_be_in_the_vocabulary(field):
    assert getattr(YanConfig(**{**SMALL, field: 63}), field) == 63
    assert_refused(field, 64, "[0, vocab_size=64)")


@pytest.mark.parametrize(("field", "value"), [("hidden_size", "32"), ("num_experts", 2.0), ("encoder_mixer", None)])
def test_a_value_of_the_wrong_type_is_refused_by_name(field, value):
    with pytest.raises((ValueError, StrictDataclassError), match=field):
        YanConfig(**{**SMALL, field: value})


def test_a_value_that_became_wrong_is_not_saved(tmp_path):
    config = YanConfig(**SMALL)
    config.num_experts = 0
    with pytest.raises((ValueError, StrictDataclassError), match="num_experts=0"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_width_of_an_expert_is_positive_or_left_open():
    assert_refused("moe_intermediate_size", 0, "None or greater than 0")


def test_a_misspelt_field_warns_and_a_correct_one_does_not(caplog):
    with caplog.at_level(logging.WARNING):
        YanConfig(num_experts=2, id2label={0: "a"}, name_or_path="here")
        assert caplog.text == ""
        YanConfig(num_expert=2)
    assert "num_expert" in caplog.text


def test_what_is_left_open_follows_from_the_width():
    config = YanConfig(hidden_size=40, num_attention_heads=4, num_flow_layers=3)
    assert (config.intermediate_size, config.time_step_rank, config.mamba_intermediate_size) == (160, 3, 80)
    assert (config.expert_intermediate_size, YanConfig(moe_intermediate_size=7).expert_intermediate_size) == (160, 7)
    assert config.flow_layers_with_cross_attention == [0, 1, 2]
    assert YanConfig(num_flow_layers=3, cross_attention_layers=[2, 0]).flow_layers_with_cross_attention == [0, 2]


def test_saving_and_loading_gives_an_equal_config(tmp_path):
    config = YanConfig(**SMALL, flow_mixer="mamba", cross_attention_layers=[1], nll_weight=0, bos_token_id=None)
    config.save_pretrained(tmp_path)
    loaded = YanConfig.from_pretrained(tmp_path)
    # dtype and the path are of the loading, not of the config
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.bos_token_id is None
    assert loaded.cross_attention_layers == [1]


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_a_preset_loads_without_a_warning(mixer, size, caplog):
    name = {"attention": "yan-transformer", "mamba": "yan-mamba"}[mixer]
    with caplog.at_level(logging.WARNING):
        config = YanConfig.from_pretrained(PRESETS / f"{name}-{size}")
    assert caplog.text == ""
    assert (config.encoder_mixer, config.flow_mixer) == (mixer, mixer)
    saved = json.loads((PRESETS / f"{name}-{size}" / "config.json").read_text())
    for field, value in {**saved.pop("objective"), **saved}.items():
        assert field in ("model_type", "auto_map", "transformers_version") or getattr(config, field) == value


@pytest.mark.parametrize(("name", "promised"), [("yan-transformer-base", 200e6), ("yan-mamba-base", 210e6)])
def test_a_base_preset_has_the_papers_number_of_parameters(name, promised):
    assert count_parameters(YanConfig.from_pretrained(PRESETS / name)) == pytest.approx(promised, rel=0.03)


def test_the_small_preset_is_as_large_as_the_readme_says():
    assert count_parameters(YanConfig.from_pretrained(PRESETS / "yan-transformer-small")) == pytest.approx(
        31e6, rel=0.02
    )


@pytest.mark.parametrize("name", ["yan-transformer-tiny", "yan-mamba-tiny"])
def test_a_tiny_preset_fits_into_twelve_megabytes(name):
    assert 1e6 < 4 * count_parameters(YanConfig.from_pretrained(PRESETS / name)) < 12e6


def test_a_flow_is_trained_in_every_update_or_in_none():
    slots = {**SMALL, "num_answer_slots": 8, "train_expert_choice": "posterior"}
    YanConfig(**{**slots, "min_train_flow_steps": 0, "max_train_flow_steps": 0})
    with pytest.raises(ValueError, match="min_train_flow_steps=0: must be 1 or more, or 0 as max_train_flow_steps"):
        YanConfig(**{**slots, "min_train_flow_steps": 0, "max_train_flow_steps": 3})
    with pytest.raises(ValueError, match="min_train_flow_steps=0: must be at least 1 without answer slots"):
        YanConfig(**{**SMALL, "min_train_flow_steps": 0, "max_train_flow_steps": 0})


def old_config(folder, **fields):
    """A config.json as version 0.1 wrote it."""
    (folder / "config.json").write_text(json.dumps({"model_type": "yan", **SMALL, **fields}))
    return folder


# as version 0.1 wrote them where nothing was asked for
HARMLESS = {
    "self_conditioning": False,
    "start_point": "noise",
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "source_mask_ratio": 0.0,
    "detach_transitions": False,
    "expert_exploration": 0.15,
    "gate_weight": 1.0,
    "gate_rank": 64,
}


def test_an_old_config_that_asks_for_nothing_removed_loads_in_silence(tmp_path, caplog):
    options = ("commit_threshold", "solver")  # of generation
    fields = {name: harmless for name, (harmless, _) in REMOVED.items() if name not in options}
    assert fields == HARMLESS
    with caplog.at_level(logging.WARNING):
        config = YanConfig.from_pretrained(old_config(tmp_path, **fields))
    assert caplog.text == ""
    assert not fields.keys() & config.to_dict().keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("self_conditioning", True),
        ("start_point", "draft"),
        ("use_bias", True),
        ("use_conv_bias", False),
    ],
)
def test_an_old_config_of_a_model_that_would_write_something_else_is_refused(tmp_path, field, value):
    allowed = f"{HARMLESS[field]!r}, or left out; version 0.1 was the last that had others"
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: must be {allowed}")):
        YanConfig.from_pretrained(old_config(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source_mask_ratio", 0.1),
        ("time_step_max", 0.2),
        ("detach_transitions", True),
        ("expert_exploration", 0.3),
        ("gate_weight", 2.0),
        ("gate_rank", 32),
    ],
)
def test_what_only_training_asked_is_dropped_with_one_warning(tmp_path, caplog, field, value):
    transformers_logging.warning_once.cache_clear()  # another test may have seen it
    with caplog.at_level(logging.WARNING):
        configs = [YanConfig.from_pretrained(old_config(tmp_path, **{field: value})) for _ in range(2)]
    assert not any(hasattr(config, field) for config in configs)
    version = "0.2" if field == "gate_rank" else "0.1"
    assert caplog.text.count(f"{field}={value!r}: ignored, version {version} was the last that had it.") == 1


@pytest.mark.parametrize("choice", ["likeliest", "mixture"])
def test_a_removed_choice_of_training_becomes_the_default(tmp_path, caplog, choice):
    transformers_logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        config = YanConfig.from_pretrained(old_config(tmp_path, train_expert_choice=choice))
    assert config.train_expert_choice == "sample"
    assert f"train_expert_choice={choice!r}: replaced by 'sample'" in caplog.text


def test_a_removed_option_of_generation_has_no_effect(caplog):
    with caplog.at_level(logging.WARNING):
        for value in (None, "off"):
            assert not hasattr(YanGenerationConfig(commit_threshold=value), "commit_threshold")
        assert caplog.text == ""
        assert not hasattr(YanGenerationConfig(commit_threshold=0.75), "commit_threshold")
    assert "commit_threshold=0.75: ignored, version 0.1 was the last that had it" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"), [("expert_scope", "nonsense"), ("vertices_per_token", 2), ("crf_rank", -1)]
)
def test_fields_that_change_a_saved_config_are_checked(tmp_path, name, value):
    YanForFlowGeneration(YanConfig(**SMALL)).save_pretrained(tmp_path)
    for load in (YanConfig.from_pretrained, YanForFlowGeneration.from_pretrained):
        with pytest.raises(ValueError, match=f"must be .*{'posterior' if name == 'vertices_per_token' else ''}"):
            load(tmp_path, **{name: value})
    config = YanConfig(**SMALL)
    setattr(config, name, value)
    with pytest.raises(ValueError, match="must be"):
        YanForFlowGeneration(config)
