"""Models for the commands."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..configuration_yan import YanConfig
    from ..modeling_yan import YanForFlowGeneration


def prepare_library(is_quiet: bool = False) -> None:
    """Load the library and, where it should be quiet, leave stderr to what the commands say."""
    from transformers.utils import logging

    import_module("modeling_yan.registration")
    if is_quiet:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def load_config(name: str) -> "YanConfig":
    """The config of a YAN checkpoint, or of the one that an adapter belongs to.

    Raises:
        ValueError: A name without a config, or another kind of model.
    """
    config = load_any_config(name)
    if config.model_type != "yan":
        raise ValueError(f"MODEL={name!r}: its model_type={config.model_type!r} must be 'yan'")
    return config


def load_any_config(name: str) -> Any:
    """The same of any kind of model.

    Raises:
        ValueError: A name without a config.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    base = name
    try:
        adapter = find_adapter_config_file(name)
        base = json.loads(Path(adapter).read_text())["base_model_name_or_path"] if adapter else name
        return AutoConfig.from_pretrained(base)
    except OSError as error:
        if Path(name, "config.json").is_file():  # it is there and damaged
            raise
        if base != name:
            hint = f"is an adapter of {base!r}, which must be a folder here or a model on the hub"
            raise ValueError(f"MODEL={name!r}: {hint}") from error
        raise ValueError(f"MODEL={name!r}: must be a folder with a config.json, or a model on the hub") from error


def load_model(name: str, device: str | None = None) -> "YanForFlowGeneration":
    """A `YanForFlowGeneration` in evaluation mode; if no device is named, on a GPU where there is one.

    Raises:
        ValueError: No such checkpoint, one without the flow's weights, or no such device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    load_config(name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"MODEL={name!r}: has no weights for {missing[0]} and {len(missing) - 1} more tensors")
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:  # torch has both of them for a device that is not there
        raise ValueError(f"device={device!r}: {error}") from error


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer beside a checkpoint."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"MODEL={name!r}: must hold a tokenizer") from error
