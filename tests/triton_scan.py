"""Hold the Triton kernels against the plain scan; run in a process of its own with TRITON_INTERPRET=1 or on a GPU.

TRITON_INTERPRET=1 python tests/triton_scan.py
"""

from itertools import product

import torch

from modeling_yan import scan_triton_yan
from modeling_yan.mamba_yan import _scan, _scan_gradients
from modeling_yan.scan_triton_yan import CHUNK_STEPS, triton_scan, triton_scan_gradients

# L, G, B, E, N, and steps of a chunk: one, two and several of them, whole and not; channels beyond one program's
CASES = [
    *((*shape, chunk) for shape, chunk in product([(1, 1, 1, 1, 1), (7, 2, 3, 5, 3), (19, 2, 1, 18, 2)], (5, 16))),
    (7, 1, 1, 5, 16, 3),
]
LARGE_CASES = [  # would take the interpreter minutes
    *((*shape, chunk) for shape, chunk in product([(300, 2, 3, 70, 16), (1000, 1, 1, 40, 5)], (5, 16, CHUNK_STEPS))),
    (128, 2, 64, 768, 16, CHUNK_STEPS),
    (2048, 2, 1, 768, 16, CHUNK_STEPS),
]
EXTREME_CASE, EXTREME_STEPS = (9, 1, 1, 5, 2, 4), (1000.0, 1e-6)  # decays of 0 and of nearly 1
PROGRAMS = 0, 2**31  # that fill the GPU: one program takes all chunks, or each takes one


def compare(length, num_scans, batch, inner, size, chunk, device, step_size=1.0):
    """y and all gradients against the plain scan in float64, to a part of their size if the steps are unusual."""
    torch.manual_seed(length)
    shape = (length, num_scans, batch)
    x, dt = torch.randn(*shape, inner), step_size * (torch.rand(*shape, inner) + 0.05)
    a_matrix = -torch.rand(num_scans, size, inner) - 0.1
    b, c, grad_y = torch.randn(*shape, size), torch.randn(*shape, size), torch.randn(*shape, inner)
    inputs = [x, dt, a_matrix, b, c]
    exact = [tensor.double() for tensor in inputs]
    expected_y, expected_borders = _scan(*exact)
    expected = [expected_y, expected_y, *_scan_gradients(grad_y.double(), *exact, expected_borders)]
    inputs, grad_y = [tensor.to(device) for tensor in inputs], grad_y.to(device)
    actual, forms = [], []
    for scan_triton_yan.FULL_GPU in PROGRAMS:
        y, borders = triton_scan(*inputs, chunk)
        actual.append(y)
        forms.append(borders)
    torch.testing.assert_close(*forms, rtol=1e-4, atol=1e-6 * borders.abs().max().item())
    actual += triton_scan_gradients(grad_y, *inputs, borders, chunk)
    for one, other in zip(actual, expected, strict=True):
        largest = other.abs().max().item()
        atol = max(1e-4, 1e-6 * largest) if step_size == 1 else 1e-5 * largest
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=atol)
    if device == "cuda":
        again = triton_scan_gradients(grad_y, *inputs, borders, chunk)
        assert all(torch.equal(one, other) for one, other in zip(again, actual[2:]))


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = CASES if device == "cpu" else [*CASES, *LARGE_CASES]
    scan_triton_yan.FEW_CHUNKS = 1
    if device == "cpu":
        scan_triton_yan.STATE_TILE = 4, 16  # so few channels take more programs
    for case in cases:
        compare(*case, device)
    for step_size in EXTREME_STEPS:
        compare(*EXTREME_CASE, device, step_size)
    print(f"{len(cases) + len(EXTREME_STEPS)} comparisons on {device}")
