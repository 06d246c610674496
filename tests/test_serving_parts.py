"""What `yan serve` is made of: requests that are read, batches that are written, and routes, without processes."""

import asyncio
import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import ANSWER, ANSWER_S, MODEL, PROMPT, PROMPTS, body

from modeling_yan import YanConfig, YanForAutoencoding
from modeling_yan.serving.requests import Job, Limits, RequestError, RequestReader
from modeling_yan.serving.settings import Settings, make_reader
from modeling_yan.serving.writing import BatchWriter, Text, group_jobs

serving = pytest.importorskip("modeling_yan.serving.server")
routes = pytest.importorskip("modeling_yan.serving.routes")


@pytest.fixture(scope="module")
def model(bundled_model):
    return bundled_model


@pytest.fixture(scope="module")
def tokenizer(bundled_tokenizer):
    return bundled_tokenizer


@pytest.fixture(scope="module")
def reader(tokenizer):
    return RequestReader(tokenizer, Limits(prompt_tokens=88), new_tokens=40)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt: must be given"),
        ({"prompt": []}, r"prompt=\[\]: must be a string or a list of strings"),
        ({"prompt": [1, 2]}, "token ids are not supported"),
        ({"prompt": "apple " * 100}, "prompt: has .* tokens, must have at most 88"),
        ({"max_tokens": 0}, "max_tokens=0: must be an integer from 1 to 1024"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"temperature": 3}, "temperature=3: must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"n": 2}, "n=2: must be 1 unless temperature is above 0"),
        ({"n": 8, "temperature": 1, "prompt": PROMPTS}, "32 texts: a request may ask for 16"),
        ({"stop": [""]}, "stop="),
        ({"seed": "x"}, "seed='x'"),
        ({"stream": 1}, "stream=1: must be true or false"),
        ({"top_p": 0.5}, "top_p=0.5: not supported"),
        ({"logprobs": 0}, "logprobs=0: not supported"),
        ({"echo": True}, "echo=True: not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5: not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias=.*: not supported"),
        ({"num_flow_steps": 65}, "num_flow_steps=65: must be an integer from 0 to 64"),
        ({"max_tokns": 5}, "'max_tokns': no field of this server"),
        ({"generation_config": "{"}, "generation_config='{'"),
        ({"generation_config": "[" * 100_000}, "generation_config='.*': must be a JSON object"),
        ({"\ud800": 5}, "no field of this server"),
        ({"generation_config": '{"num_beams": 4}'}, "generation_config: 'num_beams' is not supported"),
        ({"generation_config": '{"max_new_tokens": 5000}'}, "max_tokens=5000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_request_that_is_wrong_is_told_which_field_and_what_is_allowed(reader, fields, message):
    with pytest.raises(RequestError, match=message):
        reader.completion(body(**fields))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000], ids="empty cut list bytes deep".split())
def test_a_body_that_is_no_object_is_refused(reader, text):
    with pytest.raises(RequestError, match="the body"):
        reader.completion(text)


@pytest.mark.parametrize(
    "messages", ["x", [], [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": [1]}]]
)
def test_messages_that_are_wrong_are_refused(reader, messages):
    with pytest.raises(RequestError, match="messages="):
        reader.chat(json.dumps({"messages": messages}).encode())


def test_fields_that_ask_for_nothing_are_accepted(reader, tokenizer):
    neutral = {"top_p": 1, "n": 1, "echo": False, "logprobs": None, "logit_bias": {}, "user": "me", "tools": []}
    _, jobs = reader.completion(body(**neutral))
    settings = (("max_new_tokens", 40), ("do_sample", False))
    assert jobs == [Job(tuple(tokenizer(PROMPT)["input_ids"]), settings)]


def test_what_transformers_chat_sends_is_understood(reader):
    config = '{"do_sample": true, "max_new_tokens": 30, "transformers_version": "5.24.0"}'
    _, jobs = reader.completion(body(generation_config=config))
    drawn = {"do_sample": True, "temperature": 1.0, "num_return_sequences": 1, "seed": None}
    assert dict(jobs[0].settings) == {"max_new_tokens": 30, **drawn}


def test_drawn_texts_with_a_seed_are_written_alone():
    def job(**settings):
        return Job((1,), tuple(settings.items()))

    jobs = [job(seed=1), job(seed=None), job(seed=1), job(seed=None), job(do_sample=False), job(do_sample=False)]
    assert group_jobs(jobs) == [[0], [1, 3], [2], [4, 5]]


def jobs_for(reader, prompts, **fields):
    return reader.completion(json.dumps({"prompt": prompts, **fields}).encode())[1]


def collect_all(writer, jobs) -> list[dict]:
    """The last piece of each job."""
    last = [{}] * len(jobs)
    for pieces in writer.write(jobs):
        last = [found[-1] if found else before for found, before in zip(pieces, last, strict=True)]
    return last


def collect(writer, jobs) -> list[str]:
    """The whole texts of jobs of one text each."""
    texts = [""] * len(jobs)
    for round_ in writer.write(jobs):
        for number, pieces in enumerate(round_):
            texts[number] += "".join(piece.get("text", "") for piece in pieces)
    return texts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{"num_flow_steps": 1}, {"canvas_length": 3, "max_tokens": 8}])
