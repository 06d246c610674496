"""The options of `generate`: who decides, what is remembered, and what is refused."""

import pytest
import torch
import transformers
from generating import new_tokens
from transformers import GenerationConfig

from modeling_yan import YanForFlowGeneration, YanGenerationConfig

CANVAS, POSITIONS, VOCABULARY, EXPERTS = 8, 48, 64, 4
PAD, EOS = 0, 2


@pytest.fixture
def variant():
    """Options know nothing of mixers."""
    return "both"


@pytest.fixture
def model(make_lively_model) -> YanForFlowGeneration:
    return make_lively_model()


class TestOptions:
    def test_keyword_beats_passed_config_beats_model_beats_default(self, model, prompts):
        def num_passes(**options):
            return model.generate(prompts, return_dict_in_generate=True, **options).num_trunk_passes

        passed = YanGenerationConfig(num_flow_steps=4)
        assert num_passes() == 3
        model.generation_config.num_flow_steps = 5
        assert num_passes() == 5
        assert num_passes(generation_config=passed) == 4
        assert num_passes(generation_config=passed, num_flow_steps=2) == 2

    def test_what_a_passed_config_leaves_open_comes_from_the_model(self, model, prompts):
        model.generation_config.max_new_tokens = 3
        model.generation_config.return_prompt = False
        passed = YanGenerationConfig(num_flow_steps=2)
        output = model.generate(prompts, generation_config=passed, return_dict_in_generate=True)
        assert output.sequences.shape[1] == 3
        assert output.num_trunk_passes == 2

    def test_a_plain_generation_config_works(self, model, prompts):
        passed = GenerationConfig(max_new_tokens=5)
        assert torch.equal(model.generate(prompts, passed), model.generate(prompts, max_new_tokens=5))

    def test_generate_leaves_the_configs_alone(self, model, prompts):
        passed = YanGenerationConfig(num_flow_steps=2)
        before = model.generation_config.to_dict(), passed.to_dict()
        model.generate(prompts, generation_config=passed, max_new_tokens=3, do_sample=True, seed=4)
        assert (model.generation_config.to_dict(), passed.to_dict()) == before

    def test_a_saved_generation_config_keeps_every_field(self, model, tmp_path):
        fields = {
            "num_flow_steps": 5,
            "eos_strategy": "first",
            "expert_choice": "mixture",
            "canvas_length": 6,
            "seed": 9,
        }
        fields |= {"do_sample": True, "temperature": 0.5, "max_new_tokens": 13}
        options = YanGenerationConfig(**fields, return_prompt=False)
        options.save_pretrained(tmp_path)
        loaded = YanGenerationConfig.from_pretrained(tmp_path).to_dict()
        assert {name: loaded[name] for name in fields} == fields
        assert loaded["return_prompt"] is None  # a pipeline would cut the answer off
        assert options.return_prompt is False

    def test_lengths_count_what_is_returned(self, model, prompts):
        with_prompt = model.generate(prompts, max_length=prompts.shape[1] + 3)
        alone = model.generate(prompts, max_length=3, return_prompt=False)
        assert torch.equal(alone, with_prompt[:, prompts.shape[1] :])
        assert model.generate(prompts, min_length=8, return_prompt=False).shape[1] == 8

    def test_no_temperature_is_that_of_one(self, model, prompts):
        texts = [model.generate(prompts, do_sample=True, seed=1, temperature=value) for value in (None, 1.0)]
        assert torch.equal(*texts)

    def test_one_suppressed_token_needs_no_list(self, model, prompts):
        texts = [model.generate(prompts, suppress_tokens=value) for value in (7, [7])]
        assert torch.equal(*texts)

    def test_a_models_generation_config_survives_its_checkpoint(self, model, prompts, tmp_path):
        model.generation_config.num_flow_steps = 5
        model.generation_config.eos_strategy = "first"
        model.generation_config.max_new_tokens = 11
        model.save_pretrained(tmp_path)
        loaded = YanForFlowGeneration.from_pretrained(tmp_path)
        assert isinstance(loaded.generation_config, YanGenerationConfig)
        assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
        output = loaded.generate(prompts, return_dict_in_generate=True)
        assert output.num_trunk_passes == 10
        assert torch.equal(output.sequences, model.generate(prompts))

    def test_a_checkpoint_without_generation_config_has_the_defaults(self, model, prompts, tmp_path):
        expected = model.generate(prompts)
        model.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        loaded = YanForFlowGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded.generate(prompts), expected)
        assert not loaded.generation_config.do_sample
        loaded.save_pretrained(tmp_path)
        assert torch.equal(YanForFlowGeneration.from_pretrained(tmp_path).generate(prompts), expected)


