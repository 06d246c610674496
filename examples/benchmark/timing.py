"""Clocks, medians, interleaved rounds and the limits of the machine that is measured on."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes: by CUDA events on a GPU, else by the performance counter."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


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


def summary(seconds: list[float]) -> dict:
    """Median and range of some timings, and the timings themselves, in seconds."""
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "all": seconds}


def num_repeats(warm_up_s: float, repeats: int, budget_s: float) -> int:
    """How often a call that took `warm_up_s` seconds is measured: 1 to `repeats` times, within the budget."""
    return max(1, min(repeats, int(budget_s / max(warm_up_s, 1e-9))))


def interleave(calls: dict[str, Callable], repeats: dict[str, int], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call, in rounds, so that what slows the machine down for a while slows all of them down."""
    seconds = {name: [] for name in calls}
    for round_ in range(max(repeats.values(), default=0)):
        for name, call in calls.items():
            if round_ < repeats[name]:
                seconds[name].append(seconds_of(call, device))
    return seconds


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


def machine_description(device: torch.device) -> dict:
    """What a reader has to know of the machine to judge the figures."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor_name() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, content: dict):
    """Replace the file at once, so that a run that is stopped leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)
