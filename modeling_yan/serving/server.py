"""The server of `yan serve`: what LitServe calls to answer batches, and how jobs reach its replicas."""

import asyncio
import json
import logging
import os
import signal
import socket
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import litserve
from fastapi import Request
from litserve.loops import BatchedStreamingLoop
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus

from .requests import Job, RequestError, RequestReader
from .routes import ROUTES, Routes, checked, died, shape_errors, too_late
from .settings import Settings, make_reader, make_writer

POLL_S = 0.5  # how often a request that waits looks whether its replica still lives


class YanAPI(litserve.LitAPI):
    """What a replica does with a batch."""

    def __init__(self, settings: Settings, spec: "OpenAIRoutes") -> None:
        super().__init__(
            max_batch_size=settings.batch_size,
            batch_timeout=settings.batch_wait_s,
            loop=BatchedStreamingLoop(),
            spec=spec,
        )
        self.settings = settings

    def setup(self, device: str) -> None:
        """Load the model in the process of a replica."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C, which the main process sees to
        self.writer = make_writer(self.settings, device)

    def decode_request(self, request: Any) -> Any:
        return request

    def batch(self, inputs: Iterable[Any]) -> list[Any]:
        return list(inputs)

    def predict(self, jobs: list[Job]) -> Iterator[list[Any]]:
        """Rounds of pieces, one list of them for every job, and the size of the batch first."""
        yield [[{"batch": len(jobs)}]] * len(jobs)
        yield from self.writer.write(jobs)

    def unbatch(self, output: Iterable[Any]) -> Iterator[Any]:
        yield from output

    def encode_response(self, output: Iterable[Any]) -> Any:
        for round_ in output:
            yield [json.dumps(pieces) for pieces in round_]

    def authorize(self, request: Request) -> None:
        """Refuse a request without the key."""
        self.spec.authorize(request)


class OpenAIRoutes(Routes, LitSpec):
    """The routes. They run in the process that speaks HTTP; of a replica's process they are not part."""

    def __init__(self, settings: Settings, reader: RequestReader) -> None:
        super().__init__(settings, reader)
        self.short_since: float | None = None  # when a replica was missed first, of those that are not back yet
        self.api_path = "/v1/completions"
        for path, (method, name) in ROUTES.items():
            self.add_endpoint(path, getattr(self, name), [method])

    def __getstate__(self) -> dict[str, Any]:
        return {"api_path": self.api_path, "_endpoints": []}

    @property
    def stream(self) -> bool:
        return True

    def decode_request(self, request: Any, context_kwargs: dict[str, Any] | None = None) -> Any:
        return request

    def encode_response(self, output: Iterable[Any], context_kwargs: dict[str, Any] | None = None) -> Any:
        return output

    def _submit(self, job: Job) -> "Ticket":
        ticket = Ticket(job)
        self._hand_in(ticket)
        return ticket

    def _forget(self, ticket: "Ticket") -> None:
        self.response_buffer.pop(ticket.uid, None)

    def _hand_in(self, ticket: "Ticket") -> None:
        """Hand a job in, under a new name if for the second time: what comes of the old one is for nobody."""
        self._forget(ticket)
        ticket.uid, ticket.since, ticket.item.worker_id = str(uuid.uuid4()), time.monotonic(), None
        self.response_buffer[ticket.uid] = ticket.item
        self.request_queue.put((self.response_queue_id, ticket.uid, ticket.since, ticket.job))

    async def _read(self, ticket: "Ticket", deadline: float) -> AsyncIterator[dict[str, Any]]:
        """The pieces of a job.

        A job whose replica has died is handed in again, unless a part of its text was sent already.
        """
        waiting, has_begun = ticket.item.response_queue, False
        while ticket.num_open_texts:
            try:
                await asyncio.wait_for(ticket.item.event.wait(), POLL_S)
            except asyncio.TimeoutError:
                if time.monotonic() >= deadline:
                    raise too_late() from None
                if self._is_lost(ticket):
                    if has_begun:
                        raise died() from None
                    self._hand_in(ticket)
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
            return self.short_since is not None and ticket.since < self.short_since
        return states.get(f"{self.api_path.split('/')[-1]}_{ticket.item.worker_id}") != WorkerSetupStatus.READY


class Ticket:
    """A job on its way, and what came back of it."""

    def __init__(self, job: Job) -> None:
        self.job, self.since = job, 0.0
        self.uid: str | None = None
        self.item = ResponseBufferItem(event=asyncio.Event(), response_queue=deque())
        self.num_open_texts = job.num_texts


def _opened(content: Any, status: LitAPIStatus) -> list[dict[str, Any]]:
    """The pieces of a message of a replica.

    Raises:
        RequestError: The replica tells of an error.
    """
    if status == LitAPIStatus.FINISH_STREAMING:
        return []
    if status == LitAPIStatus.ERROR:
        code = getattr(content, "status_code", 500)
        raise too_late() if code == 504 else RequestError("internal error", status=code)
    return checked(json.loads(content))


def make_server(settings: Settings) -> litserve.LitServer:
    """A server that is ready to run.

    Raises:
        ValueError: No such model, or one without a tokenizer.
    """
    reader = make_reader(settings)
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
    if not server.devices:
        raise ValueError(f"device={settings.device!r}: must be a device of this machine, and there is none")
    shape_errors(server.app)
    return server


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of LitServe tells of more than its watch over the replicas, which outlives what it asks."""
    return not (record.exc_info and isinstance(record.exc_info[1], (EOFError, ConnectionError)))


def check_address(host: str, port: int) -> None:
    """Raises OSError if nobody can listen there, before a model is loaded."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise OSError(
            f"host={host}, port={port}: must be free to listen on ({os.strerror(error.errno or 0)})"
        ) from error


def serve(settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGINT or SIGTERM; requests that are open then are answered before the processes end.

    Raises:
        OSError: The port is taken, or the address is not one of this machine.
    """
    check_address(host, port)
    server, main = make_server(settings), os.getpid()

    def stop(*_: Any) -> None:
        if os.getpid() == main:
            raise KeyboardInterrupt
        os._exit(0)  # of a process that LitServe forked, and which has set no handler of its own

    signal.signal(signal.SIGTERM, stop)  # LitServe alone leaves its processes behind
    logging.getLogger("litserve.server").addFilter(_is_news)
    server.run(host, port, num_api_servers=1, log_level="warning", generate_client_file=False)