def test_a_batch_equals_its_prompts_alone(model, tokenizer, reader, write, stream, options):
    options = dict(options)
    jobs = jobs_for(reader, PROMPTS, stream=stream, **options)
    options["max_new_tokens"] = options.pop("max_tokens", 40)
    assert collect(BatchWriter(model, tokenizer), jobs) == [write(prompt, **options) for prompt in PROMPTS]


def test_a_stream_comes_canvas_by_canvas_with_its_drafts(model, tokenizer, reader):
    jobs = jobs_for(reader, PROMPT, stream=True, drafts=True, canvas_length=3, num_flow_steps=2, max_tokens=8)
    pieces = [round_[0][0] for round_ in BatchWriter(model, tokenizer).write(jobs) if round_[0]]
    kinds = ["draft" if "draft" in piece else "text" for piece in pieces]
    assert kinds == ["draft", "draft", "text"] * 3
    assert "".join(piece.get("text", "") for piece in pieces).startswith("The")
    assert [piece["finish"] for piece in pieces if "finish" in piece] == [None, None, "length"]


def test_a_seed_draws_the_same_texts_whatever_else_is_asked_for(model, tokenizer, reader, write):
    drawn = {"temperature": 1.0, "seed": 5}
    jobs = jobs_for(reader, PROMPTS[:2], temperature=1.0) + jobs_for(reader, PROMPTS[:2], **drawn)
    texts = collect(BatchWriter(model, tokenizer), jobs)[2:]
    assert texts == [write(prompt, do_sample=True, **drawn) for prompt in PROMPTS[:2]]


def test_an_error_of_one_group_is_told_to_it_alone(model, tokenizer, reader):
    jobs = jobs_for(reader, PROMPT, expert_choice="best") + jobs_for(reader, PROMPT)
    found = list(BatchWriter(model, tokenizer).write(jobs))
    assert found[0][0][0]["status"] == 400
    assert "expert_choice='best'" in found[0][0][0]["error"]
    assert found[1][1][0]["text"] == ANSWER


def test_a_prompt_that_is_too_long_is_no_error_of_its_batch(model, tokenizer, reader):
    jobs = [*jobs_for(reader, [PROMPT]), Job((262,) * 200, jobs_for(reader, [PROMPT])[0].settings)]
    writer = BatchWriter(model, tokenizer)
    (answer, refused), (alone,) = collect_all(writer, jobs), collect_all(writer, jobs[:1])
    assert answer == alone
    assert "200 tokens" in refused["error"]


def test_an_empty_prompt_is_answered_as_in_a_batch(model, tokenizer, reader):
    empty, other = jobs_for(reader, ["", PROMPT], max_tokens=2)
    writer = BatchWriter(model, tokenizer)
    assert collect_all(writer, [empty]) == collect_all(writer, [empty, other])[:1]


