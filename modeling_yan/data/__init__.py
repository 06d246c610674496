"""Data: rows on disk, data sets by name, the story world, tasks made from text, the tokenizer and the collators."""

from importlib import import_module
from typing import Any

_HOMES = {
    "read_rows": "rows",
    "write_rows": "rows",
    "load_rows": "sources",
    "REGISTRY": "registry",
    "DatasetSpec": "registry",
    "FormatOptions": "registry",
    "SkippedRow": "registry",
    "Story": "stories",
    "generate_story": "stories",
    "generate_stories": "stories",
    "generate_clozes": "stories",
    "train_tokenizer": "tokenizer",
    "prepare_tokenizer": "tokenizer",
    "TEXT_TASKS": "tasks",
    "split_sentences": "tasks",
    "crop_sentences": "tasks",
    "build_pairs": "tasks",
    "split_targets": "canvases",
    "AutoencoderCollator": "collators",
    "FlowCollator": "collators",
    "CompletionCollator": "completions",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # On demand, because the files are commands too: `python -m` complains about one that its package has imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
