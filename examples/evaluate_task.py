"""Evaluate checkpoints on pairs of source and target: YAN, and baselines of any kind that generates.

    python examples/evaluate_task.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl \
        --num_flow_steps 3 --max_new_tokens 32 --seeds 5 --output results/yan
    python examples/evaluate_task.py --model my-gpt2 --data pairs.jsonl --max_new_tokens 32 \
        --output results/gpt2 --compare results/yan
    python examples/evaluate_task.py --model yan decoder encoder-decoder masked-diffusion --baseline decoder \
        --data pairs.jsonl --max_new_tokens 32 --output results/table

Every figure comes without and with the reference's length ("oracle"). YAN is measured with `do_sample=True` at
temperature 1, once per seed, and with `do_sample=False`, where every run gives the same text; masked diffusion keeps
the surest tokens first, and autoregressive models decode greedily, which no seed changes, with their cache (baselines
with convolutions have none and are slower). Files of the output folder: metrics.json, predictions.jsonl. Several
models give one such folder each, and table.json and table.md of them all, with paired tests against `--baseline`.
"""

import argparse
import json

import torch
from transformers import AutoTokenizer

import modeling_yan.baselines  # noqa: F401  registers the classes
from modeling_yan.data import read_rows
from modeling_yan.evaluation import (
    DEFAULT_METRICS,
    METRIC_NAMES,
    RunOptions,
    evaluate_models,
    evaluate_task,
    format_report,
    format_table,
    load_for_generation,
)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="folders or hub names")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument("--output", required=True, help="a folder for metrics.json and predictions.jsonl")
    parser.add_argument("--compare", help="one model: an output folder of the same data, for paired tests against it")
    parser.add_argument("--baseline", help="several models: the one that the others are tested against")
    parser.add_argument("--num_rows", type=int, help="only the first rows of the data")
    parser.add_argument("--num_flow_steps", type=int, help="YAN: solver steps; the model's if not given")
    parser.add_argument(
        "--yan_options", nargs="+", type=_option, default=[], metavar="NAME=VALUE", help="further options of generate"
    )
    parser.add_argument("--num_diffusion_steps", type=int, help="masked diffusion: steps; the model's if not given")
    parser.add_argument("--canvas_length", type=int, help="tokens written at once; the model's if not given")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5, help="YAN: number of seeds")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--template", default="{source}", help="the prompt made of a source")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT_METRICS, choices=METRIC_NAMES, metavar="NAME")
    parser.add_argument("--encoder", help="encoder of bert_score, semantic_distance and mauve: folder or hub name")
    parser.add_argument("--judge", help="causal language model for the generative perplexity: folder or hub name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if len(options.model) > 1 and options.compare:
        parser.error("--compare is for one model; name one of several models as the --baseline")
    return options


def _option(entry: str) -> tuple[str, object]:
    """Name and value of NAME=VALUE, the value in JSON or else a plain word."""
    name, equals, word = entry.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{entry!r} must be NAME=VALUE")
    try:
        return name, json.loads(word)
    except json.JSONDecodeError:
        return name, word


def main():
    options = parse_options()
    rows = read_rows(options.data)[: options.num_rows]
    run_options = RunOptions(
        max_new_tokens=options.max_new_tokens,
        num_flow_steps=options.num_flow_steps,
        num_diffusion_steps=options.num_diffusion_steps,
        canvas_length=options.canvas_length,
        num_seeds=options.seeds,
        batch_size=options.batch_size,
        template=options.template,
        yan_options=dict(options.yan_options),
    )
    settings = {"metrics": options.metrics, "encoder": options.encoder, "judge": options.judge}
    description = {"data": options.data, "device": options.device}
    if len(options.model) > 1:
        shared = {"device": options.device, "description": description, **settings}
        reports = evaluate_models(options.model, rows, options.output, run_options, options.baseline, **shared)
        print(format_table(reports))
        return
    (name,) = options.model
    settings |= {"compare": options.compare, "description": {"model": name, **description}}
    model, tokenizer = load_for_generation(name, options.device), AutoTokenizer.from_pretrained(name)
    print(format_report(evaluate_task(model, tokenizer, rows, options.output, run_options, **settings)))


if __name__ == "__main__":
    main()
