"""Rows that teach a model plain prompts, as a person types them: the last rounds of docs/checkpoints.md.

    python examples/experiments/plain_prompts.py --text_file text.jsonl.gz --tokenizer TOKENIZER \
        --output pairs.jsonl.gz

- stories: 45,000 in many wordings and 15,000 in the first one; an eighth of them begins with eight mask tokens, as
  prompts had to before a model had answer slots of its own;
- infilling: 60,000 texts (`--num_infilling`) with 8% or 35% of the words hidden; three quarters of them, or all with
  `--aligned`, show a mask for each hidden token, the others one for each gap; half end in "Fill in.";
- last words: 24,000; continuation: 18,000, the next sentence from the two before it.
"""

import argparse
import random
from collections.abc import Callable

from transformers import AutoTokenizer

from modeling_yan.data import build_pairs, generate_stories, read_rows, write_rows
from modeling_yan.data.tasks import crop_sentences, infilling, split_sentences

Row = dict[str, str]
MASK = "<mask>"
MAX_SOURCE, MAX_TARGET = 85, 39  # tokens
HELD_OUT = ((1, False), (987, False), (988, True))  # seeds of stories that are kept out, and whether wordings vary


def make_stories(number: int, rng: random.Random) -> list[Row]:
    """Stories, three quarters in many wordings, an eighth with typed answer slots."""
    held_out = {
        row["source"]
        for seed, varied in HELD_OUT
        for row in generate_stories(1000, seed, max_sentences=6, varied_wording=varied)
    }
    many = generate_stories(number * 3 // 4, 100, held_out, 6, varied_wording=True)
    rows = many + generate_stories(number // 4, 101, held_out, 6)
    return [{**row, "source": f"{MASK * 8} {row['source']}"} if rng.random() < 1 / 8 else row for row in rows]


def drawn(texts: list[Row], number: int, rng: random.Random, make: Callable[[str], Row | None]) -> list[Row]:
    """So many rows that `make` makes of texts in random order, each text once before any is used again."""
    rows = []
    while True:
        for text in rng.sample(texts, len(texts)):
            row = make(text["text"])
            rows += [row] if row else []
            if len(rows) == number:
                return rows


def make_rows(texts: list[Row], tokenizer, rng: random.Random, num_infilling: int, aligned: bool) -> list[Row]:
    """All rows, in random order."""

    def count(text: str) -> int:
        return len(tokenizer.tokenize(text))

    def fits(row: Row) -> bool:
        return count(row["source"]) <= MAX_SOURCE and count(row["target"]) <= MAX_TARGET

    def fill(text: str) -> Row | None:
        crop = crop_sentences(text, 18, rng)
        share, measure = rng.choice((0.08, 0.35)), count if aligned or rng.random() < 0.75 else None
        row = crop and infilling(crop, rng, MASK, share, 3, measure)
        if not row or not fits(row):
            return None
        return {**row, "source": row["source"].removesuffix(" Fill in.")} if rng.random() < 0.5 else row

    def go_on(text: str) -> Row | None:
        sentences = split_sentences(" ".join(text.split()))
        if len(sentences) < 3:
            return None
        start = rng.randrange(len(sentences) - 2)
        row = {"source": " ".join(sentences[start : start + 2]), "target": sentences[start + 2]}
        return row if fits(row) else None

    words = build_pairs(
        texts, "last_word", 24_000, 3, 26, is_wanted=lambda row: fits(row) and count(row["target"]) == 1
    )
    rows = make_stories(60_000, rng) + words
    rows += drawn(texts, num_infilling, rng, fill) + drawn(texts, 18_000, rng, go_on)
    return [{name: row[name] for name in ("source", "target")} for row in rng.sample(rows, len(rows))]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_file", required=True, help="rows of text, .jsonl or .jsonl.gz")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--num_infilling", type=int, default=60_000, help="rows of infilling")
    parser.add_argument("--aligned", action="store_true", help="show a mask for each hidden token in all of them")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    texts, rng = list(read_rows(options.text_file)), random.Random(0)
    write_rows(options.output, make_rows(texts, tokenizer, rng, options.num_infilling, options.aligned))


if __name__ == "__main__":
    main()
