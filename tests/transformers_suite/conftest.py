"""Make the helpers beside this file importable, and name the markers that transformers' tests carry."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

SUITE_MARKERS = (
    "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test is_training_test order"
)


def pytest_configure(config):
    for name in SUITE_MARKERS.split():
        config.addinivalue_line("markers", f"{name}: set by transformers' own tests")
