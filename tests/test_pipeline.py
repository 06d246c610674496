"""`pipeline("text-generation")` on a saved folder gives exactly what `generate` gives."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, pipeline

from modeling_yan import YanForFlowGeneration
from modeling_yan.data import generate_stories, train_tokenizer

BUNDLED = {"attention": "yan-transformer-tiny", "mamba": "yan-mamba-tiny"}
CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"
SENTENCES = ["The cat sat on the mat.", "Where is the dog?", "Mary is in the garden.", "John has the red apple."]
PROMPTS = ["The cat sat on", "Where is", "Mary"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES * 4, vocab_size=300)


@pytest.fixture
def model(make_model, tokenizer) -> YanForFlowGeneration:
    """A model whose text depends on the prompt, is printable, and now and then ends."""
    model = make_model(vocab_size=len(tokenizer), initializer_range=0.3)
    nn.init.normal_(model.flow.modulation.proj.weight, std=0.1)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    model.lm_head.bias.data[[not (text.isascii() and text.isprintable()) for text in texts]] = -1e4
    model.lm_head.bias.data[tokenizer.eos_token_id] = 4.0
    return model


@pytest.fixture
def write(model, tokenizer, tmp_path):
    """The pipeline, from a path."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return pipeline("text-generation", model=str(tmp_path))


