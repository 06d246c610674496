"""`yan serve`, asked by the real `openai` client on loopback, and what it is made of."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_yan.serving.requests import Job, Limits, RequestError, RequestReader
from modeling_yan.serving.writing import BatchWriter, Text, group_jobs

openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
serving = pytest.importorskip("modeling_yan.serving.server")

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "examples" / "checkpoints" / "yan-transformer-tiny")
PROMPT = "Where is the apple? Mary went to the kitchen. Mary took the apple."
ANSWER = "The apple is in the kitchen."
PROMPTS = [PROMPT, "Who has the hat? Anna took the hat.", "Where is Tom? Tom went to the garden.", "Who is lucky?"]
KEY = "key-of-the-test"
START_S, ANSWER_S = 400, 60  # of a machine that does other things, too


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def write(model, tokenizer):
    """Function from a prompt and options to what `generate` writes for it alone."""

    def run(prompt, **options):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        sequences = model.generate(**inputs, return_prompt=False, **options)
        return tokenizer.decode(sequences[0], skip_special_tokens=True)

    return run


@pytest.fixture(scope="module")
def reader(tokenizer):
    return RequestReader(tokenizer, Limits(prompt_tokens=88), new_tokens=40)


def body(**fields) -> bytes:
    return json.dumps({"prompt": PROMPT, **fields}).encode()


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
    routes = serving.OpenAIRoutes(serving.Settings(MODEL, max_queue=2), reader)
    routes.num_open = 2
    with pytest.raises(RequestError, match="2 requests are open") as caught:
        asyncio.run(anext(routes._pieces(jobs_for(reader, PROMPT))))
    assert (caught.value.status, routes.num_open) == (429, 2)


# The server: a process of its own with two replicas, the same one for all tests below.


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """`yan serve` with two replicas."""

    def __init__(self, log: Path):
        self.port, self.log = free_port(), log
        words = [sys.executable, "-m", "modeling_yan", "serve", MODEL, "--name", "yan", "--port", str(self.port)]
        words += ["--device", "cpu", "--replicas", "2", "--threads", "1", "--max_body", "20000"]
        own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "YAN_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen([*words, "--batch_wait_ms", "50"], env={**os.environ, **own}, stderr=out)

    def client(self, **settings):
        settings = {"api_key": KEY, "timeout": ANSWER_S, "max_retries": 0, **settings}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **settings)

    def wait(self):
        """Until both replicas are there."""
        end = time.monotonic() + START_S
        while not self.is_ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def is_ready(self) -> bool:
        try:
            return self.get("health").startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def get(self, path: str, headers: str = "", body: bytes = b"", wait: bool = True) -> bytes:
        """What a bare socket gets; nothing if it does not wait."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_S) as connection:
            method = "POST" if body else "GET"
            head = f"{method} /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            return b"".join(iter(lambda: connection.recv(65536), b"")) if wait else b""

    def metric(self, name: str) -> float:
        text = self.get("metrics", f"Authorization: Bearer {KEY}\r\n").decode()
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def replicas(self) -> list:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def stop(self, number=signal.SIGTERM) -> list:
        """End it, and return the processes that it leaves behind."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.send_signal(number)
        self.process.wait(ANSWER_S)
        _, left = psutil.wait_procs(processes, timeout=10)
        return left


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            for left in server.stop():
                left.kill()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_a_completion_equals_generate(client, write):
    answer = client.completions.create(model="yan", prompt=PROMPT)
    assert answer.choices[0].text == ANSWER == write(PROMPT)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 8)
    short = client.completions.create(model="yan", prompt=PROMPT, max_tokens=3, extra_body={"num_flow_steps": 1})
    assert short.choices[0].text == write(PROMPT, max_new_tokens=3, num_flow_steps=1)
    assert short.choices[0].finish_reason == "length"


def test_several_prompts_and_several_texts_come_in_order(client, write):
    answer = client.completions.create(model="yan", prompt=PROMPTS)
    assert [choice.text for choice in answer.choices] == [write(prompt) for prompt in PROMPTS]
    drawn = client.completions.create(model="yan", prompt=PROMPTS[:2], n=2, temperature=1, seed=3)
    again = client.completions.create(model="yan", prompt=PROMPTS[1], n=2, temperature=1, seed=3)
    assert [choice.text for choice in drawn.choices[2:]] == [choice.text for choice in again.choices]
    assert [choice.index for choice in drawn.choices] == [0, 1, 2, 3]


def test_a_chat_is_answered_and_streamed(client):
    messages = [{"role": "user", "content": PROMPT}]
    assert client.chat.completions.create(model="yan", messages=messages).choices[0].message.content == ANSWER
    options = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"canvas_length": 3},
        "max_tokens": 9,
    }
    chunks = list(client.chat.completions.create(model="yan", messages=messages, **options))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len([text for text in texts if text]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0


def test_drafts_stand_beside_the_text_of_a_stream(client):
    stream = client.completions.create(model="yan", prompt=PROMPT, stream=True, extra_body={"drafts": True})
    chunks = [chunk.choices[0] for chunk in stream]
    drafts = [choice.draft for choice in chunks if hasattr(choice, "draft")]
    assert len(drafts) == 3  # steps of the model
    assert drafts[-1] == ANSWER == "".join(choice.text for choice in chunks)


def test_requests_that_come_together_are_written_together_and_alike(server, client, write):
    batches, prompts = server.metric("yan_batch_size_count"), PROMPTS * 4
    rows = server.metric("yan_batch_size_sum")
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: client.completions.create(model="yan", prompt=prompt), prompts))
    assert [answer.choices[0].text for answer in answers] == [write(prompt) for prompt in prompts]
    mean = (server.metric("yan_batch_size_sum") - rows) / (server.metric("yan_batch_size_count") - batches)
    assert mean > 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model='gpt': must be 'yan'"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens=0: must be"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty=1: not supported"),
        ({"prompt": "apple " * 1000}, openai.BadRequestError, "must have at most"),
        ({"prompt": "a" * 30_000}, openai.APIStatusError, "the body must have at most 20000 bytes"),
        ({"extra_body": {"expert_choice": "best"}}, openai.BadRequestError, "expert_choice='best': must be one of"),
        ({"extra_body": {"expert_choice": "best"}, "stream": True}, openai.BadRequestError, "expert_choice='best'"),
    ],
    ids="model max_tokens penalty long body expert stream".split(),
)
def test_an_error_has_openais_shape(client, call, error, message):
    with pytest.raises(error, match=message) as caught:
        client.completions.create(**{"model": "yan", "prompt": PROMPT, **call})
    assert caught.value.type == "invalid_request_error"


def test_a_path_that_is_not_there_has_openais_shape(server):
    head, _, content = server.get("v1/images", f"Authorization: Bearer {KEY}\r\n").partition(b"\r\n\r\n")
    assert b"404" in head
    assert json.loads(content)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("key", ["wrong", KEY + "x"])
def test_a_wrong_key_is_refused(server, key):
    with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
        server.client(api_key=key).models.list()


def test_a_key_of_other_letters_is_refused(server):
    assert server.get("v1/models", "Authorization: Bearer \x80\xff\r\n").startswith(b"HTTP/1.1 401")


def test_without_a_key_there_is_the_state_of_health_alone(server):
    assert server.get("health").startswith(b"HTTP/1.1 200")
    for path in ("", "info", "metrics", "v1/models", "openapi.json", "docs"):
        assert not server.get(path).startswith(b"HTTP/1.1 200"), path


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["yan"]
    assert client.models.retrieve("yan").id == "yan"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_clients_that_vanish_leave_nothing_open(server, client):
    headers = f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    for stream in (False, True):
        server.get("v1/completions", headers, body(model="yan", stream=stream, max_tokens=400), wait=False)
    for chunk in client.completions.create(model="yan", prompt=PROMPT, stream=True, extra_body={"canvas_length": 1}):
        assert chunk.choices
        break
    assert client.completions.create(model="yan", prompt=PROMPT).choices[0].text == ANSWER
    end = time.monotonic() + ANSWER_S
    while server.metric("yan_open_requests") > 0:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_transformers_chat_talks_to_it(server):
    words = [sys.executable, "-m", "transformers.cli.transformers", "chat", "yan"]
    url = f"http://127.0.0.1:{server.port}/v1"
    settings = {"capture_output": True, "text": True, "timeout": START_S, "check": False}
    own = {**os.environ, "HF_TOKEN": KEY, "COLUMNS": "200", "HF_HUB_OFFLINE": "0"}  # offline it asks nobody at all
    result = subprocess.run([*words, url], input=f"{PROMPT}\n!exit\n", env=own, **settings)
    assert ANSWER in result.stdout, result.stderr


def test_a_replica_that_is_killed_under_load_loses_nothing(server, client, write):
    wanted = write(PROMPT)
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(client.completions.create, model="yan", prompt=PROMPT) for _ in range(120)]
        while sum(call.done() for call in calls) < 10:
            time.sleep(0.01)
        server.replicas()[0].kill()
        answers = [call.result(ANSWER_S) for call in calls]
    assert [answer.choices[0].text for answer in answers] == [wanted] * len(calls)


def test_a_signal_ends_all_processes(server):
    assert server.stop() == []
