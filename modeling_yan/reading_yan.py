"""Reading a text off a canvas, every token by itself but for one thing: behind the end there is nothing but EOS.

Letters of the shape comments: B batch, L canvas length, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn import functional as F

from .compilation_yan import uses_operators

END_CHOICES = ("likeliest", "first")


def best_text(logits: torch.Tensor, eos: Sequence[int] = ()) -> torch.LongTensor:
    """The likeliest token ids (B, L) for logits (B, L, V) among those in which only EOS follows an EOS.

    A text of n tokens is as likely as its n tokens and the EOS in all the L - n places behind them; cut at the first
    place where EOS is the likeliest token, it would lose what stands behind a doubt. Without ids in `eos` all tokens
    are chosen by themselves. One row's result does not depend on the others.
    """
    if not eos:
        return logits.argmax(-1)
    best, tokens = _best_of_others(logits, eos)
    ends = torch.stack([logits[..., token] for token in eos])
    end, which = ends.max(0)
    higher = torch.maximum(best, end)  # taken off, so that sums are small where there is no doubt
    before = (best - higher).float().cumsum(1)
    behind = (end - higher).float().flip(1).cumsum(1).flip(1)
    length = (F.pad(before, (1, 0)) + F.pad(behind, (0, 1))).argmax(1, keepdim=True)
    is_fill = torch.arange(logits.shape[1], device=logits.device) >= length
    for index, token in enumerate(eos):
        tokens = tokens.masked_fill(is_fill & (which == index), token)
    return tokens


def best_of_text_and_fill(logits: torch.Tensor, eos: Sequence[int] = ()) -> tuple[torch.Tensor, ...]:
    """Highest log-probability (B, L) of a token that is no EOS, and of one that is; of any token alone without EOS."""
    total = logits.float().logsumexp(-1)
    if not eos:
        return (logits.amax(-1) - total,)
    return _best_of_others(logits, eos)[0] - total, torch.stack([logits[..., token] for token in eos]).amax(0) - total


def _best_of_others(logits, eos):
    """Highest logit (B, L) and its token id of those that are no EOS.

    The vocabulary is not copied, unless what is traced here is then run without a compiler.
    """
    if uses_operators():  # a compiler does not write what it only looks through once, and reads all of it aligned
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(torch.stack([ids == token for token in eos]).any(0), -torch.inf).max(-1)
    bounds = pairwise((-1, *sorted(set(eos)), logits.shape[-1]))
    starts = {low + 1: logits[..., low + 1 : high].max(-1) for low, high in bounds if high - low > 1}
    best, part = torch.stack([part.values for part in starts.values()]).max(0)
    tokens = torch.stack([part.indices + start for start, part in starts.items()])
    return best, tokens.gather(0, part.unsqueeze(0)).squeeze(0)
