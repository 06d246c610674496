"""Data sets by name: where each is, which columns it has, and how one of its raw rows becomes a source and a target.

The eight of the paper, in the copies on the hub that are plain data files (no loading script), and what works offline.
Texts become pairs through the tasks of `tasks.py`; the others have their prompt here: what there is to read comes
first, the question or a short instruction last.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from .rows import Row
from .tasks import CLASSIFICATION, TEXT_TASKS, crop_sentences

TEXT = "text"  # the task that leaves a text as it is
QUESTION_ANSWERING = "question_answering"
LEARNED_WHERE = {"answer_slot": str, "in_place": bool}  # of a pair, and their types; see `modeling_yan.data.encoding`

SST2_LABELS = ("negative", "positive")
AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
DBPEDIA_LABELS = (
    "Company",
    "EducationalInstitution",
    "Artist",
    "Athlete",
    "OfficeHolder",
    "MeanOfTransportation",
    "Building",
    "NaturalPlace",
    "Village",
    "Animal",
    "Plant",
    "Album",
    "Film",
    "WrittenWork",
)


class SkippedRow(Exception):
    """A row in order that gives no pair; the message says why."""


@dataclass(frozen=True)
class FormatOptions:
    """How a row becomes a pair.

    Args:
        task: For data sets of texts: one of `TEXT_TASKS`, or "text" to leave the text as it is; None for the data
            set's own.
        mask_token: Stands for hidden words.
        answer_slot: Begins every source but those of infilling, such as "<mask><mask> " for a model that fills in
            masks.
        max_words: Texts are cropped to whole sentences of at most this many words before they become pairs.
        details: Further arguments of the task's formatter, such as `mask_ratio`.
    """

    task: str | None = None
    mask_token: str = "<mask>"
    answer_slot: str = ""
    max_words: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Args:
        family: The kind of task it is used for.
        columns: What `formatter` is called with; "document.summary.text" is a field inside the column `document`.
        formatter: Returns a text, which a text task makes into a pair, or a row with source and target; raises
            SkippedRow for a row that has nothing to learn.
        hub_name, config_name: For `datasets.load_dataset`; None where the rows don't come from the hub.
        splits: The names of its splits.
        task: What texts are made into unless the options say otherwise; None if the formatter makes pairs.
        label_names: Of the column `label`, in order.
        extra: What a pair has besides source and target.
        optional: Those of `LEARNED_WHERE` that a pair keeps as they are; None for a data set that has none.
    """

    name: str
    family: str
    columns: tuple[str, ...]
    formatter: Callable[..., str | Row]
    hub_name: str | None = None
    config_name: str | None = None
    splits: tuple[str, ...] = ("train", "validation", "test")
    task: str | None = None
    label_names: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    optional: tuple[str, ...] | None = None

    def format_row(self, row: Any, rng: random.Random, options: FormatOptions | None = None) -> Row:
        """Turn a raw row, in the data set's own columns, into a text or a pair; `rng` draws what is random.

        Raises:
            SkippedRow: the row is in order but gives nothing: no answer, no label, an empty or too short text.
            ValueError: a column is missing (the message names the data set, the column and those there are) or holds
                something of the wrong type, or the data set can't do the task.
        """
        options = options or FormatOptions()
        task = self.choose_task(options)
        made = self.formatter(*(self.look_up(row, column) for column in self.columns))
        if isinstance(made, str):
            made = _use_text(made, cast(str, task), rng, options)
        if not made["target" if "target" in made else "text"].strip():
            raise SkippedRow("empty target" if "target" in made else "empty text")
        made |= {name: _check_type(row.get(name), name) for name in self.optional or ()}
        if options.answer_slot and "source" in made and task != "infilling" and not made.get("in_place"):
            slot = options.answer_slot + (made.get("answer_slot") or "")
            made |= {"source": options.answer_slot + made["source"], "answer_slot": slot}
        return made

    def choose_task(self, options: FormatOptions) -> str | None:
        """The text task of the rows; None for a data set of pairs. ValueError for one that the data set can't do."""
        allowed = (TEXT, *TEXT_TASKS) if self.task else ()
        if options.task and options.task not in allowed:
            raise ValueError(
                f"{self.name}: task is {options.task!r}, but must be {_any_of(allowed)}"
                if allowed
                else f"{self.name}: task is {options.task!r}, but its rows are pairs already, so it must be None"
            )
        return options.task or self.task

    def made_columns(self, options: FormatOptions) -> tuple[str, ...]:
        """The columns of the rows that `format_row` makes."""
        task = self.choose_task(options)
        if task == TEXT:
            return ("text",)
        if task == "infilling":
            return ("source", "target", "task", "masked", "answer_slot")
        extra = ("task",) if task else self.extra
        names = (
            "source",
            "target",
            *extra,
            *(self.optional or ()),
            *(("answer_slot",) if options.answer_slot else ()),
        )
        return tuple(dict.fromkeys(names))

    def look_up(self, row: Any, column: str) -> Any:
        """The value of a column, or of a field inside it if the name has dots."""
        value, there = row, "rows"
        for part in [column] if isinstance(row, Mapping) and column in row else column.split("."):
            if not isinstance(value, Mapping):
                raise ValueError(f"{self.name}: {there} holds {type(value).__name__}, not an object")
            if part not in value:
                names = ", ".join(map(repr, value)) or "none"
                inside = "" if there == "rows" else f" inside {there!r}"
                raise ValueError(f"{self.name}: the column {column!r} is missing; there are{inside} {names}")
            value, there = value[part], part
        return value


