"""How different k candidates for one prompt are, whether a right one is among them, and what that costs.

    python examples/experiments/diversity.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl \
        --num_candidates 8 --temperatures 0 0.5 1 1.5 2 --output results/diversity

For YAN the temperature scales the start noise, and `--expert_choice sample` draws the experts too; for an
autoregressive model it divides the logits. With `--ranked`, there are also candidates that are not drawn: of YAN, one
from each of the k most probable experts, if it has so many; of an autoregressive model, k beams. Over the candidates
of each prompt: distinct-1, distinct-2 and Self-BLEU (high: alike); over the prompts: exact match, that of the best
candidate, and ROUGE-L of the best, with paired tests of the last two against the first way of the first model. Writes
diversity.json and diversity.png; several `--model` share the figure.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

import modeling_yan.baselines  # noqa: F401  registers the classes
from modeling_yan.data import read_rows
from modeling_yan.evaluation import (
    distinct_n,
    exact_match_scores,
    generate_timed,
    load_for_generation,
    mean_with_interval,
    paired_bootstrap,
    paired_permutation_test,
    rouge_scores,
    self_bleu,
)
from modeling_yan.training import expand_recipe
from modeling_yan.visualization import saved_figure

TESTED = ("best_exact_match", "best_rougeL")


def write_ranked(model, tokenizer, rows, num_candidates, options) -> list[list[str]]:
    """For each row its candidates, nothing drawn: a YAN's most probable experts, or beams."""
    settings = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size, "do_sample": False}
    settings |= {"num_return_sequences": num_candidates}
    settings |= {"expert_choice": "ranked"} if model.config.model_type == "yan" else {"num_beams": num_candidates}
    texts = generate_timed(model, tokenizer, [row["source"] for row in rows], **settings).texts
    return [texts[start : start + num_candidates] for start in range(0, len(texts), num_candidates)]


def write_candidates(model, tokenizer, rows, num_candidates, temperature, options) -> list[list[str]]:
    """For each row its candidates, one pass each: candidate number i comes from seed i."""
    settings = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size, "do_sample": True}
    is_yan = model.config.model_type == "yan"
    if is_yan:
        settings |= {"expert_choice": options.expert_choice, "temperature": temperature}
        settings |= {"num_flow_steps": options.num_flow_steps} if options.num_flow_steps else {}
    else:
        settings |= {"temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    passes = []
    for seed in range(num_candidates):
        torch.manual_seed(seed)
        own = {"seed": seed} if is_yan else {}
        passes.append(generate_timed(model, tokenizer, [row["source"] for row in rows], **settings, **own).texts)
    return [list(candidates) for candidates in zip(*passes, strict=True)]


def measure(candidates: list[list[str]], targets: list[str]) -> dict[str, list[float]]:
    """Each figure of every prompt."""
    wanted = [[target] * len(texts) for texts, target in zip(candidates, targets)]
    right = [exact_match_scores(*pair) for pair in zip(candidates, wanted)]
    return {
        "distinct_1": [distinct_n(texts, 1) for texts in candidates],
        "distinct_2": [distinct_n(texts, 2) for texts in candidates],
        "self_bleu": [sum(self_bleu(texts)) / len(texts) for texts in candidates],
        "different_texts": [len(set(texts)) / len(texts) for texts in candidates],
        "exact_match": [sum(scores) / len(scores) for scores in right],
        "best_exact_match": [max(scores) for scores in right],
        "best_rougeL": [max(rouge_scores(*pair)["rougeL"]) for pair in zip(candidates, wanted)],
    }


def summarize(figures: dict[str, list[float]], baseline: dict[str, list[float]]) -> dict[str, list[float]]:
    """Means with 95% bootstrap intervals; of the figures that are tested, the difference, its interval and p."""
    table = {name: list(mean_with_interval(values)) for name, values in figures.items()}
    for name in TESTED:
        pair = figures[name], baseline[name]
        table[f"{name}_difference"] = [*paired_bootstrap(*pair)[:3], paired_permutation_test(*pair)]
    return table


def draw(table: list[dict], path: Path):
    """Share of different texts, and exact match of one and of the best candidate, against the temperature."""
    panels = {"different_texts": "share of different texts", "exact_match": "exact match, mean of the candidates"}
    panels["best_exact_match"] = "exact match, best candidate"
    with saved_figure(path, 13, 3.8) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (name, title) in zip(axes, panels.items()):
            for model in dict.fromkeys(row["model"] for row in table):
                rows = [row for row in table if row["model"] == model]
                drawn = [row for row in rows if row["temperature"] is not None]
                (line,) = axis.plot(
                    [row["temperature"] for row in drawn], [row[name][0] for row in drawn], marker="o", label=model
                )
                for row in rows:
                    if row["temperature"] is None:
                        axis.axhline(row[name][0], color=line.get_color(), linestyle="--", label=f"{model}, ranked")
            axis.set(xlabel="temperature", title=title, ylim=(-0.02, 1.02))
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="folders or hub names: YAN or autoregressive")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument("--num_candidates", type=int, default=8)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--expert_choice", default="sample", help="YAN: argmax or sample")
    parser.add_argument("--ranked", action="store_true", help="also experts by rank, or beams")
    parser.add_argument("--num_flow_steps", type=int, help="YAN: solver steps; the model's if not given")
    parser.add_argument("--num_rows", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for diversity.json and diversity.png")
    options = parser.parse_args(expand_recipe(parser, arguments))
    if options.num_candidates < 2:
        parser.error(f"num_candidates={options.num_candidates}: must be at least 2")
    torch.set_num_threads(options.threads)
    rows, table, baseline = read_rows(options.data)[: options.num_rows], [], None
    targets = [row["target"] for row in rows]
    for name in options.model:
        model, tokenizer = load_for_generation(name), AutoTokenizer.from_pretrained(name)
        has_ranks = getattr(model.config, "num_experts", options.num_candidates) >= options.num_candidates
        for temperature in [*options.temperatures, *([None] if options.ranked and has_ranks else [])]:
            arguments = [model, tokenizer, rows, options.num_candidates]
            if temperature is None:
                candidates = write_ranked(*arguments, options)
            else:
                candidates = write_candidates(*arguments, temperature, options)
            figures = measure(candidates, targets)
            baseline = baseline or figures
            table.append({"model": Path(name).name, "temperature": temperature, **summarize(figures, baseline)})
            way = "ranked" if temperature is None else f"temperature {temperature}"
            means = (f"{key} {value[0]:.3f}" for key, value in table[-1].items() if isinstance(value, list))
            print(f"{Path(name).name}, {way}:", ", ".join(means), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"num_candidates": options.num_candidates, "expert_choice": options.expert_choice, "table": table}
    (options.output / "diversity.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(table, options.output / "diversity.png")


if __name__ == "__main__":
    main()
