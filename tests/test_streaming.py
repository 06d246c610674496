"""What `generate` does while it writes: streamers get drafts and tokens, and criteria stop it."""

import asyncio
import weakref

import pytest
import torch
from generating import new_tokens, recorded_calls
from transformers import AsyncTextIteratorStreamer, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer, TextDiffusionStreamer

from modeling_yan import YanForFlowGeneration, canvas_yan
from modeling_yan.data import train_tokenizer

CANVAS, VOCABULARY = 8, 64
PAD, EOS = 0, 2
DRAFT, CLEAR = "\033[33m", "\0338\033[J"  # what transformers' streamer prints before a draft, and to take it back


@pytest.fixture
def variant():
    """Streamers know nothing of mixers."""
    return "both"


@pytest.fixture
def model(make_lively_model) -> YanForFlowGeneration:
    return make_lively_model()


def write_eos_at(model, *places):
    """Make EOS the winner at these places of every canvas, and only there."""

    def raise_eos(module, args, logits):
        logits = logits.clone()
        logits[..., EOS] = -1e4
        logits[:, list(places), EOS] = 1e4
        return logits

    model.lm_head.register_forward_hook(raise_eos)


class Recorder(BaseStreamer):
    """Keeps all that a streamer is given, in order."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value))

    def put_draft(self, value, **kwargs):
        self.events.append(("draft", value))

    def end(self):
        self.events.append(("end", None))

    def of(self, kind) -> list[torch.Tensor]:
        return [value for event, value in self.events if event == kind]


class TestStreamer:
    def test_it_gets_prompt_drafts_tokens_and_the_end(self, model, prompts):
        recorder = Recorder()
        output = model.generate(prompts, streamer=recorder, num_flow_steps=3, max_new_tokens=CANVAS + 5)
        canvas = ["draft"] * 3 + ["put"]
        assert [event for event, _ in recorder.events] == ["put", *canvas, *canvas, "end"]
        assert torch.equal(torch.cat(recorder.of("put"), dim=1), output)

    def test_the_last_draft_is_the_canvas(self, model, prompts):
        recorder = Recorder()
        tokens = new_tokens(model, prompts, streamer=recorder, num_flow_steps=3)
        assert torch.equal(recorder.of("draft")[-1], tokens)
        assert not torch.equal(recorder.of("draft")[0], tokens)

    def test_a_draft_is_where_the_last_velocity_would_lead(self, model, prompts):
        recorder = Recorder()
        new_tokens(model, prompts, streamer=recorder, num_flow_steps=3)
        one_step = new_tokens(model, prompts, num_flow_steps=1)
        assert torch.equal(recorder.of("draft")[0], one_step)

    def test_points_of_the_path_are_let_go_unless_they_are_asked_for(self, model, prompts, monkeypatch):
        def most_alive(**options):
            points, counts, solve = [], [], canvas_yan.solve_flow

            def watch(velocity, x_0, num_steps, record):
                def watched(step, x):
                    record(step, x)
                    points.append(weakref.ref(x))
                    counts.append(sum(point() is not None for point in points))

                return solve(velocity, x_0, num_steps, watched)

            with monkeypatch.context() as patch:
                patch.setattr(canvas_yan, "solve_flow", watch)
                model.generate(prompts, num_flow_steps=20, **options)
            return max(counts)

        assert most_alive() <= 3
        assert most_alive(streamer=Recorder()) <= 3
        assert most_alive(return_dict_in_generate=True) == 20

    def test_a_streamer_changes_nothing(self, model, prompts):
        options = {"do_sample": True, "seed": 1, "max_new_tokens": 20}
        assert torch.equal(model.generate(prompts, streamer=Recorder(), **options), model.generate(prompts, **options))

    @pytest.fixture
    def tokenizer(self):
        return train_tokenizer(["The cat sat on the mat.", "The dog ran to the cat."] * 4, vocab_size=280)

    @pytest.fixture
    def text_model(self, make_lively_model, tokenizer):
        """A model that ends every text after five tokens."""
        model = make_lively_model(vocab_size=len(tokenizer))
        write_eos_at(model, *range(5, CANVAS))
        return model

    @pytest.mark.parametrize("streamer_class", [TextStreamer, TextDiffusionStreamer])
    def test_transformers_own_streamers_print_the_text(self, text_model, tokenizer, streamer_class, capsys):
        prompt = tokenizer("The cat", return_tensors="pt")
        streamer = streamer_class(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = text_model.generate(**prompt, streamer=streamer, num_flow_steps=3)
        printed = capsys.readouterr().out
        drafts, *_ = printed.rpartition(CLEAR)
        assert drafts.count(DRAFT) == (3 if streamer_class is TextDiffusionStreamer else 0)
        new_text = tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert printed.removeprefix(drafts).removeprefix(CLEAR).strip() == new_text.strip() != ""

    @pytest.mark.parametrize("streamer_class", [TextIteratorStreamer, AsyncTextIteratorStreamer])
    def test_transformers_iterators_give_the_text(self, make_lively_model, tokenizer, streamer_class):
        model, prompt = make_lively_model(vocab_size=len(tokenizer)), tokenizer("The cat", return_tensors="pt")

        async def collect():
            streamer = streamer_class(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
            call = asyncio.to_thread(model.generate, **prompt, streamer=streamer, max_new_tokens=20)
            if streamer_class is AsyncTextIteratorStreamer:
                task = asyncio.create_task(call)
                return "".join([piece async for piece in streamer]), await task
            output = await call
            return "".join(streamer), output

        text, output = asyncio.run(collect())
        new = output[0, prompt.input_ids.shape[1] :]
        assert len(new) == 20  # of three canvases
        assert text == tokenizer.decode(new, skip_special_tokens=True) != ""


class StopBehind(StoppingCriteria):
    """Stops a row behind a token, and keeps what it was asked about."""

    def __init__(self, token):
        self.token, self.asked = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.clone())
        return input_ids[:, -1] == self.token


class TestStoppingCriteria:
    def test_a_row_is_padded_behind_the_token_where_it_stops(self, model, prompts):
        written = new_tokens(model, prompts, max_new_tokens=12)
        token = int(written[0, 4])
        stopped = new_tokens(model, prompts, max_new_tokens=12, stopping_criteria=[StopBehind(token)])
        for row, tokens in zip(stopped, written, strict=True):
            places = (tokens == token).nonzero().flatten().tolist()
            end = places[0] + 1 if places else 12
            assert row.tolist() == [*tokens[:end].tolist(), *[PAD] * (stopped.shape[1] - end)]

    def test_padding_behind_the_stop_counts_as_no_token(self, model, prompts):
        token = int(new_tokens(model, prompts, max_new_tokens=12)[0, 4])
        options = {"max_new_tokens": 12, "stopping_criteria": [StopBehind(token)], "return_dict_in_generate": True}
        output = model.generate(prompts, **options)
        written = output.sequences[:, prompts.shape[1] :]
        is_end = (written == token) | (written == model.config.eos_token_id)
        ends = torch.where(is_end.any(1), is_end.long().argmax(1) + 1, 12)
        assert ends[0] <= 5
        assert (output.tokens_per_forward * output.num_trunk_passes).round().tolist() == ends.tolist()

    def test_they_are_asked_as_if_tokens_were_written_one_by_one(self, model, prompts):
        criterion = StopBehind(VOCABULARY)
        sequences = model.generate(prompts, max_new_tokens=12, stopping_criteria=[criterion])
        assert [ids.shape[1] for ids in criterion.asked] == list(range(8, 20))
        assert all(torch.equal(ids, sequences[:, : ids.shape[1]]) for ids in criterion.asked)

    def test_no_canvas_follows_when_all_rows_have_stopped(self, model, prompts):
        def stop(input_ids, scores):
            return True  # one answer for all rows, as some criteria give

        with recorded_calls(model.flow) as calls, recorded_calls(model.model) as encoded:
            sequences = model.generate(prompts, max_new_tokens=3 * CANVAS, stopping_criteria=[stop])
        assert not calls
        assert len(encoded) == 1
        assert (sequences[:, 8:] == PAD).all()

    def test_they_may_be_empty(self, model, prompts):
        assert torch.equal(model.generate(prompts, stopping_criteria=[]), model.generate(prompts))
