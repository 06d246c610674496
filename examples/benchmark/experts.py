"""Ways of computing each token's own expert against each other: seconds of the heads alone.

    python examples/benchmark/experts.py --threads 2 --output outputs/experts.json
    python examples/benchmark/experts.py --device cuda --dtype bfloat16
    python examples/benchmark/experts.py --threads 1 --before ../main --output outputs/experts-before.json

`package`: what the model does. `grouped`: tokens sorted by expert, and torch's grouped products. `all`: every head for
every token, of which one is kept. `before`: what the package of another checkout does, with the same weights. Which
token has which expert is drawn evenly, and known, as it is at all solver steps but the first. A call goes over several
sets of weights, which no cache holds at once; the seconds are those of one. On a GPU the calls are CUDA graphs, which
need no host.
"""

import argparse
import importlib
import statistics
import sys
import types
from pathlib import Path

import torch
from contenders import PRESETS
from speed import DTYPES
from timing import interleave, parse_settings, recorded, summary, write_json
from torch.nn import functional as F

from modeling_yan import YanConfig
from modeling_yan.expert_heads_yan import EXPERTS_FUNCTIONS
from modeling_yan.experts_yan import YanExperts

NUM_SETS = 3


def with_package(experts, states, chosen):
    groups = experts.dispatch(chosen)
    return lambda: experts.combine(states, groups)


def with_function(name):
    def prepare(experts, states, chosen):
        groups, compute = experts.dispatch(chosen), EXPERTS_FUNCTIONS[name]
        return lambda: compute(experts.heads, states.flatten(0, 1), groups).view_as(states)

    return prepare


FORMS = {"package": with_package, "all": with_function("all_heads")}
if hasattr(F, "grouped_mm"):
    FORMS["grouped"] = with_function("grouped_mm")


def experts_of(checkout: Path) -> type:
    """The class `YanExperts` of another checkout, under a name of its own beside this one."""
    package = types.ModuleType("modeling_yan_before")
    package.__path__ = [str(checkout / "modeling_yan")]
    sys.modules[package.__name__] = package
    return importlib.import_module("modeling_yan_before.experts_yan").YanExperts


def make_calls(
    config,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    before: type | None = None,
    backward: bool = False,
) -> dict:
    """A function without arguments for each form, which returns the outputs (1, T, D) of every set of weights."""
    torch.manual_seed(0)
    sets = [(before or YanExperts)(config).to(device, dtype) for _ in range(NUM_SETS)]
    states = torch.randn(1, num_tokens, config.hidden_size).to(device, dtype)
    chosen = torch.randint(config.num_experts, (1, num_tokens)).to(device)
    ready, owners = {}, {}
    if before is not None:
        ready["before"] = [with_package(experts, states, chosen) for experts in sets]
        owners["before"] = sets
        states_of_before, sets = [experts.state_dict() for experts in sets], [YanExperts(config) for _ in sets]
        for experts, state in zip(sets, states_of_before, strict=True):
            experts.to(device, dtype).load_state_dict(state)
    forms = FORMS if config.num_experts > 1 else {"package": with_package}
    ready |= {name: [form(experts, states, chosen) for experts in sets] for name, form in forms.items()}
    calls = {name: lambda calls=calls: [call() for call in calls] for name, calls in ready.items()}
    if not backward:
        return calls
    return {name: with_gradients(call, owners.get(name, sets)) for name, call in calls.items()}


def with_gradients(call, sets):
    """The call and its backward pass, whose gradients are new, as after `zero_grad`."""
    weights = [weight for experts in sets for weight in experts.parameters()]
    return lambda: torch.autograd.grad(torch.stack(call()).sum(), weights, materialize_grads=True)


def measure(num_tokens: int, options) -> dict:
    """Seconds of each form, for one set of weights."""
    device = torch.device(options.device)
    config = YanConfig.from_pretrained(PRESETS / f"yan-transformer-{options.preset}", num_experts=options.num_experts)
    before = None if options.before is None else experts_of(options.before)
    calls = make_calls(config, num_tokens, device, DTYPES[options.dtype], before, options.backward)
    with torch.set_grad_enabled(options.backward):
        if device.type == "cuda" and not options.backward:
            calls = {name: recorded(call) for name, call in calls.items()}
        for call in calls.values():
            call()
        seconds = interleave(calls, dict.fromkeys(calls, options.repeats), device)
    return {name: summary([value / NUM_SETS for value in values]) for name, values in seconds.items()}


def rounds_ratio(seconds: list[float], others: list[float]) -> float:
    """Median over the rounds, in each of which both were measured one after the other."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=("base", "small", "tiny"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--backward", action="store_true", help="with the backward pass, as in training")
    parser.add_argument("--before", type=Path, help="folder of another checkout, to be measured beside this one")
    options, content = parse_settings(parser, arguments, "outputs/experts.json")
    content["tokens"] = {}
    for num_tokens in options.tokens:
        content["tokens"][str(num_tokens)] = results = measure(num_tokens, options)
        if options.before is not None:
            ratio = rounds_ratio(results["package"]["all"], results["before"]["all"])
            content.setdefault("package / before", {})[str(num_tokens)] = ratio
            print(f"{num_tokens:6} package / before {ratio:.3f}", flush=True)
        write_json(options.output, content)
        for name, seconds in results.items():
            spread = f"({1000 * seconds['low']:.3f} to {1000 * seconds['high']:.3f})"
            print(f"{num_tokens:6} {name:10} {1000 * seconds['median']:10.3f} ms {spread}", flush=True)


if __name__ == "__main__":
    main()
