"""Tasks made out of plain text: each formatter turns a text into a source and a target.

A formatter is `f(text, rng, mask_token) -> pair | None`; it works on words (whatever stands between white space) and
returns None for a text that the task can't use. `build_pairs` makes fixed sets out of many texts.

    python -m modeling_yan.data.tasks --file text.jsonl.gz --task infilling --num_rows 1000 --max_words 24 \
        --output infilling.jsonl
"""

import argparse
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from transformers import AutoTokenizer

from .rows import Row, read_rows, write_rows

CAPITAL = "A-ZÀ-ÖØ-Þ"
CLOSING = r"\"'\u201d\u2019)\]"  # inside a [...] of a pattern, with the curly quotes of print
OPENING = r"\"'\u201c\u2018(\["
ABBREVIATIONS = "".join(rf"(?<!\b{title})" for title in ("Mr", "Mrs", "Ms", "Dr", "St", "Messrs", f"[{CAPITAL}]"))
SENTENCE_END = re.compile(rf"{ABBREVIATIONS}[.!?]+[{CLOSING}]*(?=\s+[{OPENING}{CAPITAL}])")

LETTERS = r"[^\W\d_]+"
WORD = rf"(?<!\w){LETTERS}(?:['\u2019-]{LETTERS})*"
# The head is taken as short as possible, or "well-known." would be cut at its hyphen.
LAST_WORD = re.compile(rf"(?P<head>\S+\s.*?)(?P<word>{WORD})(?P<end>[.!?]+[{CLOSING}]*)", re.DOTALL)

FILL_IN = "Fill in."  # ends the source of infilling, so that target and source begin alike
CLASSIFICATION = "classification"  # not in TEXT_TASKS: it takes a label beside the text
TextTask = Callable[[str, random.Random, str], Row | None]


def infilling(
    text: str,
    rng: random.Random,
    mask_token: str,
    mask_ratio: float = 0.08,
    max_span_words: int = 3,
    count_tokens: Callable[[str], int] | None = None,
) -> Row | None:
    """Hide about `mask_ratio` of the words, at least one, in spans of 1 to `max_span_words`; restore the whole text.

    Each span becomes one mask token or, given `count_tokens`, as many as it has tokens; at least one word stays
    between two spans. The pair's `masked` lists the words of every span, in order. Its `answer_slot` is empty: a mask
    token that begins the source is none. White space is reduced to single spaces. None if the text has fewer than two
    words. Raises ValueError for a `mask_ratio` that is not from 0 to 0.5.
    """
    if not 0 <= mask_ratio <= 0.5:
        raise ValueError(f"mask_ratio={mask_ratio}: must be from 0 to 0.5")
    words = text.split()
    if len(words) < 2:
        return None
    spans = _draw_spans(len(words), mask_ratio, max_span_words, rng)
    masked = [" ".join(words[start:stop]) for start, stop in spans]
    starts = [0, *(stop for _, stop in spans)]
    stops = [*(start for start, _ in spans), len(words)]
    kept = [words[start:stop] for start, stop in zip(starts, stops)]
    masks = [mask_token * (count_tokens(span) if count_tokens else 1) for span in masked]
    shown = kept[0] + [word for mask, part in zip(masks, kept[1:]) for word in (mask, *part)]
    return {
        "source": " ".join([*shown, FILL_IN]),
        "target": " ".join(words),
        "task": "infilling",
        "masked": masked,
        "answer_slot": "",
    }


def last_word(text: str, rng: random.Random, mask_token: str, answer_slot: str = "") -> Row | None:
    """Cut the text at a random end of a sentence and hide the last word (letters, apostrophes, hyphens), the target.

    `answer_slot` begins the source, such as "<mask><mask> " for a model that fills in masks.
    None if that sentence does not end in a word with its full stop, or if no other word comes before.
    """
    sentences = split_sentences(text)
    cut = " ".join(sentences[: rng.randint(1, max(1, len(sentences)))])
    match = LAST_WORD.fullmatch(cut)
    if match is None:
        return None
    return {
        "source": f"{answer_slot}Last word: {match['head']}{mask_token}{match['end']}",
        "target": match["word"],
        "task": "last_word",
        **slot_field(answer_slot),
    }


