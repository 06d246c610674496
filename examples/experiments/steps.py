"""Quality against the number of solver steps, of one checkpoint.

    python examples/experiments/steps.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl \
        --steps 1 2 3 4 6 8 16 64 --output results/steps

Deterministic generation without the reference's length: exact match and ROUGE-L with 95% bootstrap intervals, seconds
a row, and a paired permutation test of every number of steps against the last one. Writes steps.json and steps.png.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.data import read_rows
from modeling_yan.evaluation import (
    exact_match_scores,
    generate_timed,
    mean_with_interval,
    paired_permutation_test,
    rouge_scores,
)
from modeling_yan.training import expand_recipe
from modeling_yan.visualization import saved_figure

FIGURES = ("exact_match", "rougeL")


def measure(model, tokenizer, rows, steps: int, **options) -> dict:
    """Scores of every row with so many steps, and the seconds that a row took."""
    result = generate_timed(model, tokenizer, [row["source"] for row in rows], num_flow_steps=steps, **options)
    wanted = [row["target"] for row in rows]
    scores = {"exact_match": exact_match_scores(result.texts, wanted), **rouge_scores(result.texts, wanted)}
    return {"scores": {name: scores[name] for name in FIGURES}, "seconds_per_row": result.seconds / len(rows)}


def summarize(runs: dict[int, dict]) -> list[dict]:
    """A row per number of steps: each figure's mean, interval and p-value against the last number of steps."""
    last, table = list(runs.values())[-1]["scores"], []
    for steps, run in runs.items():
        row = {"steps": steps, "seconds_per_row": run["seconds_per_row"]}
        for name, scores in run["scores"].items():
            mean, low, high = mean_with_interval(scores)
            row[name] = {"mean": mean, "low": low, "high": high, "p": paired_permutation_test(scores, last[name])}
        table.append(row)
    return table


def draw(table: list[dict], title: str, path: Path):
    """Both figures against the number of steps, with their intervals."""
    with saved_figure(path, 6, 4) as figure:
        axis = figure.subplots()
        steps = [row["steps"] for row in table]
        for name, label in zip(FIGURES, ("exact match", "ROUGE-L")):
            means = [row[name]["mean"] for row in table]
            lows, highs = ([abs(row[name][end] - row[name]["mean"]) for row in table] for end in ("low", "high"))
            axis.errorbar(steps, means, [lows, highs], marker="o", capsize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, steps)
        axis.minorticks_off()
        axis.set(xlabel="Euler steps", ylim=(0, 1), title=title)
        axis.grid(alpha=0.3)
        axis.legend()


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a YAN")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 16, 64])
    parser.add_argument("--num_rows", type=int, default=500)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--canvas_length", type=int, help="tokens written at once; the model's if not given")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for steps.json and steps.png")
    options = parser.parse_args(expand_recipe(parser, arguments))
    torch.set_num_threads(options.threads)
    rows = read_rows(options.data)[: options.num_rows]
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = {"batch_size": options.batch_size, "do_sample": False, "max_new_tokens": options.max_new_tokens}
    settings |= {"canvas_length": options.canvas_length} if options.canvas_length else {}
    runs = {}
    for steps in options.steps:
        runs[steps] = measure(model, tokenizer, rows, steps, **settings)
        mean = sum(runs[steps]["scores"]["exact_match"]) / len(rows)
        print(f"{steps:3} steps: exact match {mean:.3f}, {runs[steps]['seconds_per_row']:.4f} s a row", flush=True)
    table = summarize(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "steps.json").write_text(json.dumps({"model": options.model, "table": table}, indent=1) + "\n")
    draw(table, f"{Path(options.model).name}, {len(rows)} rows", options.output / "steps.png")


if __name__ == "__main__":
    main()
