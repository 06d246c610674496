"""What more experts of one shared head cost: parameters, and seconds of a text, by their number K.

    python examples/benchmark/many_experts.py --output outputs/many-experts.json

All models have the tiny preset's layers, one expert for a whole text, random weights and 64 prompt tokens. `drawn`
draws the expert from the gate. `best` compares the texts of all experts, as `generate` does without sampling.
"""

import argparse

import torch
from contenders import PRESETS
from timing import interleave, parse_settings, seconds_of, summary, write_json

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.evaluation.timing import PROMPT_LENGTH

WAYS = {"drawn": {"do_sample": True, "seed": 0}, "best": {"do_sample": False}}


def make_model(num_experts: int, chain: bool) -> YanForFlowGeneration:
    """A fresh tiny model whose experts share one head; tokens decoded as a chain, or each by itself."""
    fields = {"num_experts": num_experts, "share_expert_head": True, "expert_scope": "sequence"}
    fields |= {"moe_intermediate_size": 2048, "train_expert_choice": "posterior", "crf_rank": 64 * chain}
    config = YanConfig.from_pretrained(PRESETS / "yan-transformer-tiny").with_fields(**fields)
    torch.manual_seed(0)
    return YanForFlowGeneration(config).eval()


def measure(chain: bool, options) -> dict:
    """Parameters, seconds, and their ratio to those of the fewest experts, by number of experts and way."""
    device = torch.device(options.device)
    models = {number: make_model(number, chain).to(device) for number in sorted(options.num_experts)}
    ids = torch.randint(4, 2000, (1, PROMPT_LENGTH), device=device)
    calls = {
        (number, way): lambda model=model, settings=settings: model.generate(ids, eos_token_id=None, **settings)
        for number, model in models.items()
        for way, settings in WAYS.items()
    }
    for call in calls.values():
        seconds_of(call, device)
    seconds = interleave(calls, dict.fromkeys(calls, options.repeats), device)
    found, fewest = {}, min(models)
    for number, model in models.items():
        figures = {way: {"seconds": summary(seconds[number, way])} for way in WAYS}
        for way, figure in figures.items():
            figure["ratio"] = figure["seconds"]["median"] / summary(seconds[fewest, way])["median"]
        found[str(number)] = {"parameters": model.num_parameters(), **figures}
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_experts", type=int, nargs="+", default=[1, 4, 16, 64])
    options, content = parse_settings(parser, arguments, "outputs/many-experts.json", repeats=21)
    for name, chain in (("each token by itself", False), ("as a chain", True)):
        content[name] = measure(chain, options)
        write_json(options.output, content)
        for number, figures in content[name].items():
            times = ", ".join(
                f"{way} {figures[way]['seconds']['median'] * 1e3:.1f} ms ({figures[way]['ratio']:.2f})" for way in WAYS
            )
            print(f"{name}, {number} experts: {figures['parameters']:,} parameters, {times}", flush=True)


if __name__ == "__main__":
    main()
