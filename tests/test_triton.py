"""The Triton kernels equal plain code: on a GPU, or by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["triton_scan.py", "triton_experts.py"])
def test_the_kernels_equal_plain_code(script):
    """In a process of its own, because the interpreter has to be chosen before the kernels are defined."""
    environment = os.environ if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "comparisons on" in result.stdout, result.stderr[-3000:]