def new_texts(model, tokenizer, prompts, **options) -> list[str]:
    """The texts that `generate` writes, without the prompts."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**batch, **options)
    return tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def texts(answers) -> list[str]:
    return [answer["generated_text"] for answer in answers]


def test_the_pipeline_holds_the_saved_model_and_tokenizer(write, tokenizer):
    assert type(write.model) is YanForFlowGeneration
    assert write.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_single_prompt_with_and_without_itself(write, model, tokenizer):
    (new,) = new_texts(model, tokenizer, PROMPTS[:1])
    assert texts(write(PROMPTS[0])) == [PROMPTS[0] + new]
    assert texts(write(PROMPTS[0], return_full_text=True)) == [PROMPTS[0] + new]
    assert texts(write(PROMPTS[0], return_full_text=False)) == [new]
    assert new


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("return_full_text", [True, False])
def test_a_list_of_prompts(write, model, tokenizer, batch_size, return_full_text):
    answers = write(PROMPTS, batch_size=batch_size, return_full_text=return_full_text)
    new = new_texts(model, tokenizer, PROMPTS)
    expected = [prompt * return_full_text + text for prompt, text in zip(PROMPTS, new)]
    assert [texts(answer) for answer in answers] == [[text] for text in expected]
    assert len(set(new)) == len(PROMPTS)


def test_its_token_ids_are_those_of_generate(write, model, tokenizer):
    (answer,) = write(PROMPTS[0], return_tensors=True)
    output = model.generate(**tokenizer(PROMPTS[0], return_tensors="pt"))
    assert answer["generated_token_ids"] == output[0].tolist()


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_max_new_tokens(write, model, tokenizer, num_tokens):
    model.lm_head.bias.data[tokenizer.eos_token_id] = -1e4
    write.model.load_state_dict(model.state_dict())
    (answer,) = write(PROMPTS[0], max_new_tokens=num_tokens, return_tensors=True)
    assert len(answer["generated_token_ids"]) == len(tokenizer(PROMPTS[0]).input_ids) + num_tokens
    answers = write(PROMPTS, max_new_tokens=num_tokens, batch_size=2, return_full_text=False)
    new = new_texts(model, tokenizer, PROMPTS, max_new_tokens=num_tokens)
    assert [texts(answer) for answer in answers] == [[text] for text in new]


@pytest.mark.parametrize("way", [{"do_sample": True, "seed": 4}, {"expert_choice": "ranked"}], ids=["drawn", "ranked"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2]])
def test_several_sequences_a_prompt(write, model, tokenizer, prompts, way):
    options = {**way, "num_return_sequences": 3}
    answers = write(prompts, batch_size=len(prompts), return_full_text=False, **options)
    new = new_texts(model, tokenizer, prompts, **options)
    assert [texts(answer) for answer in answers] == [new[3 * index : 3 * index + 3] for index in range(len(prompts))]
    assert len(set(new)) > len(prompts)


def test_sampling_repeats_with_the_global_seed(write):
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(write(PROMPTS[0], do_sample=True, return_tensors=True))
    assert answers[0] == answers[1] != answers[2]


def test_without_options_it_is_deterministic_and_one_canvas_long(write, model):
    first = write(PROMPTS, return_tensors=True)
    torch.manual_seed(1)
    assert write(PROMPTS, return_tensors=True) == first
    new = [
        len(answer[0]["generated_token_ids"]) - len(write.tokenizer(p).input_ids) for answer, p in zip(first, PROMPTS)
    ]
    assert all(0 < length <= model.config.canvas_length for length in new)


def test_the_models_own_options_reach_the_pipeline(model, tokenizer, tmp_path):
    model.generation_config.num_flow_steps = 1
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path))
    new = new_texts(model, tokenizer, PROMPTS[:1], num_flow_steps=1, max_new_tokens=5)
    assert texts(write(PROMPTS[0], return_full_text=False)) == new


def test_options_of_the_flow_reach_generate(write, model, tokenizer):
    options = {"num_flow_steps": 5, "eos_strategy": "first", "expert_choice": "mixture"}
    new = new_texts(model, tokenizer, PROMPTS[:1], **options)
    assert texts(write(PROMPTS[0], return_full_text=False, **options)) == new
    assert new != new_texts(model, tokenizer, PROMPTS[:1])


def test_a_generation_config_reaches_generate(write, model, tokenizer):
    new = new_texts(model, tokenizer, PROMPTS[:1], max_new_tokens=5)
    options = GenerationConfig(max_new_tokens=5)
    assert texts(write(PROMPTS[0], return_full_text=False, generation_config=options)) == new


def test_an_empty_prompt_stands_for_one_bos(write, model, tokenizer):
    output = model.generate(torch.tensor([[tokenizer.bos_token_id]]))
    (answer,) = write("")
    assert answer["generated_text"] == tokenizer.decode(output[0], skip_special_tokens=True)


def test_a_stop_sequence_ends_the_text(write):
    (whole,) = texts(write(PROMPTS[0], return_full_text=False))
    stop = whole[2]
    assert texts(write(PROMPTS[0], return_full_text=False, stop_sequence=stop)) == [whole[: whole.index(stop) + 1]]


def test_details_come_along(write):
    (answer,) = write(PROMPTS[0], return_dict_in_generate=True)
    assert set(answer) > {"generated_text", "tokens_per_forward"}


class TestLongPrompts:
    """The tokenizers beside a model know how long its prompts may be, so that one long row need not end a run."""

    LONG, SHORT = "Mary went to the garden. " * 60 + "Where is Mary?", "Where is Mary? Mary went to the garden."

    LIMIT = 128 - 8  # positions, answer slots

    @pytest.fixture
    def bundled(self, variant):
        return pipeline("text-generation", model=str(CHECKPOINTS / BUNDLED[variant]))

    def test_the_tokenizer_has_the_models_limit(self, bundled):
        assert bundled.tokenizer.model_max_length == bundled.model.config.max_prompt_length == self.LIMIT

    @pytest.mark.parametrize("options", [{"truncation": True}, {"handle_long_generation": "hole"}], ids=str)
    def test_a_long_row_among_others(self, bundled, options):
        options = {**options, "return_full_text": False, "max_new_tokens": 8}
        room = self.LIMIT if "truncation" in options else self.LIMIT - 8
        kept = torch.tensor([bundled.tokenizer(self.LONG).input_ids[-room:]])  # its end, as in training
        expected = bundled.tokenizer.decode(bundled.model.generate(kept, max_new_tokens=8, return_prompt=False)[0])
        answers = bundled([self.SHORT, self.LONG], batch_size=2, **options)
        assert texts(answers[0]) == texts(bundled(self.SHORT, **options))
        assert texts(answers[1]) == [expected.replace("</s>", "").replace("<pad>", "")]

    def test_otherwise_it_is_refused(self, bundled):
        with pytest.raises(ValueError, match=r"the prompt has .* tokens: must be 1 to max_position_embeddings=128"):
            bundled([self.SHORT, self.LONG])


@pytest.mark.parametrize("end", ["\n", " "], ids=repr)
def test_a_prompt_may_end_in_what_parts_it_from_its_answer(variant, end):
    pipe = pipeline("text-generation", model=str(CHECKPOINTS / BUNDLED[variant]))
    rows = generate_stories(8, seed=3, max_sentences=3)
    answers = pipe([row["source"] + end for row in rows], batch_size=8)
    assert [texts(answer) for answer in answers] == [[row["source"] + end + row["target"]] for row in rows]
