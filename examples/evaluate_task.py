"""Evaluate a checkpoint on pairs of source and target, a YAN or any causal language model as a baseline.

    python examples/evaluate_task.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl \
        --num_flow_steps 3 --max_new_tokens 32 --seeds 5 --output results/yan
    python examples/evaluate_task.py --model my-gpt2 --data pairs.jsonl --max_new_tokens 32 \
        --output results/gpt2 --compare results/yan

Every figure comes without and with the reference's length ("oracle"). YAN is measured with `do_sample=True` at
temperature 1, once per seed, and with `do_sample=False`, where every run gives the same text; other models decode
greedily with their cache, which no seed changes. Files of the output folder: metrics.json, predictions.jsonl.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.data import read_rows
from modeling_yan.evaluation import DEFAULT_METRICS, METRIC_NAMES, RunOptions, evaluate_task, format_report


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument("--output", required=True, help="a folder for metrics.json and predictions.jsonl")
    parser.add_argument("--compare", help="an output folder of the same data: adds paired tests against it")
    parser.add_argument("--num_rows", type=int, help="only the first rows of the data")
    parser.add_argument("--num_flow_steps", type=int, help="YAN: solver steps; the model's if not given")
    parser.add_argument("--canvas_length", type=int, help="YAN: tokens written at once; the model's if not given")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5, help="YAN: number of seeds")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--template", default="{source}", help="the prompt made of a source")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT_METRICS, choices=METRIC_NAMES, metavar="NAME")
    parser.add_argument("--encoder", help="encoder of bert_score, semantic_distance and mauve: folder or hub name")
    parser.add_argument("--judge", help="causal language model for the generative perplexity: folder or hub name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    options = parse_options()
    rows = read_rows(options.data)[: options.num_rows]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    settings = RunOptions(
        max_new_tokens=options.max_new_tokens,
        num_flow_steps=options.num_flow_steps,
        canvas_length=options.canvas_length,
        num_seeds=options.seeds,
        batch_size=options.batch_size,
        template=options.template,
    )
    report = evaluate_task(
        model,
        tokenizer,
        rows,
        options.output,
        settings,
        metrics=options.metrics,
        encoder=options.encoder,
        judge=options.judge,
        compare=options.compare,
        description={"model": options.model, "data": options.data, "device": options.device},
    )
    print(format_report(report))


if __name__ == "__main__":
    main()
