"""From the batches of the flow stage to what each baseline's `forward` takes: the same rows, in another layout.

B: rows; S, L: widths of sources and targets, as `FlowCollator` gives them.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..checks_yan import IGNORE_INDEX

Batch = dict[str, Any]


def decoder_inputs(batch: Batch, pad_token_id: int) -> Batch:
    """Source, target and EOS as one sequence (B, S + L), with the loss on target and EOS alone.

    All padding goes to the right: on the left, a token of it would attend to nothing, whose gradient in bfloat16 may
    be NaN on a GPU.
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    is_target = labels != IGNORE_INDEX
    mask = torch.cat([mask, is_target.to(mask.dtype)], dim=1)
    order = (1 - mask).argsort(dim=1, stable=True)
    return {
        "input_ids": torch.cat([ids, labels.masked_fill(~is_target, pad_token_id)], dim=1).gather(1, order),
        "attention_mask": mask.gather(1, order),
        "labels": torch.cat([torch.full_like(ids, IGNORE_INDEX), labels], dim=1).gather(1, order),
        "use_cache": False,
    }


def encoder_decoder_inputs(batch: Batch, pad_token_id: int) -> Batch:
    """The source for the encoder, target and EOS as labels."""
    return {**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}, "use_cache": False}


def masked_diffusion_inputs(batch: Batch, pad_token_id: int) -> Batch:
    """As it is: a canvas filled with EOS, as wide as YAN's for the same rows."""
    return batch


INPUT_ADAPTERS: dict[str, Callable[[Batch, int], Batch]] = {
    "decoder": decoder_inputs,
    "encoder_decoder": encoder_decoder_inputs,
    "masked_diffusion": masked_diffusion_inputs,
}
# With YAN's short convolution, and what they are without it.
CONVOLVED = {f"{kind}_conv": kind for kind in INPUT_ADAPTERS}
INPUT_ADAPTERS |= {name: INPUT_ADAPTERS[kind] for name, kind in CONVOLVED.items()}


def pad_left(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, S) with the valid tokens of every row at its right end, in their order."""
    order = attention_mask.argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


@torch.no_grad()
def write_targets(model: Any, batch: Batch) -> torch.Tensor:
    """What a baseline generates for the sources of a batch, as ids (B, L) with padding after EOS; L as the labels."""
    ids, mask = pad_left(batch["input_ids"], batch["attention_mask"])
    length = batch["labels"].shape[1]
    sequences = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, num_beams=1)
    generated = sequences[:, num_given(model, ids) :]
    return torch.nn.functional.pad(generated, (0, length - generated.shape[1]), value=model.config.pad_token_id)


def num_given(model: Any, prompts: torch.Tensor) -> int:
    """Tokens that come before the new ones in what `generate` returns for prompts (B, S)."""
    return 1 if model.config.is_encoder_decoder else prompts.shape[1]
