"""The model of a stage, from a preset or from a checkpoint."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ..baselines import make_baseline
from ..configuration_yan import YanConfig
from ..modeling_yan import YanForAutoencoding, YanForFlowGeneration
from .stages import find_stage
from .vocabulary import ROLES, count_ids, fit_to_tokenizer

MODELS = {"autoencoder": YanForAutoencoding, "flow": YanForFlowGeneration}
LONGEST_EAGER = 256  # tokens; beyond, torch's fused attention is the faster one, and needs less memory
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@contextlib.contextmanager
def naming(option: str, value: str) -> Iterator[None]:
    """Raise a ValueError that names the option where a folder or hub name can't be loaded."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--{option} {value!r}: must be a folder or a name on the hub ({error})") from error


def load_model(
    stage: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    resize_embeddings: bool = False,
    config_overrides: str = "",
) -> PreTrainedModel:
    """The stage's model: weights of a checkpoint, or a fresh one of a preset, fitted to the tokenizer.

    A baseline is always fresh, and as large as the YAN whose config there is; but a pretrained encoder is that of the
    checkpoint.

    Args:
        name: Folder or hub name. It counts as a preset if it holds no weights.
        tokenizer: With pad, EOS and mask tokens, as `prepare_tokenizer` leaves it.
        resize_embeddings: Whether a checkpoint may be fitted to a tokenizer that it does not know.
        config_overrides: Fields of the config to change, as for `load_config`.

    Raises:
        ValueError: The tokenizer lacks a special token, or does not fit the checkpoint; overrides of a field that
            follows from the tokenizer; or as `load_config`.
    """
    for role in ("pad_token_id", "eos_token_id", "mask_token_id"):
        if getattr(tokenizer, role) is None:
            raise ValueError(f"the tokenizer has no {role}: call prepare_tokenizer first")
    special = {role: getattr(tokenizer, role) for role in ROLES}
    given = [field for field, _ in split_overrides(config_overrides) if field == "vocab_size" or field in special]
    if given:
        raise ValueError(f"config_overrides={config_overrides!r}: {given[0]} is that of the tokenizer")
    config = load_config(name, config_overrides)
    is_baseline = find_stage(stage).is_baseline
    if is_baseline or not has_weights(name):
        config.update({"vocab_size": count_ids(tokenizer), **special})
        return _make_baseline(stage, name, config) if is_baseline else MODELS[stage](config)
    differing = {role: value for role, value in special.items() if getattr(config, role) != value}
    if (count_ids(tokenizer) > config.vocab_size or differing) and not resize_embeddings:
        raise ValueError(
            f"the tokenizer with {count_ids(tokenizer)} tokens and {special} does not fit the checkpoint {name} with "
            f"vocab_size={config.vocab_size} and { {role: getattr(config, role) for role in special} }; "
            "give the checkpoint's own tokenizer, or --resize_embeddings True to train it for another one"
        )
    model = MODELS[stage].from_pretrained(name, config=config)
    fit_to_tokenizer(model, tokenizer)
    if stage == "flow" and model.generation_config.max_new_tokens == load_config(name).canvas_length:
        model.generation_config.max_new_tokens = config.canvas_length  # one canvas, however long it is now
    return model


def choose_attention(model: PreTrainedModel, device: torch.device, mixed_precision: str, longest: int) -> None:
    """Let a model that trains in bfloat16 on a CPU, on `longest` tokens or fewer, attend by plain matrix products.

    There the backward pass of torch's fused attention takes several times as long (docs/benchmarks/attention.json).
    """
    is_slow = device.type == "cpu" and mixed_precision == "bf16" and longest <= LONGEST_EAGER
    if is_slow and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _make_baseline(stage: str, name: str, config: YanConfig) -> PreTrainedModel:
    model = make_baseline(stage, config)
    if config.encoder is not None and has_weights(name):
        source = YanForFlowGeneration.from_pretrained(name).model.encoder
        model.get_encoder().load_state_dict(source.state_dict(), strict=False)  # a pooler, which nothing reads, is new
        words = model.get_decoder().get_input_embeddings().weight
        with torch.no_grad():
            words.copy_(source.get_input_embeddings().weight)
    return model


def split_overrides(overrides: str) -> list[tuple[str, str]]:
    """The fields and values of name=value,name=value."""
    pairs = re.split(r",\s*(?=\w+=)", overrides) if overrides else []
    return [(field, value) for field, _, value in (pair.partition("=") for pair in pairs)]


def load_config(name: str, overrides: str = "") -> YanConfig:
    """The config of a folder or hub name, with fields changed as `overrides` says: name=value,name=value.

    Raises:
        ValueError: A field that does not exist, or a value that is not allowed.
    """
    config = YanConfig.from_pretrained(name)
    if overrides:
        try:
            for field, value in split_overrides(overrides):
                if getattr(config, field, overrides) is None:  # transformers knows no type to read it as
                    setattr(config, field, yaml.safe_load(value))
                else:
                    config.update_from_string(f"{field}={value}")
        except (ValueError, TypeError, AttributeError, yaml.YAMLError, StrictDataclassError) as error:
            raise ValueError(f"config_overrides={overrides!r}: must be name=value,name=value; {error}") from error
        config.validate_fields()
    return config


def has_weights(name: str) -> bool:
    """Whether a folder, or a repository of the hub, holds weights beside its config."""
    if Path(name).is_dir():
        return any((Path(name) / file).exists() for file in WEIGHTS)
    return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in WEIGHTS)
