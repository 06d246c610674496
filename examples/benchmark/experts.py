"""Ways of computing each token's own expert against each other: seconds of the heads alone.

    python examples/benchmark/experts.py --threads 2 --output outputs/experts.json
    python examples/benchmark/experts.py --device cuda --dtype bfloat16

`package`: what the model does. `grouped`: tokens sorted by expert, and torch's grouped products of weights that were
stacked before. `all`: every head for every token, of which one is kept. Which token has which expert is drawn evenly,
and known, as it is at all solver steps but the first. A call goes over several sets of weights, which no cache
holds at once; the seconds are those of one. On a GPU the calls are CUDA graphs, which need no host.
"""

import argparse
from pathlib import Path

import torch
from contenders import PRESETS
from speed import DTYPES
from timing import interleave, machine_description, recorded, summary, write_json
from torch.nn import functional as F

from modeling_yan import YanConfig
from modeling_yan.experts_yan import YanExperts

NUM_SETS = 3


def with_package(experts, states, chosen):
    groups = experts.dispatch(chosen)
    return lambda: experts.combine(states, groups)


def with_all(experts, states, chosen):
    index = chosen[..., None, None].expand(*chosen.shape, 1, states.shape[-1])
    return lambda: experts(states).gather(-2, index).squeeze(-2)


def with_grouped(experts, states, chosen):
    groups = experts.dispatch(chosen)
    ends, expert = groups.sizes.cumsum(0).int(), chosen.flatten()[groups.order]
    layers = [[getattr(head, name) for head in experts.heads] for name in ("up_proj", "down_proj")]
    (up, up_bias), (down, down_bias) = (
        [torch.stack([getattr(layer, name) for layer in each]) for name in ("weight", "bias")] for each in layers
    )

    def call():
        tokens = states.flatten(0, 1)[groups.order]
        hidden = F.gelu(F.grouped_mm(tokens, up.transpose(1, 2), offs=ends) + up_bias[expert])
        outputs = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends) + down_bias[expert]
        return outputs[groups.position].view_as(states)

    return call


FORMS = {"package": with_package, "all": with_all}
if hasattr(F, "grouped_mm"):
    FORMS["grouped"] = with_grouped


def make_calls(config, num_tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    """A function without arguments for each form, which returns the outputs (1, T, D) of every set of weights."""
    torch.manual_seed(0)
    sets = [YanExperts(config).to(device, dtype) for _ in range(NUM_SETS)]
    states = torch.randn(1, num_tokens, config.hidden_size).to(device, dtype)
    chosen = torch.randint(config.num_experts, (1, num_tokens)).to(device)
    ready = {name: [form(experts, states, chosen) for experts in sets] for name, form in FORMS.items()}
    return {name: lambda calls=calls: [call() for call in calls] for name, calls in ready.items()}


@torch.no_grad()
def measure(num_tokens: int, options) -> dict:
    """Seconds of each form, for one set of weights."""
    device = torch.device(options.device)
    config = YanConfig.from_pretrained(PRESETS / f"yan-transformer-{options.preset}")
    calls = make_calls(config, num_tokens, device, DTYPES[options.dtype])
    if device.type == "cuda":
        calls = {name: recorded(call) for name, call in calls.items()}
    for call in calls.values():
        call()
    seconds = interleave(calls, dict.fromkeys(calls, options.repeats), device)
    return {name: summary([value / NUM_SETS for value in values]) for name, values in seconds.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=("base", "small", "tiny"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("outputs/experts.json"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    content = {"machine": machine_description(torch.device(options.device)), "settings": settings, "tokens": {}}
    for num_tokens in options.tokens:
        content["tokens"][str(num_tokens)] = results = measure(num_tokens, options)
        write_json(options.output, content)
        for name, seconds in results.items():
            spread = f"({1000 * seconds['low']:.3f} to {1000 * seconds['high']:.3f})"
            print(f"{num_tokens:6} {name:10} {1000 * seconds['median']:10.3f} ms {spread}", flush=True)


if __name__ == "__main__":
    main()
