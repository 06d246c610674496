"""What `transformers serve` does with a YAN; the page on engines says the same."""

import time
import urllib.request

import pytest
from serving import ANSWER, ANSWER_S, MODEL, PROMPT, START_S, free_port

from modeling_yan import YanForFlowGeneration

openai = pytest.importorskip("openai")
serve = pytest.importorskip("transformers.cli.serve")
manager = pytest.importorskip("transformers.cli.serving.model_manager")


@pytest.fixture
def client(monkeypatch):
    """A client of `transformers serve`, once the class stands where it is looked for."""
    monkeypatch.setattr(manager.transformers, "YanForFlowGeneration", YanForFlowGeneration, raising=False)
    port = free_port()
    server = serve.Serve(MODEL, host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    try:
        end = time.monotonic() + START_S
        while not is_up(port):
            assert time.monotonic() < end
            time.sleep(0.1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=ANSWER_S, max_retries=0)
    finally:
        server.kill_server()


def is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=ANSWER_S).status == 200
    except OSError:
        return False


def test_alone_it_does_not_find_the_class():
    with pytest.raises(AttributeError, match="module transformers has no attribute YanForFlowGeneration"):
        serve.Serve(MODEL, device="cpu", trust_remote_code=True, non_blocking=True)


def test_with_the_class_in_its_place_it_answers_and_streams(client):
    assert client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40).choices[0].text == ANSWER
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=40)
    assert answer.choices[0].message.content == ANSWER
    stream = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER
