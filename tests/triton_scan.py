"""Hold the Triton kernels against the plain scan; run in a process of its own with TRITON_INTERPRET=1 or on a GPU.

TRITON_INTERPRET=1 python tests/triton_scan.py
"""

import torch

from modeling_yan.mamba_yan import _scan, _scan_gradients
from modeling_yan.scan_triton_yan import TILE_STEPS, triton_scan, triton_scan_gradients

SHAPES = [(1, 1, 1, 1, 1), (7, 2, 3, 5, 3), (19, 2, 1, 18, 2)]  # L, G, B, E, N
LARGE_SHAPES = [(300, 2, 3, 70, 16), (1000, 1, 1, 40, 5)]  # would take the interpreter minutes


def compare(length, num_scans, batch, inner, size, chunk, device):
    torch.manual_seed(length)
    shape = (length, num_scans, batch)
    x, dt = torch.randn(*shape, inner), torch.rand(*shape, inner) + 0.05
    a_matrix = -torch.rand(num_scans, size, inner) - 0.1
    b, c, grad_y = torch.randn(*shape, size), torch.randn(*shape, size), torch.randn(*shape, inner)
    inputs = [x, dt, a_matrix, b, c]
    expected_y, expected_borders = _scan(*inputs)
    expected = _scan_gradients(grad_y, *inputs, expected_borders)
    inputs, grad_y = [tensor.to(device) for tensor in inputs], grad_y.to(device)
    y, borders = triton_scan(*inputs, chunk)
    actual = triton_scan_gradients(grad_y, *inputs, borders, chunk)
    for one, other in zip((y, *actual), (expected_y, *expected), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES if device == "cpu" else [*SHAPES, *LARGE_SHAPES]
    chunks = (5, 16) if device == "cpu" else (5, 16, TILE_STEPS)
    for shape in shapes:
        for chunk in chunks:
            compare(*shape, chunk, device)
    print(f"{len(shapes) * len(chunks)} comparisons on {device}")
