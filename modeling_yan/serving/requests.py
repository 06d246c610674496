"""What a client may ask for: OpenAI's fields, those of YAN, and a clear error for all others."""

import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ROLES = ("system", "developer", "user", "assistant")
# accepted, and of no influence on a text
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "model")
OWN_FIELDS = ("num_flow_steps", "canvas_length", "expert_choice", "drafts")  # of YAN
# OpenAI's fields that YAN can't honour, with the values that ask for nothing
NEUTRAL = {
    **dict.fromkeys(("top_p", "best_of"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("echo", "logprobs", "parallel_tool_calls"), (False,)),
    "suffix": ("",),
    "logit_bias": ({},),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none",)),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}


class RequestError(ValueError):
    """What is wrong with a request: the text, its HTTP status, the field and OpenAI's code for it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Args:
        prompt_tokens: Tokens of a prompt. new_tokens: Tokens of a text. texts: Texts of a request, `n` times its
            prompts. steps: Solver steps of a canvas. stops: Stop strings.
    """

    prompt_tokens: int
    new_tokens: int = 1024
    texts: int = 16
    steps: int = 64
    stops: int = 4


@dataclass(frozen=True)
class Job:
    """One prompt and how to continue it; `settings` are keywords of `generate`, in order."""

    ids: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]
    stop: tuple[str, ...] = ()
    streams: bool = False
    drafts: bool = False

    @property
    def num_texts(self) -> int:
        return dict(self.settings).get("num_return_sequences", 1)


def is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def field_rules(limits: Limits) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """For every field of a request that has influence: whether a value is allowed, and what is."""
    new_tokens = (lambda value: is_whole(value, 1, limits.new_tokens)), f"an integer from 1 to {limits.new_tokens}"
    truth = (lambda value: isinstance(value, bool)), "true or false"
    return {
        "max_tokens": new_tokens,
        "max_completion_tokens": new_tokens,
        "temperature": ((lambda value: is_number(value, 0, 2)), "a number from 0 to 2"),
        "seed": ((lambda value: is_whole(value, -(2**63), 2**63 - 1)), "an integer of 64 bits"),
        "n": ((lambda value: is_whole(value, 1, limits.texts)), f"an integer from 1 to {limits.texts}"),
        "stop": (
            (lambda value: _are_strings(value, limits.stops)),
            f"a string or a list of at most {limits.stops} strings, none of them empty",
        ),
        "stream": truth,
        "stream_options": (
            (lambda value: isinstance(value, dict) and not set(value) - {"include_usage"}),
            "an object with include_usage alone",
        ),
        "num_flow_steps": ((lambda value: is_whole(value, 0, limits.steps)), f"an integer from 0 to {limits.steps}"),
        "canvas_length": new_tokens,
        "expert_choice": ((lambda value: isinstance(value, str)), "a string"),
        "drafts": truth,
        "generation_config": ((lambda value: isinstance(value, str)), "a JSON object as a string"),
    }


def _are_strings(value: Any, most: int) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list) and len(strings) <= most and all(isinstance(s, str) and s for s in strings)


