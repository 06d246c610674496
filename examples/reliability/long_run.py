"""One process for long: generations of changing shapes, training steps, threads on one and two models; and its memory.

    nice -n 10 python examples/reliability/long_run.py --output docs/reliability/long-run.json

Memory is the resident set of the process, after a warm-up and at the end of each part. `--mixers mamba` measures one
kind of model again and keeps what the file says of the other.
"""

import argparse
import gc
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

from modeling_yan import YanConfig, YanForFlowGeneration

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
SIZES |= {"num_decoder_layers": 1, "max_position_embeddings": 96, "canvas_length": 8, "state_size": 4}
FREE = {"freeze_encoder": False, "freeze_decoder": False, "freeze_embeddings": False}
MIXERS = ("attention", "mamba")
WARM_UP = 0.25  # of each part: caches of torch and the allocator fill up
KIB_PER_MIB = 1024


def make_model(mixer: str) -> YanForFlowGeneration:
    """A tiny seeded model."""
    torch.manual_seed(0)
    return YanForFlowGeneration(YanConfig(encoder_mixer=mixer, flow_mixer=mixer, **SIZES, **FREE)).eval()


def resident_mib() -> float:
    """Resident memory of this process."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / KIB_PER_MIB


def generate_once(model, rng: random.Random) -> list:
    """One generation of a shape and with options that are drawn."""
    shape, generator = (rng.randint(1, 6), rng.randint(1, 60)), torch.Generator().manual_seed(rng.getrandbits(31))
    options = {"max_new_tokens": rng.randint(1, 24), "num_flow_steps": rng.randint(1, 4), "seed": rng.getrandbits(31)}
    prompt = torch.randint(4, SIZES["vocab_size"], shape, generator=generator)
    return model.generate(prompt, do_sample=rng.random() < 0.5, **options).tolist()


def train_once(model, optimizer, rng: random.Random):
    """One step of AdamW on a batch of a shape that is drawn."""
    shapes = [(rng.randint(1, 6), rng.randint(9, 40))]  # longer than the labels: never the same, which is refused
    shapes.append((shapes[0][0], rng.randint(1, 8)))
    prompts, labels = (torch.randint(4, SIZES["vocab_size"], shape) for shape in shapes)
    loss = model(prompts, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if not loss.isfinite():
        raise SystemExit("the loss is not finite")


def measure(step, times: int) -> dict:
    """Memory after the warm-up and at the end of this many steps."""
    begin = time.perf_counter()
    for number in range(times):
        step()
        if number + 1 == int(WARM_UP * times):
            warm = resident_mib()
    end, seconds = resident_mib(), time.perf_counter() - begin
    figures = {"mib_after_warm_up": warm, "mib_at_the_end": end, "growth_mib": end - warm, "seconds": seconds}
    return {"times": times, **{name: round(value, 1) for name, value in figures.items()}}


def run_threads(models: list, num_threads: int, times: int) -> dict:
    """Several threads that take turns in the models: whether each generates what it generates alone."""

    def generate(number):
        rng = random.Random(number)
        return [generate_once(models[number % len(models)], rng) for _ in range(times)]

    with ThreadPoolExecutor(num_threads) as pool:
        together = list(pool.map(generate, range(num_threads)))
    pairs = [pair for number in range(num_threads) for pair in zip(generate(number), together[number], strict=True)]
    return {"threads": num_threads, "times": len(pairs), "equal_to_alone": sum(one == two for one, two in pairs)}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=2000, help="of each part")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    results = {
        "command": " ".join(["python", "examples/reliability/long_run.py", *words]),
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} CPU cores, shared with other work",
        "runs": json.loads(options.output.read_text())["runs"] if options.output.exists() else {},
    }

    def record(mixer, name, figures):
        results["runs"].setdefault(mixer, {})[name] = figures
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(mixer, name, figures, flush=True)

    num_rounds = max(1, options.times // 80)
    for mixer in options.mixers:
        model, rng = make_model(mixer), random.Random(0)
        record(mixer, "generations", measure(lambda: generate_once(model, rng), options.times))  # noqa: B023
        record(mixer, "threads on one model", run_threads([model], 4, num_rounds))
        both = [make_model(kind) for kind in MIXERS]
        record(mixer, "threads on two models", run_threads(both, 4, num_rounds))
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        record(mixer, "training steps", measure(lambda: train_once(model, optimizer, rng), options.times))  # noqa: B023


if __name__ == "__main__":
    main()
