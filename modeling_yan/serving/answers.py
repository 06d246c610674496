"""Answers in OpenAI's shapes: whole ones, pieces of a stream, and errors."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

# OpenAI's type of an error by its status; of others above 499 it is server_error
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(content: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}\n\n"


@dataclass
class Answer:
    """One answer as it grows. `is_chat` is whether a message is asked for, and not a text."""

    model: str
    is_chat: bool
    prompt_tokens: int
    repeats: int
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def add(self, job: int, piece: dict[str, Any]) -> int:
        """Take a piece of a job in, and return the number of the choice that it belongs to."""
        index = job * self.repeats + piece["index"]
        self.texts[index] = self.texts.get(index, "") + piece["text"]
        self.tokens[index] = piece["tokens"]
        if piece["finish"]:
            self.ends[index] = piece["finish"]
        return index

    def chunk(self, job: int, piece: dict[str, Any]) -> dict[str, Any]:
        """The event of a stream for a piece; a draft stands beside an empty text."""
        if "draft" in piece:
            index, end = job * self.repeats + piece["index"], None
            content: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
            return self._chunk([{"index": index, **content, "draft": piece["draft"], "finish_reason": end}])
        is_first = job * self.repeats + piece["index"] not in self.texts
        index, text = self.add(job, piece), piece["text"]
        delta = {"role": "assistant", "content": text} if is_first else {"content": text}
        content = {"delta": delta} if self.is_chat else {"text": text}
        return self._chunk([{"index": index, **content, "logprobs": None, "finish_reason": piece["finish"]}])

    def usage_chunk(self) -> dict[str, Any]:
        """The last event of a stream, where a client asked for it."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        generated = sum(self.tokens.values())
        total = self.prompt_tokens + generated
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def whole(self) -> dict[str, Any]:
        """The JSON of the whole answer."""
        choices = []
        for index, text in sorted(self.texts.items()):
            message = {"role": "assistant", "content": text}
            content = {"message": message} if self.is_chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": self.ends[index]})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.is_chat else "text_completion"), "choices": choices}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
