"""Log-probabilities of targets in training: the package's function beside torch's own, forwards and backwards.

python examples/benchmark/log_probs.py --output outputs/log-probs.json
"""

import argparse

import torch
from timing import parse_settings, seconds_of, summary, write_json

from modeling_yan.flow_matching_yan import target_log_probs

SIZES = {"tokens": (8, 128, 30_522, 1), "graph": (32, 64, 4_096, 32)}  # rows, positions, vocabulary, targets of each


def by_torch(logits, targets):
    """All log-probabilities in float32, of which the targets' are taken."""
    return logits.log_softmax(-1, dtype=torch.float32).gather(-1, targets)


WAYS = {"torch": by_torch, "package": target_log_probs}


def step(compute, logits, targets):
    """Forwards and backwards."""
    compute(logits, targets).sum().backward()


def kept_bytes(compute, logits, targets) -> int:
    """What a forward pass keeps for the backward pass, besides its arguments."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x}) or x, lambda x: x):
        compute(logits, targets)
    own = {tensor.untyped_storage().data_ptr() for tensor in (logits, targets)}
    return sum(x.nbytes for x in kept.values() if x.untyped_storage().data_ptr() not in own)


def measure(size: str, options) -> dict:
    """Seconds of both ways, in turn, and the bytes that they keep."""
    rows, length, vocab_size, num_targets = SIZES[size]
    rows, device = max(1, rows // options.divide_by), torch.device(options.device)
    logits = torch.randn(rows, length, vocab_size, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets = torch.randint(vocab_size, (rows, length, num_targets), device=device)
    seconds = {name: [] for name in WAYS}
    for _ in range(options.repeats + 1):
        for name, compute in WAYS.items():
            logits.grad = None
            seconds[name].append(seconds_of(lambda compute=compute: step(compute, logits, targets), device))
    found = {name: summary(times[1:]) for name, times in seconds.items()}
    kept = {name: kept_bytes(compute, logits, targets) for name, compute in WAYS.items()}
    return {"seconds": found, "bytes": kept, "ratio": found["torch"]["median"] / found["package"]["median"]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divide_by", type=int, default=1, help="divides the number of rows")
    options, content = parse_settings(parser, arguments, "outputs/log-probs.json")
    content["sizes"] = {}
    for size in SIZES:
        content["sizes"][size] = figures = measure(size, options)
        write_json(options.output, content)
        print(f"{size}: torch's takes {figures['ratio']:.2f} times as long; bytes kept {figures['bytes']}", flush=True)


if __name__ == "__main__":
    main()
