"""Counting what was generated."""

from collections.abc import Sequence

import torch


def num_new_tokens(
    sequences: torch.Tensor | Sequence[Sequence[int]], eos_token_id: int | Sequence[int] | None
) -> list[int]:
    """Tokens of each row of new tokens (B, L), without the prompt, up to and including the first EOS.

    A row without EOS counts whole. What follows an EOS is padding and no work of the model.

    Raises:
        ValueError: The sequences are not two-dimensional.
    """
    sequences = torch.as_tensor(sequences)
    if sequences.dim() != 2:
        raise ValueError(f"sequences of shape {tuple(sequences.shape)}: must be (rows, new tokens)")
    eos = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    is_eos = torch.isin(sequences, torch.tensor(eos, dtype=sequences.dtype, device=sequences.device))
    is_before = is_eos.long().cumsum(1) - is_eos.long() == 0  # no EOS has come before this token
    return is_before.sum(1).tolist()


def tokens_per_second(sequences: torch.Tensor, eos_token_id: int | Sequence[int] | None, seconds: float) -> float:
    """New tokens of all rows (B, L), counted by `num_new_tokens`, over the seconds that all of them took together.

    Raises:
        ValueError: Seconds not above 0, or sequences that are not two-dimensional.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: must be above 0")
    return sum(num_new_tokens(sequences, eos_token_id)) / seconds
