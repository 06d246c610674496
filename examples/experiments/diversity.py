"""How different k candidates for one prompt are, and what that costs, at several temperatures.

    python examples/experiments/diversity.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl \
        --num_candidates 8 --temperatures 0 0.5 1 1.5 2 --output results/diversity

For YAN the temperature scales the start noise, and `--expert_choice sample` draws the experts too; for an
autoregressive model it divides the logits. Over the candidates of each prompt: distinct-1, distinct-2 and Self-BLEU
(high: alike); over the prompts: mean exact match, and that of the best candidate. Writes diversity.json and
diversity.png; several `--model` share the figure.
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
    self_bleu,
)


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


def measure(candidates: list[list[str]], targets: list[str]) -> dict[str, tuple[float, float, float]]:
    """Each figure's mean over the prompts with its 95% bootstrap interval."""
    right = [exact_match_scores(texts, [target] * len(texts)) for texts, target in zip(candidates, targets)]
    figures = {
        "distinct_1": [distinct_n(texts, 1) for texts in candidates],
        "distinct_2": [distinct_n(texts, 2) for texts in candidates],
        "self_bleu": [sum(self_bleu(texts)) / len(texts) for texts in candidates],
        "different_texts": [len(set(texts)) / len(texts) for texts in candidates],
        "exact_match": [sum(scores) / len(scores) for scores in right],
        "best_exact_match": [max(scores) for scores in right],
    }
    return {name: mean_with_interval(values) for name, values in figures.items()}


def draw(table: list[dict], path: Path):
    """Share of different texts, and exact match of one and of the best candidate, against the temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"different_texts": "share of different texts", "exact_match": "exact match, mean of the candidates"}
    panels["best_exact_match"] = "exact match, best candidate"
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    for axis, (name, title) in zip(axes, panels.items()):
        for model in dict.fromkeys(row["model"] for row in table):
            rows = [row for row in table if row["model"] == model]
            axis.plot([row["temperature"] for row in rows], [row[name][0] for row in rows], marker="o", label=model)
        axis.set(xlabel="temperature", title=title, ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="folders or hub names: YAN or autoregressive")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument("--num_candidates", type=int, default=8)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--expert_choice", default="sample", help="YAN: argmax or sample")
    parser.add_argument("--num_flow_steps", type=int, help="YAN: solver steps; the model's if not given")
    parser.add_argument("--num_rows", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for diversity.json and diversity.png")
    options = parser.parse_args(arguments)
    if options.num_candidates < 2:
        parser.error(f"num_candidates={options.num_candidates}: must be at least 2")
    torch.set_num_threads(options.threads)
    rows, table = read_rows(options.data)[: options.num_rows], []
    targets = [row["target"] for row in rows]
    for name in options.model:
        model, tokenizer = load_for_generation(name), AutoTokenizer.from_pretrained(name)
        for temperature in options.temperatures:
            candidates = write_candidates(model, tokenizer, rows, options.num_candidates, temperature, options)
            table.append({"model": Path(name).name, "temperature": temperature, **measure(candidates, targets)})
            figures = (f"{key} {value[0]:.3f}" for key, value in table[-1].items() if isinstance(value, tuple))
            print(f"{Path(name).name}, temperature {temperature}:", ", ".join(figures), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"num_candidates": options.num_candidates, "expert_choice": options.expert_choice, "table": table}
    (options.output / "diversity.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(table, options.output / "diversity.png")


if __name__ == "__main__":
    main()
