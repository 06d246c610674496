"""Models to compare YAN with, at equal size: autoregressive ones from transformers, and masked diffusion."""

from importlib import import_module
from typing import Any

from .convolution import ConvolvedDecoder, ConvolvedEncoderDecoder
from .inputs import CONVOLVED, INPUT_ADAPTERS, write_targets
from .masked_diffusion import MaskedDiffusion, MaskedDiffusionConfig

_SIZES = ("BASELINES", "count_parameters", "make_baseline", "match_size")

__all__ = [
    *_SIZES,
    "CONVOLVED",
    "INPUT_ADAPTERS",
    "ConvolvedDecoder",
    "ConvolvedEncoderDecoder",
    "MaskedDiffusion",
    "MaskedDiffusionConfig",
    "write_targets",
]


def __getattr__(name: str) -> Any:
    # On demand, because sizes.py is a command too: `python -m` complains about one that its package has imported.
    if name not in _SIZES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".sizes", __name__), name)
