"""Running a checkpoint over rows of source and target."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm


@torch.no_grad()
def generate_answers(model, tokenizer, sources: Sequence[str], batch_size: int = 32, **options) -> list[str]:
    """The new text that `model.generate(..., **options)` writes for each source, without special tokens."""
    answers = []
    for start in tqdm(range(0, len(sources), batch_size), desc="generating", leave=False):
        batch = tokenizer(list(sources[start : start + batch_size]), padding=True, return_tensors="pt").to(
            model.device
        )
        sequences = model.generate(**batch, **options)
        new_tokens = sequences[:, batch["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return answers
