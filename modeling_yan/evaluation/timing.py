"""How long `generate` takes, beside an autoregressive model of equal size."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

AR = "AR decoder"
PROMPT_LENGTH = 64  # tokens


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes: by CUDA events on a GPU, else by the performance counter."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and range of some timings, and the timings themselves, in seconds."""
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "all": seconds}


def interleave(
    calls: dict[str, Callable[[], object]], repeats: dict[str, int], device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call, in rounds, so that what slows the machine down for a while slows all of them down."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(max(repeats.values(), default=0)):
        for name, call in calls.items():
            if round_ < repeats[name]:
                seconds[name].append(seconds_of(call, device))
    return seconds


def machine_description(device: torch.device) -> dict[str, Any]:
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


def time_generation(
    model: Any,
    lengths: Sequence[int] = (32,),
    batch_sizes: Sequence[int] = (1,),
    steps: Sequence[int] | None = None,
    beside_ar: bool = False,
    prompt_length: int | None = None,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Seconds that texts of given lengths take, by any prompt: no text ends early.

    Texts longer than the model's canvas take several canvases. The AR model, `make_baseline("decoder")`, has random
    weights, which take as long as trained ones; it decodes greedily with its cache of keys and values.

    Args:
        model: A `YanForFlowGeneration`.
        lengths: New tokens. batch_sizes: Texts at once. steps: Of the solver; the model's if None.
        beside_ar: Whether an AR decoder with as many parameters is timed, too.
        prompt_length: Tokens; 64, or as many as the model takes, if None.
        repeats: Measured rounds, after one that warms up.

    Returns:
        A dictionary for each model, number of steps, length and batch size, with the "seconds".

    Raises:
        ValueError: A number that is not allowed.
    """
    numbers = {"lengths": lengths, "batch_sizes": batch_sizes, "steps": steps or [1], "repeats": [repeats]}
    for name, values in numbers.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name}={list(values)}: must be whole numbers of at least 1")
    longest = model.config.max_prompt_length
    prompt_length = min(PROMPT_LENGTH, longest) if prompt_length is None else prompt_length
    if not 1 <= prompt_length <= longest:
        raise ValueError(f"prompt_length={prompt_length}: must be 1 to {longest}, what the model takes")
    steps = steps or [model.generation_config.num_flow_steps or model.config.num_flow_steps]
    rival = _ar_model(model) if beside_ar else None
    results = []
    for batch in batch_sizes:
        prompt = _any_prompt(model, batch, prompt_length)
        for length in lengths:
            calls = {f"YAN, {_count(number, 'step')}": _yan_call(model, prompt, length, number) for number in steps}
            if rival is not None:
                calls[AR] = _ar_call(rival, prompt, length)
            for call in calls.values():  # warm up
                call()
            timings = interleave(calls, dict.fromkeys(calls, repeats), model.device)
            for name, seconds in timings.items():
                about = {"model": name, "batch": batch, "length": length, "prompt_length": prompt_length}
                speed = batch * length / statistics.median(seconds)
                results.append({**about, "seconds": summary(seconds), "tokens_per_s": speed})
    return results


def format_timings(results: list[dict[str, Any]]) -> str:
    """Timings as a table of Markdown; beside an AR model, how many times as fast a model is."""
    rivals = {(row["batch"], row["length"]): row["seconds"]["median"] for row in results if row["model"] == AR}
    head = ["texts", "tokens", "model", "ms (median)", "range", "tokens/s"] + ["times AR"] * bool(rivals)
    lines = [head, ["---"] * len(head)]
    for row in results:
        median, low, high = (1000 * row["seconds"][name] for name in ("median", "low", "high"))
        cells = [row["batch"], row["length"], row["model"], f"{median:.1f}", f"{low:.1f} to {high:.1f}"]
        cells.append(f"{row['tokens_per_s']:.0f}")
        if rivals:
            cells.append(f"{1000 * rivals[row['batch'], row['length']] / median:.1f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _ar_model(model: Any) -> PreTrainedModel:
    from ..baselines import make_baseline

    return make_baseline("decoder", model.config).to(model.device, model.dtype).eval()


def _any_prompt(model: Any, batch: int, length: int) -> torch.Tensor:
    """Random ids (B, S)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def _yan_call(model: Any, prompt: torch.Tensor, length: int, num_flow_steps: int) -> Callable[[], object]:
    options = {"max_new_tokens": length, "min_new_tokens": length, "num_flow_steps": num_flow_steps}
    options |= {"canvas_length": min(length, model.config.canvas_length), "do_sample": False}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def _ar_call(model: Any, prompt: torch.Tensor, length: int) -> Callable[[], object]:
    options: dict[str, Any] = {
        "max_new_tokens": length,
        "min_new_tokens": length,
        "do_sample": False,
        "use_cache": True,
    }
    if prompt.device.type == "cuda":
        options["cache_implementation"] = "static"  # with which transformers compiles
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