def test_text_that_no_tokenizer_reads_is_refused(reader):
    with pytest.raises(RequestError, match="prompt: is no valid Unicode: surrogates not allowed"):
        reader.completion(b'{"prompt": "\\ud800"}')
    with pytest.raises(RequestError, match="messages: is no valid Unicode"):
        reader.chat(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')


def test_messages_that_a_template_refuses_are_an_error_of_the_request(tokenizer, reader, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="messages: the chat template refuses them: roles must alternate"):
        reader.chat(b'{"messages": [{"role": "user", "content": "hello"}]}')


def test_a_prompt_has_at_most_the_models_length_and_a_folder_needs_no_generation_config(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL, name), tmp_path)
    with pytest.raises(ValueError, match="must hold weights, and there are none"):
        make_reader(Settings(str(tmp_path)))
    shutil.copy(Path(MODEL, "model.safetensors"), tmp_path)
    reader = make_reader(Settings(str(tmp_path), max_prompt_tokens=5000))
    config = YanConfig.from_pretrained(MODEL)
    assert (reader.limits.prompt_tokens, reader.new_tokens) == (config.max_prompt_length, config.canvas_length)


def test_a_fault_in_the_middle_of_a_stream_is_told(model, tokenizer, reader, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("secret")

    writer = BatchWriter(model, tokenizer)
    monkeypatch.setattr(model, "generate", fail)
    for stream in (False, True):
        assert list(writer.write(jobs_for(reader, PROMPT, stream=stream))) == [
            [[{"error": "internal error", "status": 500}]]
        ]


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("stop", "canvases", "pieces", "finish"),
    [
        ((), ["ab", "cd"], ["ab", "cd"], "length"),
        (("bc",), ["ab", "cd"], ["a", ""], "stop"),
        (("bx",), ["ab", "cd"], ["a", "bcd"], "length"),
        (("cd", "b"), ["ab", "cd"], ["a"], "stop"),
    ],
)
def test_a_stop_string_is_cut_off_wherever_a_canvas_ends(stop, canvases, pieces, finish):
    text = Text(Letters(), set(), stop, limit=4)
    assert [text.extend(list(canvas.encode())) for canvas in canvases][: len(pieces)] == pieces
    assert text.finish == finish


def test_half_a_letter_waits_for_its_other_half():
    text, (first, second) = Text(Letters(), set(), (), limit=9), "é".encode()
    assert [text.extend([first]), text.extend([second]), text.extend([first], is_over=True)] == ["", "é", "\ufffd"]


def test_more_open_requests_than_allowed_are_refused(reader):
    server = serving.OpenAIRoutes(serving.Settings(MODEL, max_queue=2), reader)
    server.num_open = 2
    with pytest.raises(RequestError, match="2 requests are open") as caught:
        asyncio.run(anext(server._pieces(jobs_for(reader, PROMPT))))
    assert (caught.value.status, server.num_open) == (429, 2)


class Request:
    """A request whose body is not there, or has no end."""

    def __init__(self, *events):
        self.events = events

    async def stream(self):
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield event
        await asyncio.sleep(ANSWER_S)


@pytest.mark.parametrize(
    ("request_", "status"),
    [(Request(), 408), (Request(b"{", routes.ClientDisconnect()), 499), (Request(b"x" * 2**20, b"x"), 413)],
    ids=["slow", "gone", "large"],
)
def test_a_body_that_does_not_come_is_given_up(reader, request_, status):
    server = serving.OpenAIRoutes(serving.Settings(MODEL, timeout_s=0.05), reader)
    with pytest.raises(RequestError) as caught:
        asyncio.run(server._body(request_))
    assert caught.value.status == status


class Engine:
    """LitServe as the routes see it: a queue, and replicas that do with a job what a test wants."""

    def __init__(self, *replies):
        self.replies, self.taken, self.workers_setup_status = list(replies), 0, {"completions_0": "ready"}

    def put(self, message):
        self.taken += 1
        item, reply = self.server.response_buffer[message[1]], self.replies.pop(0)
        item.worker_id = 0
        self.workers_setup_status["completions_0"] = "starting" if reply is None else "ready"
        for piece in reply or ():
            item.response_queue.append((json.dumps([piece]), serving.LitAPIStatus.OK))
            item.event.set()


