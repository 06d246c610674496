"""Where a text ends: at an EOS, where a stopping criterion says so, or when time is up."""

import time
from functools import reduce

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from .generation_config_yan import YanGenerationConfig

Cut = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens (B, L), how many of a row are kept, which are finished


def all_criteria(
    stopping_criteria: StoppingCriteriaList | StoppingCriteria | None,
    options: YanGenerationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> StoppingCriteriaList:
    """The criteria of a call, one or a list of them, and one for its stop strings.

    Raises:
        ValueError: There are stop strings, and no tokenizer that knows their tokens.
    """
    if isinstance(stopping_criteria, StoppingCriteria):
        stopping_criteria = StoppingCriteriaList([stopping_criteria])
    criteria = StoppingCriteriaList(stopping_criteria or ())
    if options.stop_strings:
        if tokenizer is None:
            needed = "tokenizer=..., the model's tokenizer, is needed beside them as an argument of generate"
            raise ValueError(f"stop_strings={options.stop_strings!r}: {needed}")
        criteria.append(StopStringCriteria(tokenizer, options.stop_strings))
    return criteria


class Deadline:
    """Whether `max_time` seconds have passed since this was made; never if None."""

    def __init__(self, max_time: float | None) -> None:
        self.end = None if max_time is None else time.monotonic() + max_time

    def has_passed(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end


def eos_ids(options: YanGenerationConfig) -> list[int]:
    eos = options.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [int(eos)]


def _is_eos(tokens: torch.Tensor, options: YanGenerationConfig) -> torch.Tensor:
    is_eos = torch.zeros_like(tokens, dtype=torch.bool)
    return reduce(torch.logical_or, (tokens == eos for eos in eos_ids(options)), is_eos)


def without_padding(ids: torch.Tensor, options: YanGenerationConfig) -> torch.Tensor:
    """A mask (B, S), 0 on pad tokens; if they are an EOS, too, only on those before and after all other tokens."""
    pad = options.pad_token_id
    if pad is None:
        return torch.ones_like(ids)
    is_token = (ids != pad).long()
    if pad in eos_ids(options):  # one within a text separates its parts
        is_token = is_token.cummax(1)[0] * is_token.flip(1).cummax(1)[0].flip(1)
    return is_token


def cut_at_eos(tokens: torch.Tensor, finished: torch.Tensor | None, options: YanGenerationConfig) -> Cut:
    """Pad what follows the first EOS, and all of a row that was finished before; `finished` may be None at first.

    Returns the tokens (B, L), how many of each row are kept (B,), and which rows are finished (B,).
    """
    is_eos = _is_eos(tokens, options)
    num_eos = is_eos.cumsum(1)
    is_after, is_finished = num_eos > is_eos, num_eos[:, -1] > 0
    if finished is not None:
        is_after, is_finished = is_after | finished.unsqueeze(1), is_finished | finished
    return tokens.masked_fill(is_after, _fill_token(options)), tokens.shape[1] - is_after.sum(1), is_finished


def cut_at_criteria(
    before: torch.Tensor,
    tokens: torch.Tensor,
    num_kept: torch.Tensor,
    finished: torch.Tensor,
    criteria: StoppingCriteriaList,
    options: YanGenerationConfig,
) -> Cut:
    """Pad what follows the token at which a criterion stops a row; arguments and results as of `cut_at_eos`."""
    tokens, is_over = tokens.clone(), torch.zeros_like(finished)
    for stop in range(1, tokens.shape[1] + 1):
        is_over = is_over | criteria(torch.cat([before, tokens[:, :stop]], dim=1), None)
        tokens[is_over, stop:] = _fill_token(options)
        num_kept = torch.where(is_over, num_kept.clamp(max=stop), num_kept)
    return tokens, num_kept, finished | is_over


def _fill_token(options: YanGenerationConfig) -> int:
    """What stands after the end of a row."""
    return options.pad_token_id if options.pad_token_id is not None else (eos_ids(options) or [0])[0]
