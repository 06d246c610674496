"""CUDA graphs, how often to measure, and the limits of the machine that is measured on."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from modeling_yan.data.rows import write_whole
from modeling_yan.evaluation.timing import (  # noqa: F401  for the scripts beside this one
    interleave,
    machine_description,
    seconds_of,
    summary,
)


def parse_settings(
    parser: ArgumentParser, arguments: Sequence[str] | None, output: str, repeats: int = 9
) -> tuple[Namespace, dict]:
    """The options of a benchmark, which number of threads among them is set, and what its file begins with."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's choice if not given")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--output", type=Path, default=Path(output))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "before")}
    return options, {"machine": machine_description(torch.device(options.device)), "settings": settings}


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    """The call's kernels as a CUDA graph, whose replay costs the host next to nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def num_repeats(warm_up_s: float, repeats: int, budget_s: float) -> int:
    """How often a call that took `warm_up_s` seconds is measured: 1 to `repeats` times, within the budget."""
    return max(1, min(repeats, int(budget_s / max(warm_up_s, 1e-9))))


def machine_limits(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> dict:
    """Bandwidth (bytes/s) of a copy and FLOP/s of a matrix product, each the best of `repeats`."""
    is_gpu = device.type == "cuda"
    source = torch.randn((2**30 if is_gpu else 2**28) // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    width = 8192 if is_gpu else 2048
    a, b = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))

    def best(call):
        call()
        return min(seconds_of(call, device) for _ in range(repeats))

    bytes_moved = 2 * source.numel() * source.itemsize
    return {
        "bandwidth": bytes_moved / best(lambda: target.copy_(source)),
        "peak": 2 * width**3 / best(lambda: torch.mm(a, b)),
    }


def write_json(path: Path, content: dict):
    """Replace the file at once, so that a run that is stopped leaves the last whole one."""
    write_whole(path, json.dumps(content, indent=1) + "\n")
