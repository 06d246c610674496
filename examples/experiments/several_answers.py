"""Rows for the smallest task on which several answers are right, for `tasks.py`.

    python examples/experiments/several_answers.py --output_dir DATA
    python examples/experiments/tasks.py configuration/recipes/tasks/several_answers.yaml --data_dir DATA \
        --output_dir results/several_answers --table docs/results/several_answers/table.json

Every prompt has three answers of three words. Two of them (0.3 of the rows each) begin with the same word, so that the
most probable first word is theirs. The most probable second and third words are those of the third answer (0.4). A
model that decodes every word independently mixes them, and its text is no answer.
"""

import argparse
import random
from pathlib import Path

from modeling_yan.data import write_rows

SHARES = (3, 3, 4)  # of ten rows
WORDS_OF_ANSWERS = ((0, 1, 2), (0, 3, 4), (5, 6, 7))
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def make_words(number: int) -> list[str]:
    """So many different words of two syllables."""
    syllables = [consonant + vowel for vowel in VOWELS for consonant in CONSONANTS]
    words = [first + second for second in syllables for first in syllables]
    return random.Random(0).sample(words, number)


def make_answers(num_prompts: int) -> dict[str, list[str]]:
    """Each prompt and its three answers."""
    words = iter(make_words(num_prompts * 9))
    answers = {}
    for _ in range(num_prompts):
        prompt, *own = (next(words) for _ in range(9))
        answers[prompt] = [" ".join(own[word] for word in answer) for answer in WORDS_OF_ANSWERS]
    return answers


def draw_rows(answers: dict[str, list[str]], number: int, seed: int) -> list[dict[str, str]]:
    """Rows of prompts, evenly, and answers, each as often as it is right."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        prompt = rng.choice(list(answers))
        rows.append({"source": prompt, "target": rng.choices(answers[prompt], SHARES)[0]})
    return rows


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_prompts", type=int, default=4)
    parser.add_argument("--num_rows", type=int, default=4000, help="to train on")
    options = parser.parse_args(arguments)
    answers = make_answers(options.num_prompts)
    exact = [
        {"source": prompt, "target": answer}
        for prompt, texts in answers.items()
        for answer, share in zip(texts, SHARES, strict=True)
        for _ in range(share)
    ]
    parts = {"train": draw_rows(answers, options.num_rows, 1), "validation": draw_rows(answers, 200, 2), "test": exact}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write_rows(options.output_dir / f"several_answers-{part}.jsonl.gz", rows)


if __name__ == "__main__":
    main()