def continuation(text: str, rng: random.Random, mask_token: str) -> Row | None:
    """Cut the text between two words of its middle half; what follows is the target. None below two words."""
    words = text.split()
    if len(words) < 2:
        return None
    cut = rng.randint(max(1, len(words) // 4), max(1, 3 * len(words) // 4))
    return {
        "source": " ".join(["Continue:", *words[:cut]]),
        "target": " ".join(words[cut:]),
        "task": "continuation",
    }


def classification(text: str, label: str, answer_slot: str = "") -> Row:
    """The text's label in words as the target; `answer_slot` as in `last_word`."""
    source = f"{answer_slot}Kind: {' '.join(text.split())}"
    return {"source": source, "target": label, "task": CLASSIFICATION, **slot_field(answer_slot)}


def slot_field(answer_slot: str) -> dict[str, str]:
    """What a pair says of the mask tokens that its source begins with; nothing where there are none."""
    return {"answer_slot": answer_slot} if answer_slot else {}


TEXT_TASKS: dict[str, TextTask] = {"infilling": infilling, "last_word": last_word, "continuation": continuation}


def split_sentences(text: str) -> list[str]:
    """Cut after `.`, `!`, `?` and closing quotes where a capital or an opening quote follows, but not after titles."""
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    parts = (text[start:stop].strip() for start, stop in pairwise(ends))
    return [part for part in parts if part]


def crop_sentences(text: str, max_words: int, rng: random.Random) -> str | None:
    """From a random sentence on, whole sentences of at most `max_words` words in all; None if every one is longer."""
    sentences = split_sentences(text)
    lengths = [len(sentence.split()) for sentence in sentences]
    starts = [start for start, length in enumerate(lengths) if length <= max_words]
    if not starts:
        return None
    start = rng.choice(starts)
    stop = start + 1
    while stop < len(sentences) and sum(lengths[start : stop + 1]) <= max_words:
        stop += 1
    return " ".join(sentences[start:stop])


def build_pairs(
    text_rows: Sequence[Row],
    task: str,
    num_rows: int,
    seed: int,
    max_words: int,
    mask_token: str = "<mask>",
    is_wanted: Callable[[Row], bool] = lambda pair: True,
    label_column: str | None = None,
    **details: Any,
) -> list[Row]:
    """Make `num_rows` pairs with different sources from texts in random order, each cropped to `max_words` words.

    Every text is used once before any is used again. Pairs that are not wanted are left out. `details` are handed to
    the task's formatter. Classification takes its labels from `label_column`.

    Raises:
        ValueError: the task is unknown, it lacks a column of labels, or the texts have little more to give (a whole
            round added nothing, or less than a pair for every 200 texts).
    """
    if task not in (*TEXT_TASKS, CLASSIFICATION):
        raise ValueError(f"unknown task {task!r}; known are {', '.join((*TEXT_TASKS, CLASSIFICATION))}")
    if task == CLASSIFICATION and not (text_rows and label_column in text_rows[0]):
        columns = ", ".join(text_rows[0]) if text_rows else "none, for there are no rows"
        raise ValueError(f"label_column={label_column!r}: must be a column of the rows, which have {columns}")
    rng = random.Random(seed)

    def make(row: Row, crop: str) -> Row | None:
        if label_column is not None and task == CLASSIFICATION:
            return classification(crop, row[label_column], **details)
        return TEXT_TASKS[task](crop, rng, mask_token, **details)

    pairs: dict[str, Row] = {}
    while len(pairs) < num_rows:
        before = len(pairs)
        for pair in _one_round(text_rows, make, max_words, rng):
            if is_wanted(pair):
                pairs.setdefault(pair["source"], pair)
            if len(pairs) == num_rows:
                break
        added = len(pairs) - before
        if len(pairs) < num_rows and added <= len(text_rows) // 200:  # the last ones would take rounds without end
            raise ValueError(f"{len(text_rows)} texts give only about {len(pairs)} of {num_rows} pairs ({max_words=})")
    return list(pairs.values())


def _one_round(
    text_rows: Sequence[Row], make: Callable[[Row, str], Row | None], max_words: int, rng: random.Random
) -> Iterator[Row]:
    """One pair for every text that gives one, in random order."""
    for row in rng.sample(text_rows, len(text_rows)):
        crop = crop_sentences(row["text"], max_words, rng)
        pair = make(row, crop) if crop else None
        if pair:
            yield pair


def _draw_spans(num_words: int, mask_ratio: float, max_span: int, rng: random.Random) -> list[tuple[int, int]]:
    """Spans (start, stop), sorted, that neither touch nor overlap and hide about `mask_ratio` of the words."""
    lengths = _draw_lengths(min(max(1, round(mask_ratio * num_words)), num_words // 2), max_span, rng)
    num_kept = num_words - sum(lengths)
    # A span stands before some kept word or after the last; a different gap for each, so that no two of them touch.
    gaps = sorted(rng.sample(range(num_kept + 1), len(lengths)))
    stops = [gap + hidden for gap, hidden in zip(gaps, accumulate(lengths))]
    return [(stop - length, stop) for stop, length in zip(stops, lengths)]


def _draw_lengths(total: int, max_span: int, rng: random.Random) -> list[int]:
    """Lengths of 1 to `max_span` that add up to `total`, in random order."""
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(rng.randint(1, max_span), total - sum(lengths)))
    rng.shuffle(lengths)  # the last one drawn tends to be short
    return lengths


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a fixed set of pairs from the command line."""
    parser = argparse.ArgumentParser(description="Turn a file of texts into source and target pairs of one task.")
    parser.add_argument("--file", required=True, help="a .jsonl or .jsonl.gz file of texts")
    parser.add_argument("--task", choices=[*TEXT_TASKS, CLASSIFICATION], required=True)
    parser.add_argument("--num_rows", type=int, required=True)
    parser.add_argument("--max_words", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mask_token", default="<mask>")
    parser.add_argument("--label_column", help="classification: the column of the rows that names their kind")
    parser.add_argument("--answer_slot", help="what begins a source of last_word or classification, '<mask><mask> '")
    parser.add_argument("--mask_ratio", type=float, help="share of the words that infilling hides, 0.08 if not given")
    parser.add_argument("--tokenizer", help="folder or hub name: infilling shows one mask for each hidden token of it")
    parser.add_argument("--max_target_tokens", type=int, help="leave out longer targets, in tokens of --tokenizer")
    parser.add_argument("--output", required=True, help="a .jsonl or .jsonl.gz file")
    options = parser.parse_args(arguments)
    write_rows(options.output, _build_chosen(options, parser.error))


def _build_chosen(options: argparse.Namespace, refuse: Callable[[str], None]) -> list[Row]:
    """The pairs that the options of the command line ask for."""
    details = {name: getattr(options, name) for name in ("answer_slot", "mask_ratio", "label_column")}
    details = {name: value for name, value in details.items() if value is not None}
    if options.max_target_tokens is not None and options.tokenizer is None:
        refuse("--max_target_tokens needs --tokenizer")
    if options.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)

        def count_tokens(text: str) -> int:
            return len(tokenizer.tokenize(text))

        if options.task == "infilling":
            details["count_tokens"] = count_tokens
        if options.max_target_tokens is not None:
            details["is_wanted"] = lambda pair: count_tokens(pair["target"]) <= options.max_target_tokens
    sizes = options.num_rows, options.seed, options.max_words
    return build_pairs(read_rows(options.file), options.task, *sizes, options.mask_token, **details)


if __name__ == "__main__":
    main()
