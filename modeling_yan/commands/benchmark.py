"""`yan benchmark`: how long a model takes, beside an autoregressive one of equal size."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import load_config, load_model, prepare_library
from .parsing import Commands, add_command, add_device, add_model, whole_number

if TYPE_CHECKING:
    from ..modeling_yan import YanForFlowGeneration


EXAMPLES = """  yan benchmark MODEL --lengths 32 128 --batch_sizes 1 8 --steps 1 3 --beside_ar
  yan benchmark configuration/yan-transformer-base --untrained --lengths 128 --beside_ar --output speed.json"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    purpose = "Time the generation of texts, none of which ends early."
    parser = add_command(commands, "benchmark", benchmark, purpose, EXAMPLES)
    add_model(parser)
    numbers: dict[str, Any] = {"nargs": "+", "type": whole_number(1), "metavar": "N"}
    parser.add_argument("--lengths", default=[32], help="new tokens of a text", **numbers)
    parser.add_argument("--batch_sizes", default=[1], help="texts at once", **numbers)
    parser.add_argument("--steps", help="solver steps; the model's if not given", **numbers)
    parser.add_argument("--beside_ar", action="store_true", help="also an AR decoder of equal size, random weights")
    parser.add_argument("--untrained", action="store_true", help="random weights: a config.json is enough")
    parser.add_argument("--prompt_length", type=whole_number(1), help="tokens; 64, or what the model takes")
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="measured rounds")
    parser.add_argument("--output", type=Path, help="a file for the results as JSON")
    add_device(parser)


def benchmark(options: argparse.Namespace) -> None:
    """Print a table of the timings, and write them as JSON where a file is named."""
    prepare_library(is_quiet=not options.debug)
    from ..evaluation.timing import format_timings, machine_description, time_generation

    if options.untrained:
        model = _untrained(options.model, options.device)
    else:
        model = load_model(options.model, options.device)
    names = ("lengths", "batch_sizes", "steps", "beside_ar", "prompt_length", "repeats")
    results = time_generation(model, **{name: getattr(options, name) for name in names})
    machine = machine_description(model.device)
    print(
        f"{options.model}: {model.num_parameters() / 1e6:.1f} million parameters, prompts of "
        f"{results[0]['prompt_length']} tokens, {machine['device']}, {machine['threads']} threads\n"
    )
    print(format_timings(results))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"model": options.model, "parameters": model.num_parameters(), "machine": machine}
        options.output.write_text(json.dumps({**report, "results": results}, indent=1) + "\n")


def _untrained(name: str, device: str | None) -> "YanForFlowGeneration":
    """A model of a config, with random weights."""
    import torch

    from ..registration import YanForFlowGeneration

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return YanForFlowGeneration(load_config(name)).to(device).eval()  # type: ignore[arg-type]
