"""Hold the Triton kernels of the experts against one head after the other.

Run in a process of its own with TRITON_INTERPRET=1 or on a GPU.

TRITON_INTERPRET=1 python tests/triton_experts.py
"""

import torch
from torch.nn import functional as F

from modeling_yan import experts_triton_yan
from modeling_yan.experts_triton_yan import triton_heads

# T, D, F and the share of each expert: none, one and several tiles of them, whole and not
CASES = [
    *((1, 16, 1, (1,)), (1, 8, 16, (0, 1)), (40, 24, 40, (0.1, 0, 0.9))),
    *((64, 64, 32, (0.5, 0.5)), (150, 24, 40, (0.5, 0.5)), (50, 96, 80, (0.3, 0.3, 0, 0.4))),
]
LARGE_CASES = [(512, 768, 3072, (0.25,) * 4), (512, 768, 3072, (0, 1, 0, 0)), (5000, 768, 1536, (0.7, 0.2, 0.1))]
# of the largest output, beside what the tanh form of GELU differs by
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def compare(num_tokens, hidden_size, width, shares, dtype, device):
    torch.manual_seed(num_tokens)
    chosen = torch.multinomial(torch.tensor([float(share) for share in shares]), num_tokens, replacement=True)
    sizes, order = chosen.bincount(minlength=len(shares)), chosen.argsort(stable=True)
    states = torch.randn(num_tokens, hidden_size)
    shapes = (width, hidden_size), (width,), (hidden_size, width), (hidden_size,)
    layers = [torch.randn(len(shares), *shape) / hidden_size**0.5 for shape in shapes]
    states, *layers = (tensor.to(device, dtype) for tensor in (states, *layers))
    actual = triton_heads(states, order.to(device), sizes.to(device), *layers)
    heads = zip(*(tensor.double() for tensor in layers), strict=True)
    every = torch.stack([F.gelu(states.double() @ up.T + b) @ down.T + c for up, b, down, c in heads])
    expected = every[chosen.to(device), torch.arange(num_tokens, device=device)]
    atol = TOLERANCES[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = CASES if device == "cpu" else [*CASES, *LARGE_CASES]
    if device == "cpu":
        # so small layers take more tiles, and tiles of the largest kind
        experts_triton_yan.MOST_COLUMNS, experts_triton_yan.FEW_COLUMNS, experts_triton_yan.INNER = 32, 16, 32
        experts_triton_yan.MOST_ROWS = 32
    # the interpreter's bfloat16 is wrong, and a GPU has kernels for 16 bits alone
    dtypes = [torch.float32, torch.float16] if device == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        for case in cases:
            compare(*case, dtype, device)
    print(f"{len(cases) * len(dtypes)} comparisons on {device}")
