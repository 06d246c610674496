"""`yan evaluate`: checkpoints measured on rows of source and target."""

import argparse
import json
from typing import Any

from .loading import prepare_library
from .parsing import Commands, Parser, add_command, add_device, add_model, whole_number

SOURCE = "{source}"
EXAMPLES = """  yan evaluate MODEL --data pairs.jsonl --num_flow_steps 3 --max_new_tokens 32 --output results/yan
  yan evaluate my-gpt2 --data pairs.jsonl --max_new_tokens 32 --output results/gpt2 --compare results/yan
  yan evaluate yan decoder masked-diffusion --baseline decoder --data pairs.jsonl --output results/table"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "evaluate", evaluate, "Measure checkpoints on rows of source and target.", EXAMPLES)
    add_model(parser, nargs="+")
    add_evaluation_options(parser)


def add_evaluation_options(parser: Parser) -> None:
    """Add all options but the models."""
    parser.add_argument(
        "--data", required=True, help="rows with source and target: .jsonl, .json, .csv, .tsv or .parquet, also .gz"
    )
    parser.add_argument("--source_column", default="source", help="the column of the sources")
    parser.add_argument("--target_column", default="target", help="the column of the targets")
    parser.add_argument("--output", required=True, help="a folder for metrics.json and predictions.jsonl")
    parser.add_argument("--compare", help="one model: an output folder of the same data, for paired tests against it")
    parser.add_argument("--baseline", help="several models: the one that the others are tested against")
    parser.add_argument("--num_rows", type=whole_number(1), help="only the first rows of the data")
    parser.add_argument("--num_flow_steps", type=whole_number(0), help="YAN: solver steps; the model's if not given")
    parser.add_argument(
        "--yan_options", nargs="+", type=_option, default=[], metavar="NAME=VALUE", help="further options of generate"
    )
    parser.add_argument(
        "--num_diffusion_steps", type=whole_number(1), help="masked diffusion: steps; the model's if not given"
    )
    parser.add_argument(
        "--canvas_length", type=whole_number(1), help="tokens generated at once; the model's if not given"
    )
    parser.add_argument("--max_new_tokens", type=whole_number(1), default=64, help="longest text")
    parser.add_argument("--seeds", type=whole_number(1), default=5, help="YAN: number of seeds")
    parser.add_argument("--batch_size", type=whole_number(1), default=32, help="rows generated together")
    parser.add_argument(
        "--template", default=SOURCE, help="the prompt made of a source, or of other columns as in finetune"
    )
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="all that need no further model if not given")
    parser.add_argument("--encoder", help="encoder of bert_score, semantic_distance and mauve: folder or hub name")
    parser.add_argument("--judge", help="causal language model for the generative perplexity: folder or hub name")
    add_device(parser)


def _option(entry: str) -> tuple[str, object]:
    """Name and value of NAME=VALUE, the value in JSON or else a plain word."""
    name, equals, word = entry.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{entry!r} must be NAME=VALUE")
    try:
        return name, json.loads(word)
    except json.JSONDecodeError:
        return name, word


def read_data(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of `--data`. A template of other columns than the source is used up for their sources."""
    from ..data import read_rows
    from ..data.rows import SUFFIXES
    from ..data.tables import PairColumns, load_file, make_pairs

    columns, template = (options.source_column, options.target_column), None
    if "{source}" not in options.template:
        template, options.template = options.template, SOURCE
    if template is None and columns == ("source", "target") and options.data.endswith(SUFFIXES):
        return read_rows(options.data)
    return make_pairs(load_file(options.data), PairColumns(*columns, template), options.data)


def evaluate(options: argparse.Namespace) -> None:
    """Measure the models, write the reports and print them."""
    prepare_library(is_quiet=not options.debug)
    import torch
    from transformers import AutoTokenizer

    from .. import baselines  # noqa: F401  registers the classes
    from ..evaluation import (
        DEFAULT_METRICS,
        RunOptions,
        evaluate_models,
        evaluate_task,
        format_report,
        format_table,
        load_for_generation,
    )

    if len(options.model) > 1 and options.compare:
        raise ValueError(f"compare={options.compare!r}: is for one model; name one of several as the baseline")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = read_data(options)[: options.num_rows]
    shared = ("max_new_tokens", "num_flow_steps", "num_diffusion_steps", "canvas_length", "batch_size", "template")
    run_options = RunOptions(
        num_seeds=options.seeds,
        yan_options=dict(options.yan_options),
        **{name: getattr(options, name) for name in shared},
    )
    settings: dict[str, Any] = {"encoder": options.encoder, "judge": options.judge}
    settings["metrics"] = options.metrics or DEFAULT_METRICS
    description = {"data": options.data, "device": device}
    if len(options.model) > 1:
        settings |= {"device": device, "description": description}
        reports = evaluate_models(options.model, rows, options.output, run_options, options.baseline, **settings)
        print(format_table(reports))
        return
    (name,) = options.model
    settings |= {"compare": options.compare, "description": {"model": name, **description}}
    model, tokenizer = load_for_generation(name, device), AutoTokenizer.from_pretrained(name)
    print(format_report(evaluate_task(model, tokenizer, rows, options.output, run_options, **settings)))
