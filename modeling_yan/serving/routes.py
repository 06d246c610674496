"""The routes that OpenAI's clients call. An engine adds how jobs reach a replica and pieces come back."""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from .answers import Answer, error_body, event
from .metrics import VANISHED, Metrics
from .requests import Job, RequestError, RequestReader
from .settings import Settings

OPEN_PATHS = ("/health", "/load_model")  # without a key: `transformers chat` sends none to the second
ROUTES = {  # path: method, and the function's name
    "/v1/completions": ("POST", "completions"),
    "/v1/chat/completions": ("POST", "chat_completions"),
    "/v1/models": ("GET", "models"),
    "/v1/models/{name:path}": ("GET", "model"),
    "/metrics": ("GET", "show_metrics"),
    "/load_model": ("POST", "load_model"),
}

Numbered = tuple[int, dict[str, Any]]  # a piece, and the number of its job


class Routes:
    """The routes of a model. An engine gives `_submit`, `_read` and `_forget`."""

    def __init__(self, settings: Settings, reader: RequestReader) -> None:
        super().__init__()
        self.settings, self.reader, self.metrics = settings, reader, Metrics()
        self.name, self.num_open = settings.name or settings.model, 0

    def authorize(self, request: Request) -> None:
        """Refuse a request without the key."""
        key = self.settings.api_key
        if key is None or request.url.path in OPEN_PATHS:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else ""
        if not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            body = error_body("wrong or missing API key", 401, code="invalid_api_key")
            raise HTTPException(401, body, headers={"WWW-Authenticate": "Bearer"})

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.completion, is_chat=False)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, self.reader.chat, is_chat=True)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        if name != self.name:
            raise _shaped(RequestError(f"model={name!r}: must be {self.name!r}", "model", 404, "model_not_found"))
        return self._card()

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(self.num_open), media_type="text/plain; version=0.0.4")

    async def load_model(self) -> Response:
        """What `transformers chat` asks for first: the model is there."""
        return Response(event({"status": "ready", "model": self.name, "cached": True}), media_type="text/event-stream")

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}

    async def _answer(
        self, request: Request, read: Callable[[bytes], tuple[dict[str, Any], list[Job]]], is_chat: bool
    ) -> Response:
        started, endpoint = time.monotonic(), "chat" if is_chat else "completions"
        try:
            fields, jobs = read(await self._body(request))
            if fields.get("model", self.name) != self.name:
                message = f"model={fields['model']!r:.200}: must be {self.name!r}"
                raise RequestError(message, "model", 404, "model_not_found")
            answer = Answer(self.name, is_chat, sum(len(job.ids) for job in jobs), jobs[0].num_texts)
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
        except Exception:
            self.metrics.count(endpoint, 500, started)
            raise
        self.metrics.count(endpoint, 200, started, answer.usage())
        return JSONResponse(answer.whole())

    async def _body(self, request: Request) -> bytes:
        most = self.settings.max_body
        try:
            return await asyncio.wait_for(_read_body(request, most), self.settings.timeout_s)
        except asyncio.TimeoutError:
            raise RequestError("the body did not come in time", status=408) from None
        except ClientDisconnect:
            raise RequestError("the client left", status=VANISHED) from None
        except StarletteHTTPException as error:  # of LitServe, too, for a body that is too large
            raise RequestError(f"the body must have at most {most} bytes", status=error.status_code) from None

    async def _stream(
        self,
        fields: dict[str, Any],
        answer: Answer,
        first: Numbered,
        pieces: AsyncGenerator[Numbered, None],
        started: float,
        endpoint: str,
    ) -> AsyncIterator[str]:
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

    async def _pieces(self, jobs: list[Job]) -> AsyncGenerator[Numbered, None]:
        """The pieces of all jobs, each with the number of its job; the jobs are answered together."""
        if self.num_open >= self.settings.max_queue:
            raise RequestError(f"{self.num_open} requests are open: try again later", status=429, code="queue_full")
        deadline, tickets = time.monotonic() + self.settings.timeout_s, []
        self.num_open += 1
        try:
            for job in jobs:
                tickets.append(self._submit(job))
            for number, ticket in enumerate(tickets):
                async for piece in self._read(ticket, deadline):
                    yield number, piece
        finally:
            self.num_open -= 1
            for ticket in tickets:
                self._forget(ticket)

    def _submit(self, job: Job) -> Any:
        """Hand a job in, and return what `_read` reads."""
        raise NotImplementedError

    async def _read(self, ticket: Any, deadline: float) -> AsyncIterator[dict[str, Any]]:
        """The pieces of a job."""
        raise NotImplementedError
        yield

    def _forget(self, ticket: Any) -> None:
        """Nobody waits for a job any more."""


async def _read_body(request: Request, most: int) -> bytes:
    """The body of a request; one that is too large is not read to its end."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise HTTPException(413)
    return bytes(body)


def checked(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pieces of a round.

    Raises:
        RequestError: One of them is an error.
    """
    for piece in pieces:
        if "error" in piece:
            raise RequestError(piece["error"], status=piece["status"])
    return pieces


def too_late() -> RequestError:
    return RequestError("the time for a request is over", status=504, code="timeout")


def died() -> RequestError:
    return RequestError("a replica died while it generated", status=502)


def _body_of(error: RequestError) -> dict[str, Any]:
    return error_body(error.message, error.status, error.param, error.code)


def _shaped(error: RequestError) -> HTTPException:
    return HTTPException(error.status, _body_of(error), headers={"Retry-After": "1"} if error.status == 429 else None)


async def _show_error(request: Request, error: Exception) -> JSONResponse:
    """Any error in OpenAI's shape."""
    status = getattr(error, "status_code", 500)
    detail = getattr(error, "detail", "internal error")
    content = detail if isinstance(detail, dict) else error_body(str(detail), status)
    return JSONResponse(content, status, headers=getattr(error, "headers", None))


def shape_errors(app: FastAPI) -> None:
    """Let a FastAPI app tell of every error in OpenAI's shape."""
    for error in (StarletteHTTPException, Exception):
        app.add_exception_handler(error, _show_error)
