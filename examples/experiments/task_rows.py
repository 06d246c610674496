"""Rows of the tasks for `tasks.py` that their public files hold in another form.

    python examples/experiments/task_rows.py --data_dir DATA --output_dir ROWS

DATA holds `e2e-{validation,test}.jsonl.gz`, `scan-{train,test}.jsonl.gz`, the three parts of `agnews`, `dbpedia` and
`babi`, and `tinystories_lastword-validation.jsonl.gz` (`source` and `target`), and
`tinystories-{train,validation}.jsonl.gz`, `fairytaleqa_sections-{train,validation,test}.jsonl.gz`, and
`{wikitext103,narrativeqa_summaries}-{validation,test}.jsonl.gz` (`text`).
`--tasks` names some of them. ROWS gets the train, validation and test files of

- e2e: a tenth of the development part's sources is for validation, the rest to train on;
- continuation: the next sentence of a story from the three before it. Stories of TinyStories' validation part are
  shared between validation and test, in turn;
- scan: an action is one word (`TURNLEFT` for `I_TURN_LEFT`), so that it is one token. The last tenth of the training
  rows, in random order, is for validation;
- agnews, dbpedia: the class as lower-case words, which every tokenizer can write ("sci tech", "natural place");
- babi: all twenty tasks, without commas in the answer. Training rows that are in the test part, too, are left out; of
  every task 100 test rows are measured;
- lastword: the last word of a sentence from the story up to it. To train on, that of every sentence of TinyStories'
  training part. The validation rows are shared between validation and test, in turn;
- maskedword: the word of a sentence in whose place there is [MASK]. To train on, four words of every sentence in nine
  tenths of WikiText's and NarrativeQA's validation parts; of the last tenth, and of the test parts, one.
"""

import argparse
import random
import re
from functools import partial
from pathlib import Path

from modeling_yan.data import read_rows, write_rows
from modeling_yan.data.tasks import split_sentences

NUM_BEFORE = 3  # sentences that are given
MAX_WORDS = 24  # of the sentence that is asked for
PARTS = ("train", "validation", "test")
ROWS_OF_A_TASK = 100  # of bAbI's test part
LEAST_WORDS, MOST_WORDS = 12, 80  # of a story before its last word, as in the public rows
MASK, MASKED_TEXTS = "[MASK]", ("wikitext103", "narrativeqa_summaries")
LEAST_AROUND, MOST_AROUND = 8, 40  # words of a sentence with a masked word


def continuations(text: str) -> list[dict[str, str]]:
    """A row for every fourth sentence of a text, so that no sentence is a target twice or given twice."""
    sentences, rows = split_sentences(" ".join(text.split())), []
    for place in range(NUM_BEFORE, len(sentences), NUM_BEFORE + 1):
        if len(sentences[place].split()) <= MAX_WORDS:
            source = " ".join(sentences[place - NUM_BEFORE : place])
            rows.append({"source": source, "target": sentences[place]})
    return rows


