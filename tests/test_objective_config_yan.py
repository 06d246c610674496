"""The objective of a config: given flat or nested it is the same, it is saved nested, and generation ignores it."""

import copy
import inspect
import json
import logging
import pickle
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

import modeling_yan
from modeling_yan import YanConfig, YanForFlowGeneration, YanGenerationConfig
from modeling_yan.objective_config_yan import OBJECTIVE_FIELDS, YanObjectiveConfig, flatten_objective

OTHER_VALUES = {
    **{name: 0.3 for name in OBJECTIVE_FIELDS if name.endswith("_weight")},
    **{name: True for name in OBJECTIVE_FIELDS if name.startswith("freeze_")},
    **dict.fromkeys(("mask_ratio", "latent_noise", "time_alpha", "time_beta", "flow_sigma"), 0.4),
    "max_span_len": 2,
    "min_train_flow_steps": 2,
    "max_train_flow_steps": 3,
    "detach_target_latents": False,
}
CLASH = re.escape("mse_weight=0.5 and objective={'mse_weight': 1.0}: must be the same, or one of them")


def own_fields(config_class):
    of_all = {field.name for field in fields(PreTrainedConfig)}
    return {field.name for field in fields(config_class)} - of_all


def test_about_forty_fields_describe_the_model_and_the_others_are_of_the_objective():
    assert len(own_fields(YanConfig)) == 44
    assert own_fields(YanObjectiveConfig) == set(OBJECTIVE_FIELDS) == OTHER_VALUES.keys()
    assert not own_fields(YanConfig) & set(OBJECTIVE_FIELDS)


@pytest.mark.parametrize("config_class", [YanConfig, YanObjectiveConfig])
def test_the_docstring_tells_of_every_field(config_class):
    arguments = inspect.cleandoc(config_class.__doc__).split("Args:")[1].split("Raises:")[0]
    described = set(re.findall(r"\w+", " ".join(re.findall(r"^ {4}([a-z][a-z_, ]*):", arguments, re.MULTILINE))))
    assert described == own_fields(config_class)


@pytest.mark.parametrize("name", OBJECTIVE_FIELDS)
def test_a_field_given_flat_is_one_of_the_objective(name, tmp_path):
    value = OTHER_VALUES[name]
    others = {"max_train_flow_steps": 3} if name == "min_train_flow_steps" else {}
    flat, nested = YanConfig(**others, **{name: value}), YanConfig(objective={**others, name: value})
    assert flat == nested
    assert (getattr(flat, name), getattr(flat.objective, name)) == (value, value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yan", **others, name: value}))  # as 0.2 saved it
    assert YanConfig.from_pretrained(tmp_path).objective == flat.objective
    flat.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["objective"][name], name in saved) == (value, False)
    assert YanConfig.from_pretrained(tmp_path).objective == flat.objective


def test_setting_either_name_sets_the_one_field():
    config = YanConfig()
    config.mse_weight = 0.5
    config.objective.ce_weight = 0.25
    assert (config.objective.mse_weight, config.ce_weight) == (0.5, 0.25)
    assert "mse_weight" not in vars(config)
    config.update({"draft_weight": 2.0, "objective": {"mse_weight": 3.0}})
    assert (config.mse_weight, config.draft_weight) == (3.0, 0.5)  # another objective, with its defaults
    config.update_from_string("freeze_encoder=false,max_span_len=1")
    assert (config.objective.freeze_encoder, config.objective.max_span_len) == (False, 1)
    with pytest.raises(AttributeError, match="'YanConfig' object has no attribute 'mse_weigh'"):
        _ = config.mse_weigh


@pytest.mark.parametrize("nested", [{"mse_weight": 1.0}, YanObjectiveConfig()], ids=["dictionary", "config"])
def test_two_values_of_one_field_are_refused(nested, tmp_path):
    YanConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=CLASH):
        YanConfig(mse_weight=0.5, objective=nested)
    with pytest.raises(ValueError, match=CLASH):
        YanConfig.from_pretrained(tmp_path, mse_weight=0.5, objective=nested)
    with pytest.raises(ValueError, match=CLASH):
        YanConfig().with_fields(mse_weight=0.5, objective=nested)
    with pytest.raises(ValueError, match=CLASH):
        flatten_objective({"mse_weight": 0.5, "objective": nested})
    assert YanConfig(mse_weight=1.0, objective=nested).mse_weight == 1.0


def test_one_field_of_the_objective_is_changed_where_a_config_is_loaded(tmp_path):
    YanConfig(mse_weight=0.5, ce_weight=0.25).save_pretrained(tmp_path)
    for given in ({"mse_weight": 2.0}, {"objective": {"mse_weight": 2.0}}):
        objective = AutoConfig.from_pretrained(tmp_path, **given).objective
        assert (objective.mse_weight, objective.ce_weight) == (2.0, 0.25)
        objective = YanConfig.from_pretrained(tmp_path).with_fields(**given, num_experts=2).objective
        assert (objective.mse_weight, objective.ce_weight) == (2.0, 0.25)


def test_a_copy_with_other_fields_is_checked_and_leaves_the_first_alone():
    config = YanConfig(num_experts=2)
    changed = config.with_fields(num_experts=3, freeze_flow=True)
    assert (config.num_experts, config.objective.freeze_flow) == (2, False)
    assert (changed.num_experts, changed.objective.freeze_flow) == (3, True)
    with pytest.raises(ValueError, match="num_expert: YanConfig has no such field"):
        config.with_fields(num_expert=3)
    with pytest.raises(ValueError, match="canvas_length=4096: must be at most max_position_embeddings=1024"):
        config.with_fields(canvas_length=4096)


