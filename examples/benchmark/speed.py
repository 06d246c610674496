"""How fast YAN writes, side by side with a naive YAN and with autoregressive and diffusion models of equal size.

Everything runs in one process, in interleaved rounds after a warm-up of all of it; no text ends early. The results are
written to the output file after every cell (batch size and length), so that a run that is stopped keeps what it has.

    python examples/benchmark/speed.py --output outputs/speed.json
    python examples/benchmark/speed.py --preset tiny --lengths 16 32 --output outputs/tiny.json
    python examples/benchmark/speed.py --device cuda --dtype bfloat16 --lengths 32 128 512 2048 --batch_sizes 1 16 64
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import VARIANTS, Contender, Models, choose_contenders, random_prompt
from costs import part_costs
from parts import part_calls
from timing import (
    interleave,
    machine_description,
    machine_limits,
    num_repeats,
    recorded,
    seconds_of,
    summary,
    write_json,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS_STEPS = 3


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=("base", "tiny"))
    parser.add_argument("--models", nargs="*", default=[], help="beginnings of names, such as yan-mamba; default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128], help="new tokens; for YAN one canvas each")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds after the warm-up")
    parser.add_argument("--budget_s", type=float, default=60, help="most seconds of measurement of a model in a cell")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also YAN at 3 steps as one compiled program (on a GPU recorded with and without a "
        "compiler), and masked diffusion that is not compiled",
    )
    parser.add_argument("--int8", action="store_true", help="also YAN at 3 steps with int8 weights, on a CPU")
    parser.add_argument("--packed", action="store_true", help="also YAN and the decoder with packed weights, on a CPU")
    parser.add_argument("--wait_for", type=Path, help="measure, after the warm-up, only once this file exists")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.json"))
    options = parser.parse_args(arguments)
    for name in ("lengths", "batch_sizes", "prompt_length", "repeats"):
        value = getattr(options, name)
        if min([value] if isinstance(value, int) else value) < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    for form in ("int8", "packed"):
        if getattr(options, form) and options.device != "cpu":
            raise ValueError(f"{form} with device={options.device!r}: must be cpu, where torch has kernels for it")
    return options


class Predictor:
    """The least seconds that a contender will take in a cell, judged by the smaller cells that it was measured in.

    Time grows with the length, and on a CPU with the batch, too, where a contender is bound by arithmetic.
    """

    def __init__(self, device: torch.device):
        self.grows_with_batch = device.type == "cpu"
        self.seen = {}

    def record(self, contender: Contender, batch: int, length: int, seconds: float):
        self.seen.setdefault(contender.name, []).append((batch, length, seconds))

    def predict(self, contender: Contender, batch: int, length: int) -> float:
        """Seconds of one call; 0 where nothing is known yet."""
        power = contender.batch_growth if self.grows_with_batch else 0
        return max(
            (
                seconds * (length / seen_length) ** contender.growth * (batch / seen_batch) ** power
                for seen_batch, seen_length, seconds in self.seen.get(contender.name, [])
                if seen_batch <= batch and seen_length <= length
            ),
            default=0.0,
        )


def warm_up(call, device: torch.device, shape: tuple[int, int], name: str) -> float:
    """Seconds of a call that compiles nothing any more.

    Raises:
        RuntimeError: The contender wrote something else than tokens of this shape.
    """
    tokens = []
    seconds = seconds_of(lambda: tokens.append(call()), device)
    if tokens[0].shape != shape:
        raise RuntimeError(f"{name} wrote tokens of shape {tuple(tokens[0].shape)} instead of {shape}")
    for _ in range(0 if device.type == "cpu" else 2):  # a compiled program is recorded as a graph in its second call
        seconds = seconds_of(call, device)
    return seconds


@dataclass
class Cell:
    """What is measured at one batch size and length: calls that are warm, how often, and why others are skipped."""

    batch: int
    length: int
    calls: dict[str, Callable]
    repeats: dict[str, int]
    skipped: dict[str, str]


def prepare_cell(contenders, models: Models, predictor, batch: int, length: int, options) -> Cell:
    """Warm up all contenders; what is predicted to exceed the budget is left out."""
    device, shape = models.device, (batch, length)
    prompt = random_prompt(models, batch, options.prompt_length)
    calls, repeats, skipped = {}, {}, {}
    for contender in contenders:
        started, name, predicted = time.perf_counter(), contender.name, predictor.predict(contender, batch, length)
        if predicted > options.budget_s:
            skipped[name] = f"predicted to take {predicted:.0f} s a call"
            continue
        calls[name] = lambda contender=contender: contender.write(models.get(contender.model), prompt, length)
        seconds = warm_up(calls[name], device, shape, name)
        predictor.record(contender, batch, length, seconds)
        repeats[name] = num_repeats(seconds, options.repeats, options.budget_s)
        print(f"{name:>28}  batch {batch:>3}  length {length:>5}  warm in {time.perf_counter() - started:.1f} s")
    return Cell(batch, length, calls, repeats, skipped)


def measure_cell(cell: Cell, device: torch.device, prompt_length: int) -> list[dict]:
    """The results of all contenders; what is left out says so."""
    seconds = interleave(cell.calls, cell.repeats, device)
    about = {"batch": cell.batch, "length": cell.length, "prompt_length": prompt_length}
    tokens = cell.batch * cell.length
    measured = [
        {"model": name, **about, "seconds": summary(s), "tokens_per_s": tokens / summary(s)["median"]}
        for name, s in seconds.items()
    ]
    return measured + [{"model": name, **about, "skipped": reason} for name, reason in cell.skipped.items()]


def measure_parts(models: Models, variant: str, batch: int, length: int, options, limits) -> dict:
    """Seconds of YAN's parts at three steps, beside the floor that the machine's limits set them."""
    prompt = random_prompt(models, batch, options.prompt_length)
    calls = part_calls(models.get(f"yan-{variant}"), prompt, length, PARTS_STEPS)
    if models.device.type == "cuda":  # launched one by one, they would wait for the host
        calls = {name: recorded(call) for name, call in calls.items()}
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = num_repeats(seconds_of(call, models.device), options.repeats, options.budget_s)
    seconds = interleave(calls, repeats, models.device)
    costs = part_costs(
        models.config(variant), batch, options.prompt_length, length, PARTS_STEPS, models.dtype.itemsize
    )
    return {
        name: {
            "seconds": summary(seconds[name]),
            "floor": cost.floor_s(**limits),
            "flops": cost.flops,
            "bytes": cost.bytes,
        }
        for name, cost in costs.items()
    }


def report(results: list[dict]):
    for result in results:
        text = f"{result['model']:>28}  batch {result['batch']:>3}  length {result['length']:>5}  "
        if "skipped" in result:
            print(text + f"skipped: {result['skipped']}", flush=True)
        else:
            seconds = result["seconds"]
            spread = f"{seconds['median']:8.3f} s  ({seconds['low']:.3f} to {seconds['high']:.3f}"
            print(text + f"{spread}, {len(seconds['all'])} runs)  {result['tokens_per_s']:9.1f} tokens/s", flush=True)


@torch.no_grad()
def main(arguments=None):
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    contenders = choose_contenders(options.models, options.compiled, options.int8, options.packed)
    models = Models(options.preset, options.prompt_length, max(options.lengths), device, dtype)
    predictor = Predictor(device)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "wait_for")}
    sizes = [(batch, length) for batch in sorted(options.batch_sizes) for length in sorted(options.lengths)]
    cells = [prepare_cell(contenders, models, predictor, *size, options) for size in sizes]
    print("warm", flush=True)
    while options.wait_for and not options.wait_for.exists():
        time.sleep(1)
    limits = machine_limits(device, dtype)
    content = {"machine": {**machine_description(device), **limits}, "settings": settings}
    content |= {"parameters": {}, "cells": [], "parts": []}
    for cell in cells:
        results = measure_cell(cell, device, options.prompt_length)
        report(results)
        content["cells"] += results
        content["parameters"] = {c.model: models.get(c.model).num_parameters() for c in contenders}
        write_json(options.output, content)
    for batch, length in sizes:
        for variant in VARIANTS:
            if any(contender.model == f"yan-{variant}" for contender in contenders):
                parts = measure_parts(models, variant, batch, length, options, limits)
                content["parts"].append({"model": f"yan-{variant}", "batch": batch, "length": length, **parts})
        write_json(options.output, content)


if __name__ == "__main__":
    main()
