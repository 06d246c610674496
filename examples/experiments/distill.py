"""Pairs whose targets a teacher has written: distillation on whole texts (Kim and Rush, arXiv 1606.07947).

    python examples/experiments/distill.py --model decoder --data pairs.jsonl.gz --tasks last_word classification \
        --max_new_tokens 8 --output distilled.jsonl.gz

Several right answers to one prompt are what models that write all tokens at once find hard; a teacher that writes
token by token decides on one. Of the rows, those whose `task` is named get the teacher's answer for their target and
keep their own as `reference`, all others stay as they are, as do rows that the teacher answers with nothing. An
autoregressive teacher writes its greedy answer.
"""

import argparse

from transformers import AutoTokenizer

import modeling_yan.baselines  # noqa: F401  registers the classes
from modeling_yan.data import read_rows, write_rows
from modeling_yan.evaluation import generate_answers, load_for_generation


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the teacher, a folder or hub name")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument(
        "--tasks", nargs="+", help="values of the rows' task that the teacher answers; all if not given"
    )
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", required=True, help="a .jsonl or .jsonl.gz")
    options = parser.parse_args(arguments)
    rows = read_rows(options.data)
    if not all("target" in row for row in rows):
        parser.error(f"--data {options.data}: must have rows with source and target, not with text")
    chosen = [row for row in rows if options.tasks is None or row.get("task") in options.tasks]
    if not chosen:
        tasks = sorted({str(row.get("task")) for row in rows})
        parser.error(f"--tasks {' '.join(options.tasks)}: the rows have {', '.join(tasks)}")
    chosen.sort(key=lambda row: len(row["source"]))  # rows of one batch are of one length
    model, tokenizer = load_for_generation(options.model, options.device), AutoTokenizer.from_pretrained(options.model)
    sizes = {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}
    answers = generate_answers(model, tokenizer, [row["source"] for row in chosen], do_sample=False, **sizes)
    num_written = num_equal = 0
    for row, answer in zip(chosen, answers):
        if answer:
            num_written, num_equal = num_written + 1, num_equal + (answer == row["target"])
            row["reference"], row["target"] = row["target"], answer
    write_rows(options.output, rows)
    print(f"{num_written} of {len(rows)} targets are the teacher's, {num_equal} of them as they were")


if __name__ == "__main__":
    main()
