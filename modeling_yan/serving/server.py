"""The server: what LitServe calls to write batches, and the routes that OpenAI's clients call."""

import asyncio
import hmac
import json
import os
import signal
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import litserve
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from litserve.loops import BatchedStreamingLoop
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from .answers import Answer, error_body, event
from .metrics import VANISHED, Metrics
from .requests import Job, Limits, RequestError, RequestReader
from .writing import BatchWriter

POLL_S = 0.5  # how often a request that waits looks whether its replica still lives
OPEN_PATHS = ("/health", "/load_model")  # without a key: `transformers chat` sends none to the second


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Args:
        model: Folder or hub name. name: What clients call it; the same if None.
        device, threads: Of a replica; threads of torch on a CPU, torch's choice if None.
        replicas: Processes with a model each; on GPUs for each of them.
        batch_size: Most requests that are written together. batch_wait_s: How long the first of them waits for others.
        max_queue: Requests that may be open before others get the status 429.
        max_body: Bytes of a request. timeout_s: Seconds until a request gets the status 504.
        api_key: That every request but those to /health must bear; none if None.
    """

    model: str
    name: str | None = None
    device: str = "auto"
    threads: int | None = None
    replicas: int = 1
    batch_size: int = 32
    batch_wait_s: float = 0.005
    max_queue: int = 256
    max_body: int = 2**20
    timeout_s: float = 60.0
    api_key: str | None = None
    max_new_tokens: int = 1024
    max_prompt_tokens: int | None = None


class YanAPI(litserve.LitAPI):
    """What a replica does with a batch."""

    def __init__(self, settings: Settings, spec: LitSpec):
        super().__init__(
            max_batch_size=settings.batch_size,
            batch_timeout=settings.batch_wait_s,
            loop=BatchedStreamingLoop(),
            spec=spec,
        )
        self.settings = settings

    def setup(self, device):
        """Load the model in the process of a replica."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from ..commands.loading import load_model, load_tokenizer, prepare_library

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C, which the main process sees to
        prepare_library(is_quiet=True)
        torch.seed()  # replicas draw different numbers
        name = self.settings.model
        if AutoConfig.from_pretrained(name).model_type == "yan":
            model = load_model(name, device)  # refuses a folder without the flow's weights
        else:  # such as an autoregressive one to compare with
            model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
        self.writer = BatchWriter(model, load_tokenizer(name), self.settings.threads)

    def decode_request(self, request):
        return request

    def batch(self, inputs):
        return list(inputs)

    def predict(self, jobs):
        """Rounds of pieces, one list of them for every job, and the size of the batch first."""
        yield [[{"batch": len(jobs)}]] * len(jobs)
        yield from self.writer.write(jobs)

    def unbatch(self, output):
        yield from output

    def encode_response(self, output):
        for round_ in output:
            yield [json.dumps(pieces) for pieces in round_]

    def authorize(self, request: Request):
        """Refuse a request without the key."""
        key = self.settings.api_key
        if key is None or request.url.path in OPEN_PATHS:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            body = error_body("wrong or missing API key", 401, code="invalid_api_key")
            raise HTTPException(401, body, headers={"WWW-Authenticate": "Bearer"})