class RequestReader:
    """Makes jobs of the bodies of requests.

    Args:
        tokenizer: The model's. limits: The most that a request may ask for.
        new_tokens: Tokens of a text where a request does not say. is_yan: Whether YAN's own fields are allowed.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", limits: Limits, new_tokens: int, is_yan: bool = True
    ) -> None:
        self.tokenizer, self.limits, self.new_tokens = tokenizer, limits, min(new_tokens, limits.new_tokens)
        self.rules = field_rules(limits)
        self.is_yan = is_yan

    def completion(self, body: bytes) -> tuple[dict[str, Any], list[Job]]:
        """The fields of a request to /v1/completions, and a job for every prompt."""
        fields = self._fields(body, "prompt")
        prompts = [fields["prompt"]] if isinstance(fields["prompt"], str) else fields["prompt"]
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise _wrong("prompt", fields["prompt"], "a string or a list of strings; token ids are not supported")
        for prompt in prompts:
            _check_unicode("prompt", prompt)
        return fields, self._jobs(fields, [self.tokenizer(prompt)["input_ids"] for prompt in prompts], "prompt")

    def chat(self, body: bytes) -> tuple[dict[str, Any], list[Job]]:
        """The fields of a request to /v1/chat/completions, and its job."""
        fields = self._fields(body, "messages")
        messages = fields["messages"]
        if not isinstance(messages, list) or not messages:
            raise _wrong("messages", messages, "a list of at least one message")
        if self.tokenizer.chat_template is None:
            raise RequestError("the model has no chat template: use /v1/completions", "messages")
        messages = [_message(message) for message in messages]
        try:
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise RequestError(f"messages: the chat template refuses them: {error}", "messages") from error
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return fields, self._jobs(fields, [ids], "messages")

    def _fields(self, body: bytes, needed: str) -> dict[str, Any]:
        """The checked fields of a body, without those that ask for nothing."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise RequestError("the body must be a JSON object")
        fields = {name: value for name, value in fields.items() if value is not None}
        if needed not in fields:
            raise RequestError(f"{needed}: must be given", needed)
        for name, value in fields.items():
            if name not in (needed, *IGNORED):
                self._check(name, value)
        return fields

    def _check(self, name: str, value: Any) -> None:
        if name in NEUTRAL:
            if value not in NEUTRAL[name] or isinstance(value, bool) != isinstance(NEUTRAL[name][0], bool):
                raise RequestError(f"{name}={reprlib.repr(value)}: not supported by this server", name)
            return
        if name not in self.rules or (name in OWN_FIELDS and not self.is_yan):
            # a name may be no valid Unicode
            raise RequestError(f"{reprlib.repr(name)}: no field of this server", ascii(name)[1:-1])
        is_allowed, allowed = self.rules[name]
        if not is_allowed(value):
            raise _wrong(name, value, allowed)

    def _jobs(self, fields: dict[str, Any], prompts: list[list[int]], name: str) -> list[Job]:
        limits, fields = self.limits, {**_stock_options(fields.get("generation_config")), **fields}
        for field in ("max_tokens", "temperature"):  # a generation config is checked as the fields are
            if field in fields:
                self._check(field, fields[field])
        number, temperature = fields.get("n", 1), fields.get("temperature", 0)
        if number > 1 and not temperature:
            raise _wrong("n", number, "1 unless temperature is above 0: without it there is one likeliest text")
        if number * len(prompts) > limits.texts:
            raise RequestError(f"{number * len(prompts)} texts: a request may ask for {limits.texts}", "n")
        longest = max(map(len, prompts))
        if longest > limits.prompt_tokens:
            message = f"{name}: has {longest} tokens, must have at most {limits.prompt_tokens}"
            raise RequestError(message, name, code="context_length_exceeded")
        stop = fields.get("stop", [])
        options = {
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "streams": fields.get("stream", False),
            "drafts": fields.get("stream", False) and fields.get("drafts", False),
        }
        settings = tuple(self._settings(fields, number, temperature).items())
        return [Job(tuple(ids), settings, **options) for ids in prompts]

    def _settings(self, fields: dict[str, Any], number: int, temperature: float) -> dict[str, Any]:
        """Keywords of `generate`."""
        new_tokens = fields.get("max_completion_tokens", fields.get("max_tokens", self.new_tokens))
        settings = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            settings |= {"temperature": float(temperature), "num_return_sequences": number, "seed": fields.get("seed")}
        own = {name: fields[name] for name in OWN_FIELDS if name in fields and name != "drafts"}
        return settings | own


def _wrong(name: str, value: Any, allowed: str) -> RequestError:
    return RequestError(f"{name}={reprlib.repr(value)}: must be {allowed}", name)


def _message(message: Any) -> dict[str, Any]:
    """A message with its text as one string."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise _wrong("messages", message, f"objects with a role, one of {', '.join(ROLES)}, and content")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise _wrong("messages", message, "objects whose content is a string or a list of parts of type text")
    _check_unicode("messages", content)
    return {"role": message["role"], "content": content}


def _check_unicode(name: str, text: str) -> None:
    """Raise RequestError for half a surrogate pair, which JSON may hold, and a tokenizer does not read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: is no valid Unicode: {error.reason}", name) from error


def _stock_options(text: str | None) -> dict[str, Any]:
    """Fields for what `transformers chat` sends as a generation config."""
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:  # of thousands of brackets
        raise _wrong("generation_config", text, "a JSON object as a string") from error
    if not isinstance(options, dict):
        raise _wrong("generation_config", text, "a JSON object as a string")
    options = {name: value for name, value in options.items() if value is not None}
    known = ("do_sample", "temperature", "max_new_tokens", "transformers_version")
    others = [name for name in options if name not in known]
    if others:
        raise RequestError(f"generation_config: {others[0]!r} is not supported by this server", "generation_config")
    fields = {"max_tokens": options["max_new_tokens"]} if "max_new_tokens" in options else {}
    if options.get("do_sample"):
        fields["temperature"] = options.get("temperature", 1.0)
    return fields
