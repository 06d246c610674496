"""One training step of the flow stage: tokens per second and peak memory, beside a naive form of the same loss.

The naive form encodes the prompt again, and computes its keys and values again, for every solver step and for the
likelihood; YAN does it once a batch. Both have the same loss and the same gradients.

    python examples/benchmark/training_step.py --batch_size 4 --output outputs/training_step.json
"""

import argparse
from unittest import mock

import torch
from contenders import PRESETS, VARIANTS
from timing import parse_settings, seconds_of, summary, write_json

from modeling_yan import YanConfig, YanForFlowGeneration


def shared_loss(model, ids, labels, num_steps):
    """The model's own objective."""
    return model(ids, torch.ones_like(ids), labels=labels, num_flow_steps=num_steps).loss


def naive_loss(model, ids, labels, num_steps):
    """The same objective, where every pass of the flow begins with the prompt's ids."""
    flow, mask = model.flow, torch.ones_like(ids)
    trunk = flow.trunk

    def fresh_trunk(x, positions, modulation, condition):
        latents = model.model(ids, mask, return_dict=True).last_hidden_state
        return trunk(x, positions, modulation, model.condition(latents, mask, labels.shape[1]))

    with mock.patch.object(flow, "trunk", fresh_trunk):
        return shared_loss(model, ids, labels, num_steps)


FORMS = {"shared": shared_loss, "naive": naive_loss}


def step(model, optimizer, loss_function, batch, num_steps):
    """Forward, backward and update."""
    loss_function(model, *batch, num_steps).backward()
    optimizer.step()
    optimizer.zero_grad()


def kept_bytes(loss_function, model, batch, num_steps) -> int:
    """Bytes of activations that one loss keeps for its backward pass; parameters are not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_function(model, *batch, num_steps)
    return sum(storages.values())


def measure(variant: str, options) -> dict:
    """Tokens per second and memory of each form, for prompts and labels of the asked size."""
    device = torch.device(options.device)
    config = YanConfig.from_pretrained(PRESETS / f"yan-{variant}-{options.preset}")
    torch.manual_seed(0)
    model = YanForFlowGeneration(config).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    sizes = (options.prompt_length, config.canvas_length)
    batch = [torch.randint(4, config.vocab_size, (options.batch_size, size)).to(device) for size in sizes]
    calls = {
        name: lambda loss_function=loss_function: step(model, optimizer, loss_function, batch, options.num_steps)
        for name, loss_function in FORMS.items()
    }
    kept = {name: kept_bytes(function, model, batch, options.num_steps) for name, function in FORMS.items()}
    for call in calls.values():
        call()
    seconds, peaks = {name: [] for name in calls}, {}
    for _ in range(options.repeats):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds[name].append(seconds_of(call, device))
            peaks[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    num_tokens = options.batch_size * sum(sizes)
    return {
        name: {
            "seconds": summary(seconds[name]),
            "tokens_per_s": num_tokens / summary(seconds[name])["median"],
            "kept_bytes": kept[name],
            "peak_bytes": peaks[name],
        }
        for name in FORMS
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=("base", "tiny"))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens; the labels fill the preset's canvas")
    parser.add_argument("--num_steps", type=int, default=3, help="solver steps that the loss trains through")
    options, content = parse_settings(parser, arguments, "outputs/training_step.json", repeats=3)
    content["models"] = {}
    for variant in VARIANTS:
        content["models"][f"yan-{variant}"] = results = measure(variant, options)
        write_json(options.output, content)
        for name, result in results.items():
            speed = f"{result['seconds']['median']:8.2f} s {result['tokens_per_s']:9.0f} tokens/s"
            kept = f"{result['kept_bytes'] / 1e6:9.1f} MB kept for the backward pass"
            print(f"yan-{variant:12} {name:7} {speed} {kept}", flush=True)


if __name__ == "__main__":
    main()
