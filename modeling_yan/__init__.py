"""YAN: non-autoregressive language models that generate a text in three flow-matching steps (arXiv 2604.15009)."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0"  # the one place; setup.cfg reads it
__all__ = [
    "YanConfig",
    "YanForAutoencoding",
    "YanForFlowGeneration",
    "YanGenerationConfig",
    "YanGenerationOutput",
    "YanModel",
    "YanPreTrainedModel",
]


def _is_command(words: list[str]) -> bool:
    """Whether a process with these words is the command `yan`, which loads torch once it knows what is asked."""
    return words[1:3] == ["-m", "modeling_yan"] or (len(words) > 1 and Path(words[1]).name in ("yan", "yan.exe"))


def __getattr__(name: str) -> Any:
    """A public name that is not loaded yet."""
    if name in __all__:
        return getattr(import_module(".registration", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not _is_command(sys.orig_argv):
    from .registration import (
        YanConfig,
        YanForAutoencoding,
        YanForFlowGeneration,
        YanGenerationConfig,
        YanGenerationOutput,
        YanModel,
        YanPreTrainedModel,
    )