class TestRememberedOptions:
    """Options that the last call had, too, are not worked out anew; whatever changes is noticed."""

    def test_what_changes_between_calls_counts(self, model, prompts):
        def passes(**options):
            return model.generate(prompts, return_dict_in_generate=True, **options).num_trunk_passes

        assert [passes(), passes(num_flow_steps=2), passes(), passes(num_flow_steps=2)] == [3, 2, 3, 2]
        model.generation_config.num_flow_steps = 4
        assert [passes(), passes()] == [4, 4]
        model.generation_config.num_flow_steps = None
        model.config.num_flow_steps = 1
        assert [passes(), passes(canvas_length=CANVAS // 2), passes()] == [1, 2, 1]

    def test_a_list_that_grows_counts(self, model, prompts):
        model.generation_config.suppress_tokens = [5]
        first = new_tokens(model, prompts)
        model.generation_config.suppress_tokens.append(int(first[0, 0]))
        assert not (new_tokens(model, prompts) == first[0, 0]).any()

    def test_the_own_length_counts(self, model, prompts):
        assert new_tokens(model, prompts).shape == new_tokens(model, prompts).shape == (6, CANVAS)
        model.generation_config.max_new_tokens = 3
        assert new_tokens(model, prompts).shape == (6, 3)

    def test_refusals_are_repeated(self, model, prompts):
        model.generate(prompts, canvas_length=1)
        for _ in range(2):
            with pytest.raises(ValueError, match="canvas_length=True"):
                model.generate(prompts, canvas_length=True)
            with pytest.raises(ValueError, match="num_beams"):
                model.generate(prompts, num_beams=2)

    def test_every_call_without_a_seed_draws_one(self, model, prompts):
        first, second = (new_tokens(model, prompts, do_sample=True) for _ in range(2))
        assert not torch.equal(first, second)


AUTOREGRESSIVE = {
    "num_beams": 2,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.5,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[5]],
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "guidance_scale": 2.0,
    "penalty_alpha": 0.5,
    "prompt_lookup_num_tokens": 1,
    "output_scores": True,
    "logits_processor": [lambda ids, scores: scores],
    "prefix_allowed_tokens_fn": lambda batch, ids: [5],
}


class TestRefusals:
    @pytest.mark.parametrize("name", AUTOREGRESSIVE)
    def test_options_of_autoregressive_decoding(self, model, prompts, name):
        with pytest.raises(ValueError, match=name):
            model.generate(prompts, **{name: AUTOREGRESSIVE[name]})

    @pytest.mark.parametrize("name", ["num_beams", "top_k", "repetition_penalty", "no_repeat_ngram_size"])
    def test_also_in_a_passed_config(self, model, prompts, name):
        passed = YanGenerationConfig(do_sample=True, **{name: AUTOREGRESSIVE[name]})
        with pytest.raises(ValueError, match=name):
            model.generate(prompts, generation_config=passed)

    def test_also_in_the_models_config(self, model, prompts):
        model.generation_config.num_beams = 2
        with pytest.raises(ValueError, match="num_beams"):
            model.generate(prompts)

    def test_their_neutral_values_are_accepted(self, model, prompts):
        neutral = {"num_beams": 1, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "stop_strings": None}
        neutral |= {"logits_processor": [], "output_scores": False, "assistant_model": None}
        assert torch.equal(model.generate(prompts, **neutral), model.generate(prompts))

    def test_the_message_is_short(self, model, prompts):
        for options in ({"assistant_model": model}, {"suppress_tokens": list(range(10**6, 10**6 + 999))}):
            with pytest.raises(ValueError, match=next(iter(options))) as error:
                model.generate(prompts, **options)
            assert len(str(error.value)) < 200

    def test_a_typo_is_named(self, model, prompts):
        with pytest.raises(ValueError, match="num_flow_stepz"):
            model.generate(prompts, num_flow_stepz=3)

    def test_several_sequences_need_sampling(self, model, prompts):
        with pytest.raises(ValueError, match="num_return_sequences=2: must be 1 unless"):
            model.generate(prompts, num_return_sequences=2)
        with pytest.raises(ValueError, match="num_return_sequences=0: must be an integer of at least 1"):
            model.generate(prompts, num_return_sequences=0)
        with pytest.raises(ValueError, match=f"num_return_sequences={EXPERTS + 1}: must be at most num_experts"):
            model.generate(prompts, expert_choice="ranked", num_return_sequences=EXPERTS + 1)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_flow_steps", 0),
            ("num_flow_steps", 2.5),
            ("expert_choice", "best"),
            ("canvas_length", 0),
            ("canvas_length", POSITIONS + 1),
            ("seed", 0.5),
            ("compile_config", "yes"),
            ("max_new_tokens", 0),
        ],
    )
    def test_wrong_values_are_named(self, model, prompts, name, value):
        with pytest.raises(ValueError, match="the canvas" if value == POSITIONS + 1 else name):
            model.generate(prompts, **{name: value})

    def test_embeddings_are_for_forward(self, model, prompts):
        with pytest.raises(ValueError, match="generate has no argument inputs_embeds: it takes token ids alone"):
            model.generate(inputs_embeds=model.get_input_embeddings()(prompts))

    def test_a_negative_temperature(self, model, prompts):
        with pytest.raises(ValueError, match="temperature"):
            model.generate(prompts, do_sample=True, temperature=-0.5)

    @pytest.mark.parametrize("name", ["num_flow_steps", "canvas_length"])
    def test_a_generation_config_checks_itself(self, name):
        with pytest.raises(ValueError, match=name):
            YanGenerationConfig(**{name: -1})

    def test_a_max_length_within_the_prompt(self, model, prompts):
        with pytest.raises(ValueError, match="max_length=7"):
            model.generate(prompts, max_length=7)

    @pytest.mark.parametrize(
        "name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
    )
    def test_continuous_batching(self, model, prompts, name):
        with pytest.raises(NotImplementedError, match="call generate"):
            getattr(model, name)(prompts.tolist())

    def test_the_prompt_twice(self, model, prompts):
        with pytest.raises(ValueError, match="twice"):
            model.generate(prompts, input_ids=prompts)


# --- masks


def test_a_prompt_of_pad_tokens_that_are_meant_brings_no_warning(model, prompts, monkeypatch):
    warnings = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", warnings.append)
    prompts[0, -1] = PAD
    model.generate(prompts, attention_mask=torch.ones_like(prompts))
    assert not warnings
    model(prompts, labels=prompts.flip(1))
    assert "attention_mask" in warnings[0]  # where nobody said that they are meant


@pytest.mark.parametrize("cast", [lambda mask: mask.bool(), lambda mask: mask.float()])
def test_a_mask_of_ones_and_zeros_may_have_any_type(model, prompts, cast):
    mask = torch.ones_like(prompts)
    mask[0, 4:] = mask[1, 2:] = 0
    assert torch.equal(
        model.generate(prompts, attention_mask=cast(mask)), model.generate(prompts, attention_mask=mask)
    )
