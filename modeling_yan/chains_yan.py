"""Linear chains: sums, maxima and draws over all paths through states with scores for neighbours.

With `crf_rank` above 0 the states are the candidates of neighbouring tokens, a conditional random field.

`log_partition` and `best_path` go from token to token on a CPU, C^2 operations each. On an accelerator, and in a
compiled program, they join halves in log2(L) rounds, C^3 operations each. `draw_path` joins halves everywhere;
`best_ending` and `as_markov` go from token to token.

Letters of the shape comments: B batch, L length, C states of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

IMPOSSIBLE = -1e4  # finite, because sums of infinities have no gradient


def path_score(emissions: torch.Tensor, transitions: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Score (B,) of one path (B, L): its emissions (B, L, C) and transitions (B, L - 1, C, C), summed."""
    steps = transitions.flatten(2).gather(2, (path[:, :-1] * emissions.shape[-1] + path[:, 1:]).unsqueeze(-1))
    return emissions.gather(2, path.unsqueeze(-1)).sum((1, 2)) + steps.sum((1, 2))


def log_partition(emissions: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    """Logarithm (B,) of the sum of exp(score) over all C^L paths; arguments as in `path_score`."""
    if emissions.shape[1] == 1:
        return emissions[:, 0].logsumexp(-1)
    if _goes_by_tokens(emissions):
        total = emissions[:, 0]
        for emission, step in zip(emissions[:, 1:].unbind(1), transitions.unbind(1), strict=True):
            total = (total.unsqueeze(-1) + step).logsumexp(-2) + emission
        return total.logsumexp(-1)
    (whole,), _ = _join(_segments(emissions, transitions), lambda sums: (sums.logsumexp(-2), None))
    return whole.flatten(1).logsumexp(-1)


def best_path(emissions: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    """The path (B, L) of the highest score; arguments as in `path_score`."""
    _, length, num_states = emissions.shape
    if length == 1:
        return emissions.argmax(-1)
    if _goes_by_tokens(emissions):
        return _viterbi(emissions, transitions)
    (whole,), middles = _join(_segments(emissions, transitions), lambda sums: sums.max(-2))
    best = whole.flatten(1).argmax(-1, keepdim=True)
    ends = torch.cat([best // num_states, best % num_states], dim=1)
    for middle in reversed(middles):  # between any two known states, the one that joined their segments
        pairs = ends[:, :-1] * num_states + ends[:, 1:]
        between = middle.flatten(2).gather(2, pairs.unsqueeze(-1)).squeeze(-1)
        ends = torch.cat([torch.stack([ends[:, :-1], between], -1).flatten(1), ends[:, -1:]], dim=1)
    return ends[:, :length]


def _goes_by_tokens(emissions: torch.Tensor) -> bool:
    return emissions.device.type == "cpu" and not torch.compiler.is_compiling()


def _viterbi(emissions: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    best, origins = emissions[:, 0], []
    for emission, step in zip(emissions[:, 1:].unbind(1), transitions.unbind(1), strict=True):
        best, origin = (best.unsqueeze(-1) + step).max(-2)
        best = best + emission
        origins.append(origin)
    path = [best.argmax(-1, keepdim=True)]
    for origin in reversed(origins):
        path.append(origin.gather(1, path[-1]))
    return torch.cat(path[::-1], dim=1)


def rank_by_length(scores: torch.Tensor, lengths: torch.Tensor, length_penalty: float) -> torch.Tensor:
    """Ranks in the order of score / length^length_penalty, for scores of at most 0 and any penalty."""
    return length_penalty * lengths.log() - (-scores.clamp(max=0)).log()


def best_ending(
    tokens: torch.Tensor,
    fill: torch.Tensor,
    transitions: torch.Tensor,
    length_penalty: float = 1.0,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Number of tokens (B,), 0 to L, of the best path that goes from text to fill once and stays there.

    Of the best paths of all lengths n it is the one with the highest log-probability / (n + 1)^length_penalty. The
    log-probability alone would prefer the shortest text: every token that is not certain costs something (arXiv
    2210.05193, section 3).

    Args:
        tokens: Emissions (B, L, C) of a state while the text goes on, its prior included for the first token.
        fill: The same of a state after the text. transitions: (B, L - 1, C, C).
        total: Logarithm (B,) of the sum over all paths, if the scores are no log-probabilities.
    """
    behind = [fill[:, -1]]
    for step in reversed(range(transitions.shape[1])):
        behind.append(fill[:, step] + (transitions[:, step] + behind[-1].unsqueeze(1)).amax(-1))
    behind.reverse()
    before, scores = tokens[:, 0], [behind[0].amax(-1)]
    for step in range(1, tokens.shape[1]):
        came = (before.unsqueeze(-1) + transitions[:, step - 1]).amax(-2)
        scores.append((came + behind[step]).amax(-1))
        before = came + tokens[:, step]
    all_scores = torch.stack([*scores, before.amax(-1)], dim=1)
    if total is not None:
        all_scores = all_scores - total.unsqueeze(1)
    num_tokens = torch.arange(1.0, len(scores) + 2, device=tokens.device)
    # a length is possible if each position before its end has a token, and each one after it an end
    lacks_token, lacks_end = (each.amax(-1) <= IMPOSSIBLE / 2 for each in (tokens, fill))
    lacking = F.pad(lacks_token.cumsum(1), (1, 0)) + F.pad(lacks_end.flip(1).cumsum(1).flip(1), (0, 1))
    return rank_by_length(all_scores, num_tokens, length_penalty).masked_fill(lacking > 0, -torch.inf).argmax(1)


def as_markov(emissions: torch.Tensor, transitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chain whose paths have probabilities proportional to exp(score), as `draw_path` takes it."""
    behind, steps = torch.zeros_like(emissions[:, 0]), []
    for step in reversed(range(transitions.shape[1])):
        scores = transitions[:, step] + (emissions[:, step + 1] + behind).unsqueeze(-2)
        behind = scores.logsumexp(-1)
        steps.append(scores - behind.unsqueeze(-1))
    log_transitions = torch.stack(steps[::-1], dim=1) if steps else torch.zeros_like(transitions)
    return (emissions[:, 0] + behind).log_softmax(-1), log_transitions


def draw_path(log_first: torch.Tensor, log_transitions: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A path (B, L) drawn from a Markov chain, a pure function of uniform numbers in (0, 1).

    Every state of every token draws its successor by the Gumbel-max trick; then these functions are composed.

    Args:
        log_first: Log-probabilities (B, C) of the first token's states.
        log_transitions: Log-probabilities (B, L - 1, C, C) of each token's states, given that of the token before it.
        uniform: (B or 1, L, C).
    """
    gumbel = -torch.log(-torch.log(uniform.float().clamp(min=1e-20)))
    first = (log_first + gumbel[:, 0]).argmax(-1, keepdim=True)
    after = (log_transitions + gumbel[:, 1:].unsqueeze(-2)).argmax(-1)  # (B, L - 1, C)
    reach = 1
    while reach < after.shape[1]:  # after[:, i] now leads over `reach` tokens, where there are so many
        composed = after[:, reach:].gather(-1, after[:, :-reach])
        after = torch.cat([after[:, :reach], composed], dim=1)
        reach *= 2
    return torch.cat([first, after.gather(-1, first.unsqueeze(1).expand(-1, after.shape[1], -1)).squeeze(-1)], dim=1)


def _segments(emissions: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    """Scores (B, N, C, C) of the ways from each token to the next, their number N filled up to a power of two.

    A segment has the emission of the token that it leads to, the first one that of its origin, too. The filling leads
    from every state to itself for nothing.
    """
    segments = transitions + emissions[:, 1:].unsqueeze(2)
    segments = torch.cat([segments[:, :1] + emissions[:, 0, None, :, None], segments[:, 1:]], dim=1)
    missing = 2 ** (segments.shape[1] - 1).bit_length() - segments.shape[1]
    stay = IMPOSSIBLE * (1 - torch.eye(emissions.shape[-1], device=emissions.device))
    return torch.cat([segments, stay.expand(segments.shape[0], missing, -1, -1)], dim=1)


def _join(
    segments: torch.Tensor, combine: Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
) -> tuple[torch.Tensor, list[Any]]:
    """Join neighbouring segments until one is left; returns it (1, B, C, C) and the second results of `combine`.

    `combine` reduces the sums (B, N, C, C, C) of origin, middle and end over the middle.
    """
    middles = []
    while segments.shape[1] > 1:
        left, right = segments[:, ::2], segments[:, 1::2]
        segments, middle = combine(left.unsqueeze(-1) + right.unsqueeze(-3))
        middles.append(middle)
    return segments.transpose(0, 1), middles
