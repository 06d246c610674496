"""`yan serve`, asked by the real `openai` client on loopback: one process with two replicas for all tests."""

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
from serving import ANSWER, ANSWER_S, MODEL, PROMPT, PROMPTS, ROOT, START_S, body, free_port

openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
pytest.importorskip("modeling_yan.serving.server")

KEY = "key-of-the-test"


class Server:
    """`yan serve`, in a process group of its own."""

    def __init__(self, log: Path, replicas: int = 2):
        self.port, self.log = free_port(), log
        words = [sys.executable, "-m", "modeling_yan", "serve", MODEL, "--name", "yan", "--port", str(self.port)]
        words += ["--device", "cpu", "--replicas", str(replicas), "--threads", "1", "--max_body", "20000"]
        own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "YAN_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        settings = {"env": {**os.environ, **own}, "start_new_session": True}
        with log.open("w") as out:
            self.process = subprocess.Popen([*words, "--batch_wait_ms", "50"], stderr=out, **settings)

    def client(self, **settings):
        settings = {"api_key": KEY, "timeout": ANSWER_S, "max_retries": 0, **settings}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **settings)

    def wait(self):
        """Until all replicas are there."""
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

    def stop(self, send=os.kill, number=signal.SIGTERM) -> list:
        """End it, and return the processes that it leaves behind."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        send(self.process.pid, number)
        self.process.wait(START_S)  # as long as it may take to start: the machine may be busy
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_ends_all_processes(tmp_path):
    server = Server(tmp_path / "log", replicas=1)
    try:
        server.wait()
    finally:
        left = server.stop(os.killpg, signal.SIGINT)  # a terminal sends it to the whole group
        for process in left:
            process.kill()
    assert left == []
    assert "Traceback" not in (tmp_path / "log").read_text()
