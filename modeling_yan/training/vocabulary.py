"""Fitting a trained model to a tokenizer with more tokens or other special tokens than it knows."""

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that the embeddings need: ids may have holes, so the number of tokens may be too few."""
    return 1 + max(tokenizer.get_vocab().values())


@torch.no_grad()
def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> int:
    """Make room for the tokens of a prepared tokenizer in a YAN model, in place, and take over its special tokens.

    The tokenizer learns how long a prompt may be (`model_max_length`).

    New rows of the embeddings, and of an untied decoder output, are drawn from a Gaussian. In each dimension it has
    the mean and the deviation of the old rows; a new bias is the mean of the old ones. So a new token starts as an
    average one. The vocabulary never shrinks, and `lm_head` stays tied if it was. Where the config freezes the
    embeddings, new tokens would never be learned: see `freeze_embeddings`.

    Args:
        model: Any YAN model.
        tokenizer: A tokenizer with pad, EOS and mask tokens, as `prepare_tokenizer` makes it.
        seed: Seed of the new rows.

    Returns:
        Number of new rows.

    Raises:
        ValueError: The tokenizer lacks a pad, EOS or mask token.
    """
    special = {name: getattr(tokenizer, name) for name in ROLES}
    missing = [name for name, value in special.items() if value is None and name != "bos_token_id"]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}: call prepare_tokenizer first")
    old_size = model.config.vocab_size
    size = max(old_size, count_ids(tokenizer))
    if size > old_size:
        model.resize_token_embeddings(size, mean_resizing=False)
        _draw_new_rows(model, old_size, torch.Generator().manual_seed(seed))
    model.config.update(special)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.update(**{name: special[name] for name in ROLES if name != "mask_token_id"})
    limit_prompts(tokenizer, model.config)
    return size - old_size


def limit_prompts(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Tell a tokenizer, in place, where a model's prompts end: `truncation=True` then cuts, and pipelines may, too."""
    longest = getattr(config, "max_prompt_length", None) or getattr(config, "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = longest


def _draw_new_rows(model: PreTrainedModel, old_size: int, generator: torch.Generator) -> None:
    embeddings, head = cast(nn.Embedding, model.get_input_embeddings()), model.get_output_embeddings()
    _draw_like_old(embeddings.weight, old_size, generator)
    if head is None:
        return
    if head.weight is not embeddings.weight:
        _draw_like_old(head.weight, old_size, generator)
    head.bias[old_size:] = head.bias[:old_size].mean()


def _draw_like_old(weight: torch.Tensor, old_size: int, generator: torch.Generator) -> None:
    old = weight[:old_size].float()
    noise = torch.randn(len(weight) - old_size, weight.shape[1], generator=generator).to(weight.device)
    weight[old_size:] = (old.mean(0) + old.std(0, correction=0) * noise).to(weight.dtype)
