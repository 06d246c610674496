"""Texts for a batch of jobs: those with equal settings are written by one call of `generate`."""

import logging
import queue
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .requests import Job

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..modeling_yan import YanForFlowGeneration


logger = logging.getLogger(__name__)
# of one job: {"index", "text", "finish", "tokens"}, {"index", "draft"} or {"error", "status"}
Pieces = list[dict[str, Any]]


class Text:
    """One text as it grows, and how it ends."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", eos: set[int], stop: tuple[str, ...], limit: int) -> None:
        self.tokenizer, self.eos, self.stop, self.limit = tokenizer, eos, stop, limit
        self.ids: list[int] = []
        self.sent = ""
        self.finish: str | None = None

    def extend(self, ids: list[int], is_over: bool = False) -> str:
        """What the next tokens add to the text, the last ones if `is_over`.

        What a stop string or half a letter may begin with is held back until more is known.
        """
        for token in ids:
            self.ids.append(token)
            if token in self.eos or len(self.ids) >= self.limit:
                self.finish = "stop" if token in self.eos else "length"
                break
        text = self._decode(self.ids)
        ends = [text.find(stop) for stop in self.stop if stop in text]
        if ends:
            text, self.finish = text[: min(ends)], "stop"
        elif is_over:
            self.finish = self.finish or "length"
        elif self.finish is None:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._held(text)]
        new, self.sent = text[len(self.sent) :], max(text, self.sent, key=len)
        return new

    def draft(self, ids: list[int]) -> str:
        """What would follow if these tokens were the next ones."""
        end = next((place for place, token in enumerate(ids) if token in self.eos), len(ids))
        return self._decode(self.ids + ids[:end])[len(self.sent) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _held(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)


class Canvases:
    """A streamer that hands on what is written, from the thread that writes."""

    END = object()

    def __init__(self, wants_drafts: bool) -> None:
        self.events: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.has_prompt = False
        if wants_drafts:
            self.put_draft = lambda tokens: self.events.put(("draft", tokens.tolist()))

    def put(self, tokens: "torch.Tensor") -> None:
        """The prompt, which is passed over, and then canvases (B, L), or (B,) tokens of a model that writes one."""
        if self.has_prompt:
            self.events.put(("canvas", (tokens if tokens.dim() == 2 else tokens.unsqueeze(1)).tolist()))
        self.has_prompt = True

    def end(self) -> None:
        """The end of the call is waited for instead, which may also be an error."""


class BatchWriter:
    """Writes batches of jobs with a model, in one thread of its own."""

    def __init__(
        self, model: "YanForFlowGeneration", tokenizer: "PreTrainedTokenizerBase", threads: int | None = None
    ) -> None:
        import torch

        self.model, self.tokenizer = model, tokenizer
        eos = model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        set_up: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (threads,)}
        self.thread = ThreadPoolExecutor(1, **({} if threads is None else set_up))

    def write(self, jobs: list[Job]) -> Iterator[list[Pieces]]:
        """Rounds of news, in each of them the pieces of every job."""
        for numbers in group_jobs(jobs):
            members = [jobs[number] for number in numbers]
            try:
                for pieces in self._write_group(members):
                    yield _spread(pieces, numbers, len(jobs))
            except Exception as error:
                is_input = isinstance(error, ValueError)
                if not is_input:
                    logger.exception("a batch of %d jobs failed", len(members))
                found = {"error": str(error) if is_input else "internal error", "status": 400 if is_input else 500}
                yield _spread([[found]] * len(members), numbers, len(jobs))

    def _write_group(self, jobs: list[Job]) -> Iterator[list[Pieces]]:
        settings = {name: value for name, value in jobs[0].settings if value is not None}
        repeats = settings.get("num_return_sequences", 1)
        limit = settings["max_new_tokens"]
        texts = [[Text(self.tokenizer, self.eos, job.stop, limit) for _ in range(repeats)] for job in jobs]
        streamer = Canvases(jobs[0].drafts) if any(job.streams for job in jobs) and repeats == 1 else None
        if streamer is None:
            yield _extended(texts, self.thread.submit(self._generate, jobs, settings).result(), is_over=True)
            return
        call = self.thread.submit(self._generate, jobs, settings, streamer)
        call.add_done_callback(lambda _: streamer.events.put((Canvases.END, None)))
        for kind, rows in iter(streamer.events.get, (Canvases.END, None)):
            yield _extended(texts, rows) if kind == "canvas" else _drafts(texts, rows)
        call.result()  # its error, if there is one
        yield _extended(texts, [[]] * len(texts), is_over=True)

    def _generate(
        self, jobs: list[Job], settings: dict[str, Any], streamer: Canvases | None = None
    ) -> list[list[int]]:
        """Ids of the new tokens of every text."""
        import torch

        settings = dict(settings)
        if self.model.config.model_type != "yan" and settings.pop("seed", None) is not None:
            torch.manual_seed(dict(jobs[0].settings)["seed"])
        inputs = self.tokenizer.pad(
            {"input_ids": [list(job.ids) for job in jobs]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        sequences = self.model.generate(**inputs, **settings, streamer=streamer)
        return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def group_jobs(jobs: list[Job]) -> list[list[int]]:
    """Numbers of the jobs that one call of `generate` can write.

    A drawn text with a seed stands alone: what is drawn for a row depends on its place in the batch.
    """
    groups = defaultdict(list)
    for number, job in enumerate(jobs):
        is_seeded = dict(job.settings).get("seed") is not None
        groups[job.settings, job.drafts, number if is_seeded else None].append(number)
    return list(groups.values())


def _spread(pieces: list[Pieces], numbers: list[int], num_jobs: int) -> list[Pieces]:
    round_: list[Pieces] = [[] for _ in range(num_jobs)]
    for number, found in zip(numbers, pieces, strict=True):
        round_[number] = found
    return round_


def _extended(texts: list[list[Text]], rows: list[list[int]], is_over: bool = False) -> list[Pieces]:
    """The pieces of every job after more tokens of its texts, the last ones if `is_over`."""
    news, next_rows = [], iter(rows)
    for choices in texts:
        pieces = []
        for index, text in enumerate(choices):
            ids = next(next_rows)
            if text.finish is None:
                new = text.extend(ids, is_over)
                pieces.append({"index": index, "text": new, "finish": text.finish, "tokens": len(text.ids)})
        news.append(pieces)
    return news


def _drafts(texts: list[list[Text]], rows: list[list[int]]) -> list[Pieces]:
    return [
        [] if choices[0].finish else [{"index": 0, "draft": choices[0].draft(row)}]
        for choices, row in zip(texts, rows, strict=True)
    ]
