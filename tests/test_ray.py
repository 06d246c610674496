"""The server on Ray Serve: it grows under load, and a writer that is killed loses nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import ANSWER, MODEL, PROMPT, ROOT, START_S, free_port

from modeling_yan.serving.requests import Job, RequestError
from modeling_yan.serving.settings import Settings

ray_app = pytest.importorskip("modeling_yan.serving.ray_app")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
RayActorError = pytest.importorskip("ray.exceptions").RayActorError

ANSWER_S = 120  # of a machine that does other things, too
RUN = """
import sys
from ray import serve
from modeling_yan.serving.ray_app import Options, build

serve.start(http_options={"port": int(sys.argv[1])})
options = {"name": "yan", "max_replicas": 2, "load": 4, "upscale_delay_s": 1, "timeout_s": 120}
serve.run(build(Options(model=sys.argv[2], **options)), blocking=True)
"""


class Cluster:
    """Ray and the server on it, in a process group of its own."""

    def __init__(self, folder: Path):
        self.port, self.log = free_port(), folder / "log"
        own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "YAN_API_KEY": "key"}
        own |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        command = [sys.executable, "-c", RUN, str(self.port), MODEL]
        settings = {"env": {**os.environ, **own}, "stderr": subprocess.STDOUT, "start_new_session": True}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, **settings)

    def client(self, **settings):
        settings = {"api_key": "key", "timeout": ANSWER_S, "max_retries": 0, **settings}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **settings)

    def wait(self):
        end = time.monotonic() + START_S
        while "is ready" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.5)

    def writers(self) -> list:
        """The processes of the writers."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in found if "ServeReplica:default:Writer" in " ".join(process.cmdline())]

    def stop(self):
        left = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        self.process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(left, timeout=30)
        for process in left:
            process.kill()


class Writers:
    """The handle of the writers: what comes of each job that is handed in, one after the other."""

    def __init__(self, *responses):
        self.responses, self.taken = list(responses), 0

    def options(self, **_):
        return self

    async def remote(self, job):
        self.taken += 1
        for round_ in self.responses.pop(0):
            if isinstance(round_, Exception):
                raise round_
            if round_ is None:
                await asyncio.sleep(ANSWER_S)
            yield round_


def read(writers, **settings) -> list[dict]:
    """The pieces of one job that the writers get."""
    routes = ray_app.RayRoutes(Settings(MODEL, **settings), writers)

    async def collect_all():
        return [piece async for _, piece in routes._pieces([Job((1,), (("max_new_tokens", 2),))])]

    return asyncio.run(collect_all())


BATCH, BEGIN = [{"batch": 1}], [{"index": 0, "text": "a", "finish": None, "tokens": 1}]
END = [{"index": 0, "text": "b", "finish": "stop", "tokens": 2}]


def test_what_a_dead_writer_took_with_it_is_handed_in_again():
    writers = Writers([RayActorError()], [BATCH, RayActorError()], [BATCH, BEGIN, END, None])
    assert read(writers) == BEGIN + END  # and the end is not waited for once the text is whole
    assert writers.taken == 3


@pytest.mark.parametrize(
    ("rounds", "status"),
    [([BATCH, BEGIN, RayActorError()], 502), ([BATCH, None], 504), ([[{"error": "wrong", "status": 400}]], 400)],
    ids=["died", "late", "bad"],
)
def test_what_goes_wrong_has_a_status(rounds, status):
    with pytest.raises(RequestError) as caught:
        read(Writers(rounds), timeout_s=0.2)
    assert caught.value.status == status


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("ray"))
    try:
        cluster.wait()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
def test_requests_are_answered_streamed_and_refused_as_by_yan_serve(cluster):
    client = cluster.client()
    assert client.completions.create(model="yan", prompt=PROMPT).choices[0].text == ANSWER
    stream = client.completions.create(model="yan", prompt=PROMPT, stream=True, extra_body={"drafts": True})
    chunks = [chunk.choices[0] for chunk in stream]
    assert [choice.draft for choice in chunks if hasattr(choice, "draft")][-1] == ANSWER
    assert "".join(choice.text for choice in chunks) == ANSWER
    with pytest.raises(openai.BadRequestError, match="max_tokens=0: must be"):
        client.completions.create(model="yan", prompt=PROMPT, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="expert_choice='best'"):
        client.completions.create(model="yan", prompt=PROMPT, extra_body={"expert_choice": "best"})
    with pytest.raises(openai.AuthenticationError):
        cluster.client(api_key="wrong").models.list()
    assert [model.id for model in client.models.list()] == ["yan"]


@pytest.mark.slow
def test_writers_grow_with_the_load_and_one_that_is_killed_loses_nothing(cluster):
    client, end = cluster.client(), time.monotonic() + START_S
    answers, killed = [], False

    def ask(_):
        return client.completions.create(model="yan", prompt=PROMPT).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        while not killed:
            assert time.monotonic() < end, cluster.log.read_text()
            calls = [pool.submit(ask, number) for number in range(64)]
            if len(cluster.writers()) == 2 and len(answers) > 64:
                while not any(call.done() for call in calls):
                    time.sleep(0.01)
                cluster.writers()[0].kill()
                killed = True
            answers += [call.result(ANSWER_S) for call in calls]
    assert set(answers) == {ANSWER}