def continuation_parts(data_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of story continuation, by part."""
    stories = read_rows(data_dir / "tinystories-validation.jsonl.gz")
    texts = {
        "train": read_rows(data_dir / "tinystories-train.jsonl.gz"),
        "validation": stories[::2],
        "test": stories[1::2],
    }
    for part, rows in texts.items():
        rows += read_rows(data_dir / f"fairytaleqa_sections-{part}.jsonl.gz")
    return {part: [row for text in rows for row in continuations(text["text"])] for part, rows in texts.items()}


def e2e_parts(data_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of restaurant descriptions, by part; all references of a source are in one part."""
    rows = read_rows(data_dir / "e2e-validation.jsonl.gz")
    sources = sorted({row["source"] for row in rows})
    held_out = set(random.Random(0).sample(sources, len(sources) // 10))
    return {
        "train": [row for row in rows if row["source"] not in held_out],
        "validation": [row for row in rows if row["source"] in held_out],
        "test": read_rows(data_dir / "e2e-test.jsonl.gz"),
    }


def scan_parts(data_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of commands, by part."""
    parts = {
        part: [{**row, "target": row["target"].replace("I_", "").replace("_", "")} for row in rows]
        for part, rows in ((part, read_rows(data_dir / f"scan-{part}.jsonl.gz")) for part in ("train", "test"))
    }
    rows = random.Random(0).sample(parts["train"], len(parts["train"]))
    cut = len(rows) * 9 // 10
    return {"train": rows[:cut], "validation": rows[cut:], "test": parts["test"]}


def class_parts(data_dir: Path, name: str) -> dict[str, list[dict[str, str]]]:
    """The rows of a classification by part, the class as words.

    Only DBpedia's training part has spaces around punctuation. With them a model from scratch would be tested on other
    words than those it has learned.
    """

    def words(label: str) -> str:
        return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+", label)).lower()

    def joined(text: str) -> str:
        return re.sub(r"(?<=[(\[]) +| +(?=[.;:!?)\]]|'s\b)", "", text) if name == "dbpedia" else text

    return {
        part: [{"source": joined(row["source"]), "target": words(row["target"])} for row in rows]
        for part, rows in ((part, read_rows(data_dir / f"{name}-{part}.jsonl.gz")) for part in PARTS)
    }


def babi_parts(data_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of the twenty tasks, by part."""
    parts = {
        part: [{**row, "target": row["target"].replace(",", " ")} for row in rows]
        for part, rows in ((part, read_rows(data_dir / f"babi-{part}.jsonl.gz")) for part in PARTS)
    }
    seen = {row["source"].lower() for row in parts["test"]}
    by_task: dict[str, list] = {}
    for row in random.Random(0).sample(parts["test"], len(parts["test"])):
        by_task.setdefault(row["task"], []).append(row)
    return {
        "train": [row for row in parts["train"] if row["source"].lower() not in seen],
        "validation": parts["validation"],
        "test": [row for rows in by_task.values() for row in rows[:ROWS_OF_A_TASK]],
    }


def last_words(text: str) -> list[dict[str, str]]:
    """A row for every sentence of a story that ends with a word."""
    rows, before = [], ""
    for sentence in split_sentences(" ".join(text.split())):
        start, _, word = sentence.rpartition(" ")
        word, source = word.strip(".,!?;:\"'"), f"{before} {start}".strip()
        if word.isalpha() and LEAST_WORDS <= len(source.split()) <= MOST_WORDS:
            rows.append({"source": source, "target": word})
        before = f"{before} {sentence}".strip()
    return rows


def last_word_parts(data_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of last words, by part."""
    rows = read_rows(data_dir / "tinystories_lastword-validation.jsonl.gz")
    held_out = {row["source"] for row in rows}
    train = [row for text in read_rows(data_dir / "tinystories-train.jsonl.gz") for row in last_words(text["text"])]
    return {
        "train": [row for row in train if row["source"] not in held_out],
        "validation": rows[::2],
        "test": rows[1::2],
    }


def masked_words(texts: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    """Rows of this many words of every sentence, each masked alone."""
    rows, chance = [], random.Random(0)
    for text in texts:
        for sentence in split_sentences(" ".join(text["text"].split())):
            words = sentence.split()
            places = [place for place, word in enumerate(words) if word.isalpha()]
            if LEAST_AROUND <= len(words) <= MOST_AROUND and len(places) >= LEAST_AROUND:
                for place in chance.sample(places, number):
                    source = " ".join([*words[:place], MASK, *words[place + 1 :]])
                    rows.append({"source": source, "target": words[place]})
    return rows


def masked_word_parts(data_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of masked words, by part; all rows of a text are in one part."""
    texts = {
        part: [row for name in MASKED_TEXTS for row in read_rows(data_dir / f"{name}-{part}.jsonl.gz")]
        for part in ("validation", "test")
    }
    train = [text for number, text in enumerate(texts["validation"]) if number % 10]
    parts = {"train": masked_words(train, 4), "validation": masked_words(texts["validation"][::10], 1)}
    test = masked_words(texts["test"], 1)
    return {**parts, "test": random.Random(0).sample(test, len(test))}


TASKS = {
    "e2e": e2e_parts,
    "continuation": continuation_parts,
    "scan": scan_parts,
    "agnews": partial(class_parts, name="agnews"),
    "dbpedia": partial(class_parts, name="dbpedia"),
    "babi": babi_parts,
    "lastword": last_word_parts,
    "maskedword": masked_word_parts,
}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="all if left out")
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        for part, rows in TASKS[task](options.data_dir).items():
            write_rows(options.output_dir / f"{task}-{part}.jsonl.gz", rows)
            print(task, part, len(rows), "rows")


if __name__ == "__main__":
    main()