def ask_engine(reader, engine, **settings) -> list[dict]:
    """The pieces that come of one prompt."""
    server = serving.OpenAIRoutes(serving.Settings(MODEL, **settings), reader)
    server.response_buffer, server.request_queue, server._server, engine.server = {}, engine, engine, server

    async def collect_all():
        return [piece async for _, piece in server._pieces(jobs_for(reader, PROMPT))]

    try:
        return asyncio.run(collect_all())
    finally:
        assert (server.response_buffer, server.num_open) == ({}, 0)


END = {"index": 0, "text": "b", "finish": "stop", "tokens": 2}


def test_what_a_dead_replica_took_with_it_is_handed_in_again(reader, monkeypatch):
    monkeypatch.setattr(serving, "POLL_S", 0.01)
    engine = Engine(None, None, [END])
    assert ask_engine(reader, engine) == [END]
    assert engine.taken == 3


def test_a_job_that_no_replica_took_before_one_died_is_handed_in_once_more(reader, monkeypatch):
    monkeypatch.setattr(serving, "POLL_S", 0.01)
    engine = Engine(None, [END])
    put, taken = engine.put, []

    def put_without_a_taker(message):
        put(message)
        taken.append(message[1])
        engine.server.response_buffer[message[1]].worker_id = None

    engine.put = put_without_a_taker
    assert ask_engine(reader, engine) == [END]
    assert len(set(taken)) == 2  # under another name: an answer to the first one would be for nobody


def test_a_stream_whose_replica_died_ends_with_an_error(reader, monkeypatch):
    monkeypatch.setattr(serving, "POLL_S", 0.01)
    engine = Engine([{**END, "finish": None}])
    put = engine.put
    engine.put = lambda message: (put(message), engine.workers_setup_status.update(completions_0="starting"))
    with pytest.raises(RequestError, match="a replica died while it generated") as caught:
        ask_engine(reader, engine)
    assert caught.value.status == 502


def test_a_request_without_an_answer_is_given_up_in_time(reader, monkeypatch):
    monkeypatch.setattr(serving, "POLL_S", 0.01)
    with pytest.raises(RequestError, match="the time for a request is over") as caught:
        ask_engine(reader, Engine([]), timeout_s=0.05)
    assert caught.value.status == 504


def test_a_replica_without_the_flows_weights_does_not_start(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(serving.signal, "signal", lambda *_: None)  # the one of this process
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
    YanForAutoencoding(YanConfig(vocab_size=64, num_decoder_layers=1, **sizes)).save_pretrained(tmp_path)
    settings = serving.Settings(str(tmp_path))
    with pytest.raises(ValueError, match="has no weights for"):
        serving.YanAPI(settings, serving.OpenAIRoutes(settings, reader)).setup("cpu")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(serving.litserve, "LitServer", lambda *_, **__: SimpleNamespace(devices=[]))
    with pytest.raises(ValueError, match="device='cuda': must be a device of this machine"):
        serving.make_server(Settings(MODEL, device="cuda"))


def test_a_draft_ends_where_its_text_would():
    text = Text(Letters(), set(), ("yz",), limit=6)
    assert text.extend(list(b"ab")) == "ab"
    assert text.draft(list(b"cdefgh")) == "cdef"
    assert text.draft(list(b"cyzd")) == "c"


def test_a_key_may_have_any_letters(reader):
    settings = serving.Settings(MODEL, api_key="schlüssel")
    api = serving.YanAPI(settings, serving.OpenAIRoutes(settings, reader))

    def request(key: bytes, scheme: bytes = b"Bearer"):
        scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", scheme + b" " + key)]}
        return routes.Request({**scope, "server": ("x", 1), "query_string": b""})

    for scheme in (b"Bearer", b"bearer"):
        api.authorize(request("schlüssel".encode(), scheme))
    with pytest.raises(routes.HTTPException):
        api.authorize(request("schlüssel".encode("latin-1")))


@pytest.mark.parametrize(("error", "is_shown"), [(BrokenPipeError, False), (EOFError, False), (KeyError, True)])
def test_the_watch_over_replicas_ends_without_a_traceback(error, is_shown):
    try:
        raise error
    except error:
        found = sys.exc_info()
    record = logging.LogRecord("litserve.server", logging.ERROR, "", 0, "Monitoring worker crashed", None, found)
    assert serving._is_news(record) == is_shown
