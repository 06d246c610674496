"""What a call of `generate` costs on a GPU once it is recorded, and how much of it is the recording's replay.

    python examples/benchmark/recording.py --variant mamba --length 512 --output outputs/recording.json
    python examples/benchmark/recording.py --backend eager

The rest of a call is the host's: options, checks of the prompt and of the model, and the cutting of the text.
The floor is the sum of the parts' floors, by the machine's bandwidth and rate in the same process. `--kernels` also
prints the kernels that take longest.
"""

import argparse
from pathlib import Path

import torch
from contenders import VARIANTS, Models, random_prompt, write_with_yan
from costs import part_costs
from timing import machine_description, machine_limits, seconds_of, summary, write_json
from transformers.generation.configuration_utils import CompileConfig

NUM_STEPS = 3


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=("base", "tiny"))
    parser.add_argument("--variant", default="transformer", choices=VARIANTS)
    parser.add_argument("--length", type=int, default=128, help="new tokens, one canvas")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager: recorded as it is")
    parser.add_argument("--mode", help="of torch.compile, such as max-autotune")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernels", type=int, default=0, help="so many of them are printed")
    parser.add_argument("--output", type=Path, default=Path("outputs/recording.json"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("only on a GPU is generation recorded, and torch finds none")
    return options


def print_kernels(call, number: int):
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=number))


@torch.no_grad()
def main(arguments=None):
    options, device = parse_options(arguments), torch.device("cuda")
    models = Models(options.preset, options.prompt_length, options.length, device, torch.bfloat16)
    model = models.get(f"yan-{options.variant}")
    settings = CompileConfig(dynamic=False, backend=options.backend, mode=options.mode)
    prompt = random_prompt(models, options.batch_size, options.prompt_length)

    def call():
        return write_with_yan(model, prompt, options.length, NUM_STEPS, compile_config=settings)

    call()
    plain = write_with_yan(model, prompt, options.length, NUM_STEPS)
    (recording,) = model._cuda_graphs.calls.values()
    measured = {"call": call, "replay": recording.graph.replay}
    for each in measured.values():
        for _ in range(5):
            each()
    seconds = {name: [seconds_of(each, device) for _ in range(options.repeats)] for name, each in measured.items()}
    results = {name: summary(each) for name, each in seconds.items()}
    for name, result in results.items():
        print(
            f"{name:>8} {1000 * result['median']:8.3f} ms ({1000 * result['low']:.3f} to {1000 * result['high']:.3f})"
        )
    limits = machine_limits(device, models.dtype)
    sizes = options.batch_size, options.prompt_length, options.length, NUM_STEPS, models.dtype.itemsize
    floor = sum(cost.floor_s(**limits) for cost in part_costs(models.config(options.variant), *sizes).values())
    print(f"   floor {1000 * floor:8.3f} ms; the replay takes {results['replay']['median'] / floor:.2f} times as long")
    share = (call() == plain).float().mean().item()
    print(f"{share:.3f} of the tokens are those of the plain call")
    about = {name: value for name, value in vars(options).items() if name != "output"}
    content = {"machine": {**machine_description(device), **limits}, "settings": about, "seconds": results}
    content |= {"floor": floor, "same_tokens": share}
    write_json(options.output, content)
    if options.kernels:
        print_kernels(call, options.kernels)


if __name__ == "__main__":
    main()
