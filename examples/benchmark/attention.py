"""Attention in training: torch's fused kernel beside plain matrix products, forwards and backwards, by length.

`choose_attention` of the training loop decides by it.

    python examples/benchmark/attention.py --output outputs/attention.json
"""

import argparse

import torch
from timing import parse_settings, seconds_of, summary, write_json
from torch.nn.functional import scaled_dot_product_attention

from modeling_yan.layers_yan import eager_attention_forward

SIZES = {"tiny": (4, 32), "base": (12, 64)}  # heads, and width of each
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def attend_eagerly(*tensors):
    """Plain products, as transformers' `eager`."""
    width = tensors[0].shape[-1]
    return eager_attention_forward(torch.nn.Module(), *tensors, None, width**-0.5)[0]


WAYS = {"sdpa": scaled_dot_product_attention, "eager": attend_eagerly}


def step(attend, tensors):
    """Forwards and backwards."""
    attend(*tensors).sum().backward()


def measure(size: str, dtype: str, length: int, options) -> dict:
    """Seconds of both ways for equally many tokens of every length, in turn."""
    heads, width = SIZES[size]
    shape = (max(1, options.tokens // length), heads, length, width)
    device = torch.device(options.device)
    tensors = [torch.randn(shape, dtype=DTYPES[dtype], device=device, requires_grad=True) for _ in range(3)]
    seconds = {name: [] for name in WAYS}
    for _ in range(options.repeats + 1):
        for name, attend in WAYS.items():
            seconds[name].append(seconds_of(lambda attend=attend: step(attend, tensors), device))
    found = {name: summary(times[1:]) for name, times in seconds.items()}
    return {"seconds": found, "ratio": found["sdpa"]["median"] / found["eager"]["median"]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch, whatever its length")
    options, content = parse_settings(parser, arguments, "outputs/attention.json")
    content["sizes"] = {}
    for size in SIZES:
        for dtype in DTYPES:
            found = content["sizes"].setdefault(size, {}).setdefault(dtype, {})
            for length in options.lengths:
                found[str(length)] = figures = measure(size, dtype, length, options)
                write_json(options.output, content)
                times = ", ".join(f"{name} {each['median'] * 1e3:.1f} ms" for name, each in figures["seconds"].items())
                print(f"{size}, {dtype}, {length} tokens: {times}, ratio {figures['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
