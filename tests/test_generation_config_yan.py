"""Every option that transformers knows is honoured or refused by name; none is passed over."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig

from modeling_yan import YanGenerationConfig, generation_yan
from modeling_yan.generation_config_yan import (
    FLOW_FIELDS,
    HONOURED_OPTIONS,
    NEUTRAL_VALUES,
    NOT_OF_THE_TEXT,
    STOCK_ARGUMENTS,
)
from modeling_yan.generation_yan import _compiler_settings

# What transformers itself checks, or makes something of, has to be a value that it accepts; a number else.
VALUES = {
    "early_stopping": True,
    "use_mtp": True,
    "cache_implementation": "static",
    "watermarking_config": {"greenlist_ratio": 0.3},
    "bad_words_ids": [[5]],
    "force_words_ids": [[5]],
    "constraints": ["anything"],
    "sequence_bias": [[[5], 1.0]],
    "exponential_decay_length_penalty": (2, 1.5),
    "top_p": 0.5,
    "typical_p": 0.5,
    "min_p": 0.5,
    "top_h": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "assistant_ensemble_weight": 0.5,
}
OTHERS = sorted(
    name
    for name in vars(GenerationConfig())
    if name not in (*HONOURED_OPTIONS, *NOT_OF_THE_TEXT) and not name.startswith("_")
)


@pytest.fixture
def prompts() -> torch.LongTensor:
    return torch.randint(4, 64, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def variant() -> str:
    return "attention"  # options are the same for both


def test_the_honoured_options_are_some_that_transformers_knows():
    assert set(HONOURED_OPTIONS) <= set(vars(GenerationConfig()))
    assert not set(NEUTRAL_VALUES) & set(HONOURED_OPTIONS)
    assert set(NEUTRAL_VALUES) <= set(OTHERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_option_is_refused_by_name(tiny_model, prompts, name):
    value = VALUES.get(name, 3)
    with pytest.raises(ValueError, match=rf"{name}=.*no option of YAN"):
        tiny_model.generate(prompts, **{name: value})
    if name != "continuous_batching_config":  # no longer saved, nor compared
        with pytest.raises(ValueError, match=rf"{name}=.*no option of YAN"):
            tiny_model.generate(prompts, GenerationConfig(**{name: value}))


@pytest.mark.parametrize("name", [*OTHERS, *STOCK_ARGUMENTS])
def test_none_asks_for_nothing(tiny_model, prompts, name):
    assert torch.equal(tiny_model.generate(prompts, **{name: None}), tiny_model.generate(prompts))


@pytest.mark.parametrize("name", STOCK_ARGUMENTS)
def test_other_arguments_of_stock_generate_are_refused_by_name(tiny_model, prompts, name):
    with pytest.raises(ValueError, match=f"{name}='something'"):
        tiny_model.generate(prompts, **{name: "something"})


def test_an_option_of_a_transformers_to_come_is_refused(tiny_model, prompts):
    """A config keeps what it does not know, which might be a field of a later version, or a typo."""
    passed = GenerationConfig(max_new_tokens=3, option_to_come=0.5)
    with pytest.raises(ValueError, match=r"option_to_come=0\.5: no option of YAN"):
        tiny_model.generate(prompts, passed)
    tiny_model.generation_config.num_flow_stepz = 3
    with pytest.raises(ValueError, match="num_flow_stepz=3"):
        tiny_model.generate(prompts)


def test_a_config_full_of_general_defaults_asks_for_nothing(tiny_model, prompts):
    defaults = GenerationConfig._get_default_generation_params()
    passed = GenerationConfig(**{**defaults, "max_length": None})
    assert torch.equal(tiny_model.generate(prompts, passed), tiny_model.generate(prompts))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_may_be_mentioned(tiny_model, prompts, use_cache):
    assert torch.equal(tiny_model.generate(prompts, use_cache=use_cache), tiny_model.generate(prompts))


def test_without_compilation_wherever_that_is_said(tiny_model, prompts, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    tokens = tiny_model.generate(prompts, compile_config=CompileConfig(), disable_compile=True)
    assert torch.equal(tokens, tiny_model.generate(prompts))


def test_a_program_is_for_one_shape_unless_another_is_asked_for():
    assert [_compiler_settings(CompileConfig(dynamic=dynamic))["dynamic"] for dynamic in (None, False, True)] == [
        False,
        False,
        True,
    ]


def test_the_old_switch_of_compilation_works(tiny_model, prompts, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiled.append(settings) or function)
    monkeypatch.setattr(generation_yan, "_programs", {})
    tokens = tiny_model.generate(prompts, compile_generation=True)
    assert torch.equal(tokens, tiny_model.generate(prompts, compile_generation=False))
    assert len(compiled) == 1
    old = YanGenerationConfig(compile_generation=True)
    assert old.compile_config == CompileConfig()
    tiny_model.generate(prompts, old, compile_generation=False)
    assert len(compiled) == 1
    old.compile_generation = False
    assert (old.compile_config, old.compile_generation) == (None, False)
    old.update(compile_generation=True)
    assert old.compile_config == CompileConfig()


def test_a_solver_is_no_option_any_more(tiny_model, prompts):
    assert torch.equal(tiny_model.generate(prompts, solver="euler"), tiny_model.generate(prompts))
    for call in (lambda: tiny_model.generate(prompts, solver="heun"), lambda: YanGenerationConfig(solver="heun")):
        with pytest.raises(ValueError, match=r"solver='heun': must be 'euler', or left out; version 0\.2"):
            call()


def test_generate_has_seven_options_of_its_own():
    assert set(vars(YanGenerationConfig())) - set(vars(GenerationConfig())) == set(FLOW_FIELDS)
    assert len(FLOW_FIELDS) == 7


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_time", -1, "a number of seconds, at least 0"),
        ("max_time", "1", "a number of seconds, at least 0"),
        ("stop_strings", [""], "a string or a list of strings, none of them empty"),
        ("stop_strings", [5], "a string or a list of strings, none of them empty"),
    ],
)
def test_honoured_options_are_checked(tiny_model, prompts, name, value, allowed):
    with pytest.raises(ValueError, match=f"{name}=.*: must be {allowed}"):
        tiny_model.generate(prompts, **{name: value})
    with pytest.raises(ValueError, match=f"{name}=.*: must be {allowed}"):
        YanGenerationConfig(**{name: value})