@pytest.mark.parametrize("fields", [{"mse_weight": -1.0}, {"objective": {"mse_weight": -1.0}}])
def test_a_wrong_value_is_refused_by_the_name_of_the_field(fields, tmp_path):
    with pytest.raises(ValueError, match=r"^mse_weight=-1.0: must be at least 0"):
        YanConfig(**fields)
    with pytest.raises(TypeError, match="mse_weight"):
        YanConfig(**json.loads(json.dumps(fields).replace("-1.0", '"much"')))
    config = YanConfig()
    with pytest.raises(TypeError, match="mse_weight"):
        config.mse_weight = "much"
    config.objective.mse_weight = -1.0
    with pytest.raises((ValueError, StrictDataclassError), match=r"mse_weight=-1\.0"):
        config.save_pretrained(tmp_path)


def test_something_else_is_no_objective(caplog):
    with pytest.raises(ValueError, match="objective of model_type='bert': must be 'yan_objective'"):
        YanConfig(objective=BertConfig())
    with caplog.at_level(logging.WARNING):
        YanConfig(objective={"mse_weigh": 1.0})
    assert "YanObjectiveConfig has no field mse_weigh; kept as plain attributes without effect." in caplog.text


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_has_an_objective_of_its_own(copied):
    config = YanConfig(mse_weight=0.5)
    other = copied(config)
    assert other == config
    other.mse_weight = 0.25
    assert config.objective.mse_weight == 0.5


def test_dictionaries_and_the_printed_config_show_the_objective_nested():
    config = YanConfig(mse_weight=0.5)
    for found in (config.to_dict(), config.to_diff_dict(), json.loads(repr(config).removeprefix("YanConfig "))):
        assert found["objective"].keys() == {*OBJECTIVE_FIELDS, "model_type"}
        assert found["objective"]["mse_weight"] == 0.5
        assert not found.keys() & set(OBJECTIVE_FIELDS)


def test_a_model_is_loaded_with_fields_of_the_objective(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    fields = {"freeze_flow": True, "objective": {"mse_weight": 0.5}}
    for loaded in (YanForFlowGeneration, AutoModelForCausalLM):
        model = loaded.from_pretrained(tmp_path, **fields)
        assert (model.config.objective.freeze_flow, model.config.objective.mse_weight) == (True, 0.5)
        assert not any(weight.requires_grad for weight in model.flow.parameters())
        model.generate(torch.tensor([[5, 6]]))  # options that transformers hands on are none of generation


@pytest.mark.parametrize(
    "fields", [{}, {"train_expert_choice": "posterior", "expert_scope": "sequence", "crf_rank": 4}]
)
def test_no_field_of_the_objective_changes_what_is_generated(make_model, fields):
    sampled = {"do_sample": True, "seed": 3, "temperature": 0.7, "return_dict_in_generate": True}
    prompt, results = torch.tensor([[5, 6, 7], [8, 9, 10]]), []
    for other in ({}, OTHER_VALUES):
        model = make_model(initializer_range=0.3, num_answer_slots=8, **{**fields, **other})
        results.append([model(prompt).logits, model.generate(prompt), *model.generate(prompt, **sampled).trajectory])
    assert all(map(torch.equal, *results))


def test_the_package_asks_the_objective_for_its_fields():
    flat = re.compile(rf"\bconfig\.({'|'.join(OBJECTIVE_FIELDS)})\b")
    files = Path(modeling_yan.__file__).parent.rglob("*.py")
    assert not [path.name for path in files if path.name != "configuration_yan.py" and flat.search(path.read_text())]


def test_the_names_of_earlier_versions_are_those_of_today(tmp_path):
    old = {"transition_rank": 4, "transition_candidates": 8, "transition_weight": 0.5}
    new = {"crf_rank": 4, "crf_candidates": 8, "crf_weight": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yan", **old}))
    loaded = YanConfig.from_pretrained(tmp_path)
    for config in (loaded, YanConfig(**old), YanConfig().with_fields(**old), YanConfig(objective={}, **old)):
        assert {name: getattr(config, name) for name in new} == new
        assert {name: getattr(config, name) for name in old} == old
        assert not config.to_dict().keys() & old.keys()
    loaded.transition_rank = 2
    loaded.transition_weight = 0.25
    assert (loaded.crf_rank, loaded.objective.crf_weight) == (2, 0.25)
    with pytest.raises(TypeError, match="crf_rank"):
        loaded.transition_rank = "many"
    with pytest.raises(ValueError, match=r"crf_weight=0\.5 and objective={'crf_weight': 1\.0}"):
        YanConfig(transition_weight=0.5, objective={"crf_weight": 1.0})


def test_old_names_of_options_are_deprecated(make_model, caplog, tmp_path):
    transformers_logging.warning_once.cache_clear()
    model, prompt = make_model(crf_rank=4, initializer_range=0.3), torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, eos_strategy="first", crf_decoding=False)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(prompt, end_choice="first", use_transitions=False), expected)
    assert "end_choice='first': the option is now called eos_strategy" in caplog.text
    config = YanGenerationConfig(end_choice="first")
    assert (config.eos_strategy, config.end_choice) == ("first", "first")
    model.generation_config.end_choice, model.generation_config.use_transitions = "first", False
    assert torch.equal(model.generate(prompt), expected)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["eos_strategy"], saved["crf_decoding"], "end_choice" in saved) == ("first", False, False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"end_choice": "first", "use_transitions": None}))
    loaded = YanGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.eos_strategy, loaded.crf_decoding) == ("first", None)
