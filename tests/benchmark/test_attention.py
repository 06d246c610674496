"""The benchmark of attention in training measures two ways that give the same."""

import json

import attention
import torch


def test_both_ways_give_the_same_gradients():
    gradients = []
    for attend in attention.WAYS.values():
        torch.manual_seed(0)
        tensors = [torch.randn(2, 4, 8, 16, requires_grad=True) for _ in range(3)]
        attention.step(attend, tensors)
        gradients.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(*gradients)


def test_every_length_is_measured(tmp_path):
    output = tmp_path / "attention.json"
    words = ["--lengths", "4", "8", "--tokens", "16", "--repeats", "1", "--output", str(output)]
    attention.main(words)
    sizes = json.loads(output.read_text())["sizes"]
    assert {size: {name: list(found) for name, found in each.items()} for size, each in sizes.items()} == {
        size: {name: ["4", "8"] for name in attention.DTYPES} for size in attention.SIZES
    }
    assert sizes["tiny"]["bfloat16"]["8"]["ratio"] > 0