def _check_type(value: Any, name: str) -> Any:
    """The value of one of `LEARNED_WHERE`. Raises ValueError if it is of another type, which Arrow would convert."""
    if value is not None and not isinstance(value, LEARNED_WHERE[name]):
        raise ValueError(f'"{name}" is {type(value).__name__}, not a {LEARNED_WHERE[name].__name__}')
    return value


def _use_text(text: str, task: str, rng: random.Random, options: FormatOptions) -> Row:
    if task == TEXT or not text.strip():
        return {"text": text}
    crop = crop_sentences(text, options.max_words, rng) if options.max_words else text
    if not crop:
        raise SkippedRow(f"no sentence of at most {options.max_words} words")
    pair = TEXT_TASKS[task](crop, rng, options.mask_token, **options.details)
    if not pair:
        raise SkippedRow(f"too short, or its end not of the form that {task} needs")
    return pair


def format_text(text: Any) -> str:
    """A text as it is."""
    if not isinstance(text, str):
        raise ValueError(f'"text" is {type(text).__name__}, not a string')
    return text


def format_pair(source: Any, target: Any) -> Row:
    """A pair as it is."""
    for key, value in (("source", source), ("target", target)):
        if not isinstance(value, str):
            raise ValueError(f'"{key}" is {type(value).__name__}, not a string')
    return {"source": source, "target": target}


def _format_story(source: Any, target: Any, kind: Any) -> Row:
    return {**format_pair(source, target), "kind": kind}


def _format_squad(context: Any, question: Any, answers: Any) -> Row:
    """The target is the first answer; `answers` has every different one."""
    different = list(dict.fromkeys(_one_line(answer, "answers") for answer in answers or ()))
    if not different:
        raise SkippedRow("no answer")
    return {**_ask(context, question, different[0]), "answers": different}


def _format_babi(passage: Any, question: Any, answer: Any, task: Any) -> Row:
    return {**_ask(passage, question, _one_line(answer, "answer")), "kind": f"qa{task}"}


def _ask(context: Any, question: Any, answer: str) -> Row:
    source = f"{_one_line(context, 'context')} Question: {_one_line(question, 'question')}"
    return {"source": source, "target": answer, "task": QUESTION_ANSWERING}


def _classify(*texts_and_label: Any, label_names: tuple[str, ...], instruction: str) -> Row:
    *texts, label = texts_and_label
    if label is None or label == -1:  # test splits whose labels were never published
        raise SkippedRow("no label")
    if type(label) is not int or not 0 <= label < len(label_names):
        allowed = ", ".join(f"{number} ({name})" for number, name in enumerate(label_names))
        raise ValueError(f'"label" is {label!r}, but must be {allowed}, or -1 for none')
    text = ": ".join(_one_line(text, "text") for text in texts)
    return {"source": f"{text} {instruction}", "target": label_names[label], "task": CLASSIFICATION}


def _one_line(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f'"{name}" is {type(text).__name__}, not a string')
    return " ".join(text.split())


def _any_of(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


def _classification(
    name: str,
    hub_name: str,
    splits: tuple[str, ...],
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    instruction: str,
) -> DatasetSpec:
    formatter = partial(_classify, label_names=labels, instruction=instruction)
    columns = (*texts, "label")
    extra = ("task",)
    return DatasetSpec(name, CLASSIFICATION, columns, formatter, hub_name, None, splits, None, labels, extra)


_SPECS = (
    # One row a question, so a summary comes about thirty times, each time with other words hidden.
    DatasetSpec(
        "narrativeqa",
        "infilling",
        ("document.summary.text",),
        format_text,
        hub_name="deepmind/narrativeqa",
        task="infilling",
    ),
    # The original is behind a form; this copy is train.txt and test.txt with a story a line.
    DatasetSpec(
        "rocstories",
        "last_word",
        ("text",),
        format_text,
        hub_name="mintujupally/ROCStories",
        splits=("train", "test"),
        task="last_word",
    ),
    DatasetSpec(
        "simplestories",
        "last_word",
        ("story",),
        format_text,
        hub_name="SimpleStories/SimpleStories",
        splits=("train", "test"),
        task="last_word",
    ),
    DatasetSpec(
        "squad",
        QUESTION_ANSWERING,
        ("context", "question", "answers.text"),
        _format_squad,
        hub_name="rajpurkar/squad",
        splits=("train", "validation"),
        extra=("task", "answers"),
    ),
    # facebook/babi_qa has a loading script, which today's datasets doesn't run; this copy is JSON lines.
    DatasetSpec(
        "babi",
        QUESTION_ANSWERING,
        ("passage", "question", "answer", "task"),
        _format_babi,
        hub_name="Muennighoff/babi",
        extra=("task", "kind"),
    ),
    _classification(
        "sst2",
        "stanfordnlp/sst2",
        ("train", "validation", "test"),  # test has no labels
        ("sentence",),
        SST2_LABELS,
        "Sentiment?",
    ),
    _classification("ag_news", "fancyzhx/ag_news", ("train", "test"), ("text",), AG_NEWS_LABELS, "Topic?"),
    _classification(
        "dbpedia", "fancyzhx/dbpedia_14", ("train", "test"), ("title", "content"), DBPEDIA_LABELS, "Category?"
    ),
    *(DatasetSpec(f"text_{task}", task, ("text",), format_text, splits=(), task=task) for task in TEXT_TASKS),
    DatasetSpec("stories", QUESTION_ANSWERING, ("source", "target", "kind"), _format_story, extra=("kind",)),
)

REGISTRY: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}
