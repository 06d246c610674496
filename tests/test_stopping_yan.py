"""Stop strings end a text, and no canvas is begun when time is up."""

import pytest
import torch
from torch import nn
from transformers import StoppingCriteria

from modeling_yan import stopping_yan
from modeling_yan.data import train_tokenizer
from modeling_yan.stopping_yan import Deadline

CANVAS, EOS = 8, 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The cat sat on the mat.", "The dog ran to the cat."] * 4, vocab_size=280)


@pytest.fixture
def model(make_model, tokenizer):
    """A model that writes text without end, and other tokens from canvas to canvas."""
    model = make_model(vocab_size=len(tokenizer), initializer_range=0.3)
    nn.init.normal_(model.flow.modulation.proj.weight, std=0.1)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    model.lm_head.bias.data[[not (text.isascii() and text.isprintable() and text) for text in texts]] = -1e4
    model.lm_head.bias.data[tokenizer.all_special_ids] = -1e4
    return model


@pytest.fixture
def batch(tokenizer):
    return tokenizer(["The cat sat", "dog", "on the mat"], return_tensors="pt", padding=True)


class TestStopStrings:
    def test_a_text_ends_behind_the_first_of_them(self, model, tokenizer, batch):
        options = {"max_new_tokens": 3 * CANVAS, "return_prompt": False}
        free = model.generate(**batch, **options)
        whole = tokenizer.decode(free[0])
        stop = whole[5:7]
        stopped = model.generate(**batch, **options, stop_strings=stop, tokenizer=tokenizer)
        for row, before in zip(stopped, free, strict=True):
            kept = row[row != tokenizer.pad_token_id]
            assert torch.equal(kept, before[: len(kept)])
            text, rest = tokenizer.decode(kept), tokenizer.decode(before)
            assert (stop in text) == (stop in rest)
            assert stop not in tokenizer.decode(kept[:-1])
        assert len(tokenizer.decode(stopped[0], skip_special_tokens=True)) < len(whole)

    def test_no_canvas_follows(self, model, tokenizer, batch):
        options = {"max_new_tokens": 3 * CANVAS, "return_dict_in_generate": True}
        first = tokenizer.decode(model.generate(batch.input_ids[2:], return_prompt=False)[0])
        stops = [first[:1], "never"]
        output = model.generate(batch.input_ids[2:], stop_strings=stops, tokenizer=tokenizer, **options)
        assert output.num_trunk_passes == 3
        assert output.sequences.shape[1] == batch.input_ids.shape[1] + 1

    def test_also_in_the_models_own_options(self, model, tokenizer, batch):
        first = tokenizer.decode(model.generate(**batch, return_prompt=False)[0])
        model.generation_config.stop_strings = [first[0]]
        assert model.generate(**batch, return_prompt=False, tokenizer=tokenizer)[0, 1:].eq(0).all()
        with pytest.raises(ValueError, match=r"stop_strings=.*: tokenizer"):
            model.generate(**batch)

    def test_they_need_a_tokenizer(self, model, batch):
        with pytest.raises(ValueError, match=r"stop_strings=\['x'\]: tokenizer=..., the model's tokenizer, is needed"):
            model.generate(**batch, stop_strings=["x"])

    def test_a_tokenizer_alone_changes_nothing(self, model, tokenizer, batch):
        """`transformers serve` hands it in, always."""
        assert torch.equal(model.generate(**batch, tokenizer=tokenizer), model.generate(**batch))


class AfterThree(StoppingCriteria):
    """Any text of three tokens or more is done."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= 3)


def test_one_criterion_needs_no_list(model, batch):
    texts = [model.generate(batch.input_ids, stopping_criteria=given) for given in (AfterThree(), [AfterThree()])]
    assert torch.equal(*texts)
    assert texts[0].shape[1] < model.generate(batch.input_ids).shape[1]


class TestTime:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that goes one second on whenever it is read."""
        seconds = iter(range(1000))
        monkeypatch.setattr(stopping_yan.time, "monotonic", lambda: next(seconds))

    @pytest.mark.parametrize(("max_time", "num_canvases"), [(0, 1), (0.5, 1), (1.5, 2), (2.5, 3), (9, 4), (None, 4)])
    def test_the_canvas_that_was_begun_is_the_last_one(self, model, batch, clock, max_time, num_canvases):
        free = model.generate(**batch, max_new_tokens=4 * CANVAS)
        tokens = model.generate(**batch, max_new_tokens=4 * CANVAS, max_time=max_time)
        width = batch.input_ids.shape[1] + num_canvases * CANVAS
        assert torch.equal(tokens, free[:, :width])

    def test_the_time_of_every_call_is_its_own(self, model, batch, clock):
        widths = [model.generate(**batch, max_new_tokens=4 * CANVAS, max_time=1.5).shape[1] for _ in range(3)]
        assert widths == [batch.input_ids.shape[1] + 2 * CANVAS] * 3

    def test_without_a_limit_there_is_no_deadline(self):
        assert not Deadline(None).has_passed()
        assert Deadline(0).has_passed()
