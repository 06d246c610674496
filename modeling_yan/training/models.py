"""The model of a stage, from a preset or from a checkpoint."""

from pathlib import Path

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ..configuration_yan import YanConfig
from ..modeling_yan import YanForAutoencoding, YanForFlowGeneration

STAGES = {"autoencoder": YanForAutoencoding, "flow": YanForFlowGeneration}
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def load_model(stage: str, name: str, tokenizer):
    """The stage's model: weights of a checkpoint, or a fresh one of a preset, fitted to the tokenizer.

    Args:
        name: Folder or hub name. It counts as a preset if it holds no weights.

    Raises:
        ValueError: The tokenizer lacks a special token, or does not fit the checkpoint.
    """
    for token in ("pad_token_id", "eos_token_id", "mask_token_id"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"the tokenizer has no {token}: add the token before training")
    special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "bos", "eos", "mask")}
    config = YanConfig.from_pretrained(name)
    if not has_weights(name):
        config.update({"vocab_size": len(tokenizer), **special})
        return STAGES[stage](config)
    differing = {token: value for token, value in special.items() if getattr(config, token) != value}
    if len(tokenizer) > config.vocab_size or differing:
        raise ValueError(
            f"the tokenizer with {len(tokenizer)} tokens and {special} does not fit the checkpoint {name} with "
            f"vocab_size={config.vocab_size} and { {token: getattr(config, token) for token in special} }"
        )
    return STAGES[stage].from_pretrained(name)


def has_weights(name: str) -> bool:
    """Whether a folder, or a repository of the hub, holds weights beside its config."""
    if Path(name).is_dir():
        return any((Path(name) / file).exists() for file in WEIGHTS)
    return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in WEIGHTS)