class OpenAIRoutes(LitSpec):
    """The routes. They run in the process that speaks HTTP; of a replica's process they are not part."""

    def __init__(self, settings: Settings, reader: RequestReader):
        super().__init__()
        self.settings, self.reader, self.metrics = settings, reader, Metrics()
        self.name, self.num_open = settings.name or settings.model, 0
        self.short_since = None  # when a replica was missed first, of those that are not back yet
        self.api_path = "/v1/completions"
        self.add_endpoint("/v1/completions", self.completions, ["POST"])
        self.add_endpoint("/v1/chat/completions", self.chat_completions, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.model, ["GET"])
        self.add_endpoint("/metrics", self.show_metrics, ["GET"])
        self.add_endpoint("/load_model", self.load_model, ["POST"])

    def __getstate__(self):
        return {"api_path": self.api_path, "_endpoints": []}

    @property
    def stream(self):
        return True

    def decode_request(self, request, context_kwargs=None):
        return request

    def encode_response(self, output, context_kwargs=None):
        return output

    async def completions(self, request: Request):
        return await self._answer(request, self.reader.completion, is_chat=False)

    async def chat_completions(self, request: Request):
        return await self._answer(request, self.reader.chat, is_chat=True)

    async def models(self):
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str):
        if name != self.name:
            raise _shaped(RequestError(f"model={name!r}: must be {self.name!r}", "model", 404, "model_not_found"))
        return self._card()

    async def show_metrics(self):
        return Response(self.metrics.text(self.num_open), media_type="text/plain; version=0.0.4")

    async def load_model(self):
        """What `transformers chat` asks for first: the model is there."""
        return Response(event({"status": "ready", "model": self.name, "cached": True}), media_type="text/event-stream")

    def _card(self) -> dict:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}

    async def _answer(self, request: Request, read, is_chat: bool):
        started, endpoint = time.monotonic(), "chat" if is_chat else "completions"
        try:
            fields, jobs = read(await self._body(request))
            if fields.get("model", self.name) != self.name:
                message = f"model={fields['model']!r:.200}: must be {self.name!r}"
                raise RequestError(message, "model", 404, "model_not_found")
            repeats = dict(jobs[0].settings).get("num_return_sequences", 1)
            answer = Answer(self.name, is_chat, sum(len(job.ids) for job in jobs), repeats)
            pieces = self._pieces(jobs)
            first = await anext(pieces)  # an error before it has a status of its own
            if fields.get("stream"):
                stream = self._stream(fields, answer, first, pieces, started, endpoint)
                return StreamingResponse(stream, media_type="text/event-stream")
            answer.add(*first)
            async for number, piece in pieces:
                answer.add(number, piece)
        except RequestError as error:
            self.metrics.count(endpoint, error.status, started)
            raise _shaped(error) from None
        self.metrics.count(endpoint, 200, started, answer.usage())
        return JSONResponse(answer.whole())

    async def _body(self, request: Request) -> bytes:
        try:
            return await asyncio.wait_for(request.body(), self.settings.timeout_s)
        except asyncio.TimeoutError:
            raise RequestError("the body did not come in time", status=408) from None
        except ClientDisconnect:
            raise RequestError("the client left", status=VANISHED) from None
        except StarletteHTTPException as error:  # of LitServe, for a body that is too large
            message = f"the body must have at most {self.settings.max_body} bytes"
            raise RequestError(message, status=error.status_code) from None

    async def _stream(self, fields, answer: Answer, first, pieces, started: float, endpoint: str):
        """The events of a stream."""
        status = VANISHED
        try:
            yield event(answer.chunk(*first))
            async for number, piece in pieces:
                yield event(answer.chunk(number, piece))
            if fields.get("stream_options", {}).get("include_usage"):
                yield event(answer.usage_chunk())
            yield event("[DONE]")
            status = 200
        except RequestError as error:
            status = error.status
            yield event(_body_of(error))
        finally:
            self.metrics.count(endpoint, status, started, answer.usage())
            await pieces.aclose()

    async def _pieces(self, jobs: list[Job]) -> AsyncIterator[tuple[int, dict]]:
        """The pieces of all jobs, each with the number of its job; the jobs are written together."""
        if self.num_open >= self.settings.max_queue:
            raise RequestError(f"{self.num_open} requests are open: try again later", status=429, code="queue_full")
        deadline, tickets = time.monotonic() + self.settings.timeout_s, []
        self.num_open += 1
        try:
            for job in jobs:
                tickets.append(Ticket(job))
                self._submit(tickets[-1])
            for number, ticket in enumerate(tickets):
                async for piece in self._read(ticket, deadline):
                    yield number, piece
        finally:
            self.num_open -= 1
            for ticket in tickets:
                self.response_buffer.pop(ticket.uid, None)

    def _submit(self, ticket: "Ticket"):
        """Hand a job in, under a new name if for the second time: what comes of the old one is for nobody."""
        self.response_buffer.pop(ticket.uid, None)
        ticket.uid, ticket.since, ticket.item.worker_id = str(uuid.uuid4()), time.monotonic(), None
        self.response_buffer[ticket.uid] = ticket.item
        self.request_queue.put((self.response_queue_id, ticket.uid, ticket.since, ticket.job))

    async def _read(self, ticket: "Ticket", deadline: float) -> AsyncIterator[dict]:
        """The pieces of a job.

        A job whose replica has died is handed in again, unless a part of its text was sent already.
        """
        waiting, has_begun = ticket.item.response_queue, False
        while ticket.num_open_texts:
            try:
                await asyncio.wait_for(ticket.item.event.wait(), POLL_S)
            except asyncio.TimeoutError:
                if time.monotonic() >= deadline:
                    raise RequestError("the time for a request is over", status=504, code="timeout") from None
                if self._is_lost(ticket):
                    if has_begun:
                        raise RequestError("a replica died while it wrote", status=502) from None
                    self._submit(ticket)
                continue
            ticket.item.event.clear()
            while waiting:
                for piece in _opened(*waiting.popleft()):
                    if "batch" in piece:
                        self.metrics.batches.observe(piece["batch"])
                        continue
                    has_begun = True
                    ticket.num_open_texts -= bool(piece.get("finish"))
                    yield piece

    def _is_lost(self, ticket: "Ticket") -> bool:
        """Whether a replica died with a job, or may have: it was killed while the job was on its way to one."""
        states = dict(self._server.workers_setup_status)
        is_short = any(state != WorkerSetupStatus.READY for state in states.values())
        if not is_short:
            self.short_since = None
        elif self.short_since is None:
            self.short_since = time.monotonic()
        if ticket.item.worker_id is None:
            return is_short and ticket.since < self.short_since
        return states.get(f"{self.api_path.split('/')[-1]}_{ticket.item.worker_id}") != WorkerSetupStatus.READY


