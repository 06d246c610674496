"""What tests of `generate` have in common."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def recorded_calls(*modules) -> Iterator[list]:
    """A list that gets (module, positional inputs) at every call of the modules."""
    calls = []
    hooks = [module.register_forward_pre_hook(lambda module, args: calls.append((module, args))) for module in modules]
    yield calls
    for hook in hooks:
        hook.remove()


def num_calls(calls, module) -> int:
    """How often a module is among recorded calls."""
    return sum(called is module for called, _ in calls)


def new_tokens(model, prompt, **options) -> torch.LongTensor:
    """What `generate` adds to the prompts."""
    return model.generate(prompt, return_prompt=False, **options)


def random_ids(batch: int = 3, length: int = 6) -> torch.LongTensor:
    """Ids (batch, length) without special ones."""
    return torch.randint(4, 64, (batch, length))


def pad(ids, side: str, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask with `width` columns of padding on the left or on the right."""
    padding = torch.zeros(len(ids), width, dtype=torch.long)
    masks = [padding, torch.ones_like(ids)]
    order = 1 if side == "left" else -1
    return torch.cat([padding, ids][::order], 1), torch.cat(masks[::order], 1)