class Ticket:
    """A job on its way, and what came back of it."""

    def __init__(self, job: Job):
        self.job, self.uid, self.since = job, None, 0.0
        self.item = ResponseBufferItem(event=asyncio.Event(), response_queue=deque())
        self.num_open_texts = dict(job.settings).get("num_return_sequences", 1)


def _opened(content, status) -> list[dict]:
    """The pieces of a message of a replica.

    Raises:
        RequestError: The replica tells of an error.
    """
    if status == LitAPIStatus.FINISH_STREAMING:
        return []
    if status == LitAPIStatus.ERROR:
        code = getattr(content, "status_code", 500)
        message = "the time for a request is over" if code == 504 else "internal error"
        raise RequestError(message, status=code, code="timeout" if code == 504 else None)
    pieces = json.loads(content)
    for piece in pieces:
        if "error" in piece:
            raise RequestError(piece["error"], status=piece["status"])
    return pieces


def _body_of(error: RequestError) -> dict:
    return error_body(error.message, error.status, error.param, error.code)


def _shaped(error: RequestError) -> HTTPException:
    return HTTPException(error.status, _body_of(error), headers={"Retry-After": "1"} if error.status == 429 else None)


async def _show_error(request: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's shape."""
    status = getattr(error, "status_code", 500)
    detail = getattr(error, "detail", "internal error")
    content = detail if isinstance(detail, dict) else error_body(str(detail), status)
    return JSONResponse(content, status, headers=getattr(error, "headers", None))


def make_server(settings: Settings) -> litserve.LitServer:
    """A server that is ready to run.

    Raises:
        ValueError: No such model, or one without a tokenizer.
    """
    from transformers import AutoConfig, GenerationConfig

    from ..commands.loading import load_tokenizer, prepare_library

    prepare_library(is_quiet=True)
    config, tokenizer = AutoConfig.from_pretrained(settings.model), load_tokenizer(settings.model)
    is_yan = config.model_type == "yan"
    longest = config.max_prompt_length if is_yan else config.max_position_embeddings - settings.max_new_tokens
    new_tokens = GenerationConfig.from_pretrained(settings.model).max_new_tokens
    limits = Limits(settings.max_prompt_tokens or longest, settings.max_new_tokens)
    reader = RequestReader(tokenizer, limits, new_tokens or (config.canvas_length if is_yan else 20), is_yan)
    kind, _, number = settings.device.partition(":")
    server = litserve.LitServer(
        YanAPI(settings, OpenAIRoutes(settings, reader)),
        accelerator=kind,
        devices=[int(number)] if number else "auto",
        workers_per_device=settings.replicas,
        timeout=settings.timeout_s,
        max_payload_size=settings.max_body,
        disable_openapi_url=True,
        restart_workers=True,
    )
    for error in (StarletteHTTPException, Exception):
        server.app.add_exception_handler(error, _show_error)
    return server


def serve(settings: Settings, host: str = "127.0.0.1", port: int = 8000):
    """Serve until SIGINT or SIGTERM; requests that are open then are answered before the processes end."""
    server, main = make_server(settings), os.getpid()

    def stop(*_):
        if os.getpid() == main:
            raise KeyboardInterrupt
        os._exit(0)  # of a process that LitServe forked, and which has set no handler of its own

    signal.signal(signal.SIGTERM, stop)  # LitServe alone leaves its processes behind
    server.run(host, port, num_api_servers=1, log_level="warning", generate_client_file=False)
