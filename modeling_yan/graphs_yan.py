"""A text as a path through the vertices of its canvas: sums, maxima and draws over all paths (arXiv 2205.07459).

With one position for each token, a model has to know the position of every word. A graph has several vertices for
each token, and a text is a path that begins at the first vertex. Every vertex has a distribution of tokens, and links
to the next vertices, which depend on the token chosen at this one. The probability of a text is the sum over all its
paths. So words need no fixed position, and the path decides which words go together.

A path ends at EOS, or when it has as many tokens as the canvas. The last vertex has no token but EOS, so that the
probabilities of all texts sum to 1.

Letters of the shape comments: B batch, G vertices, L tokens of a canvas, R vertices that a link may reach, C
candidates of a vertex, V vocabulary, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .chains_yan import rank_by_length
from .configuration_yan import YanConfig
from .flow_matching_yan import target_log_probs
from .linear_yan import ZeroInitLinear

UNREACHABLE = -1e9  # finite, because sums of infinities have no gradient
REACH = 8  # a link goes as far as this number of tokens
CANDIDATES = 8  # tokens of a vertex that the best text chooses from
MOST_TEMPERATURE = 1e6
UNIFORMS = 2  # numbers that a drawn token needs: for itself, and for the link after it


def of_next_vertices(scores: torch.Tensor, reach: int) -> torch.Tensor:
    """Scores (..., G, R) of the next vertices of each vertex, from scores (..., G)."""
    return F.pad(scores, (0, reach), value=UNREACHABLE)[..., 1:].unfold(-1, reach, 1)


def log_sum_of_paths(links: torch.Tensor, emissions: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Log-probability (B,) of texts, summed over all paths that begin at the first vertex.

    Args:
        links: Log-probability (B, L, G, R) of the next R vertices, after each vertex and token.
        emissions: Log-probability (B, L, G) of each token of the text at each vertex.
        length: Number of tokens (B,), at least 1. Tokens after them do not count.
    """
    rest = torch.zeros_like(emissions[:, 0])
    tokens = list(zip(links.unbind(1), emissions.unbind(1), strict=True))
    for number, (link, emission) in reversed(list(enumerate(tokens, start=1))):
        onwards = (link + of_next_vertices(rest, links.shape[-1])).logsumexp(-1)
        rest = emission + onwards.masked_fill((length == number).unsqueeze(1), 0.0)
    return rest[:, 0]


def best_vertices(links: torch.Tensor, emissions: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The most probable path (B, L) of a text; arguments as of `log_sum_of_paths`."""
    rest, jumps = torch.zeros_like(emissions[:, 0]), []
    for index in range(emissions.shape[1] - 1, -1, -1):
        onwards, jump = (links[:, index] + of_next_vertices(rest, links.shape[-1])).max(-1)
        rest = emissions[:, index] + onwards.masked_fill((length == index + 1).unsqueeze(1), 0.0)
        jumps.append(jump)
    vertex, vertices = torch.zeros_like(length), []
    for jump in reversed(jumps):
        vertices.append(vertex)
        vertex = (vertex + 1 + jump.gather(1, vertex.unsqueeze(1)).squeeze(1)).clamp(max=jump.shape[1] - 1)
    return torch.stack(vertices, dim=1)


def best_text(
    links: torch.Tensor,
    tokens: torch.Tensor,
    ends: torch.Tensor,
    num_tokens: int,
    num_without_end: int = 0,
    length_penalty: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best path of any length: the one with the highest log-probability over its length to `length_penalty`.

    Args:
        links: Log-probability (B, G, C, R) of the next R vertices, after each vertex and candidate.
        tokens: Log-probability (B, G, C) of each vertex's candidates, without EOS.
        ends: Log-probability (B, G) of the best EOS at each vertex.
        num_tokens: Number L of tokens of the longest text, which may have no EOS.
        num_without_end: Number of first tokens that may not be EOS, at least 0.

    Returns:
        Vertices (B, L), candidates (B, L) by index, length (B,), and whether the path ends with EOS (B,).
    """
    rest = torch.stack([ends, tokens.amax(-1)], dim=1)  # of what ends in an end, and of what does not
    scores, steps = [rest[:, 0, 0]], [torch.stack([torch.zeros_like(ends, dtype=torch.long), tokens.argmax(-1)], 1)]
    for _ in range(num_tokens - 1):
        reached = of_next_vertices(rest, links.shape[-1])
        onwards, jump = (links.unsqueeze(1) + reached.unsqueeze(3)).max(-1)  # (B, 2, G, C)
        rest, choice = (tokens.unsqueeze(1) + onwards).max(-1)
        scores.append(rest[:, 0, 0])
        # what a vertex says and how far it jumps, in one number
        steps.append(choice + tokens.shape[-1] * jump.gather(-1, choice.unsqueeze(-1)).squeeze(-1))
    lengths = torch.arange(1, num_tokens + 1, device=links.device).clamp(min=1)
    is_short = F.pad(lengths <= num_without_end, (0, 1))  # the last one is the longest, without an end
    total = torch.cat([*(score.unsqueeze(1) for score in scores), rest[:, 1, :1]], dim=1)
    ranks = rank_by_length(total, torch.cat([lengths, lengths[-1:]]), length_penalty)
    best = ranks.masked_fill(is_short | (total < UNREACHABLE / 2), -torch.inf).argmax(1)
    is_ended, length = best < num_tokens, (best + 1).clamp(max=num_tokens)
    kind = (~is_ended).long().view(-1, 1, 1).expand(-1, 1, ends.shape[1])
    table = torch.stack([step.gather(1, kind).squeeze(1) for step in steps])  # by tokens after this one
    vertex, vertices, choices = torch.zeros_like(length), [], []
    for index in range(num_tokens):
        behind = (length - index - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, ends.shape[1])
        step = table.gather(0, behind).squeeze(0).gather(1, vertex.unsqueeze(1)).squeeze(1)
        vertices.append(vertex)
        choices.append(step % tokens.shape[-1])
        vertex = (vertex + 1 + step // tokens.shape[-1]).clamp(max=ends.shape[1] - 1)
    return torch.stack(vertices, dim=1), torch.stack(choices, dim=1), length, is_ended


class YanGraph(nn.Module):
    """The links between the vertices of a canvas, from their latents and from the token that the first of two says.

    A fresh link goes `vertices_per_token` vertices on: the vertices of a copied prompt are then read in its order.
    """

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.vertices_per_token, width = config.vertices_per_token, config.hidden_size
        self.num_candidates, self.reach = CANDIDATES, REACH * config.vertices_per_token
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(config.word_embedding_size, eps=config.layer_norm_eps)
        self.token_proj = ZeroInitLinear(config.word_embedding_size, width, bias=False)
        self.distance_bias = nn.Parameter(torch.empty(self.reach))

    @torch.no_grad()
    def reset_distances(self) -> None:
        """Start with links that are most probable to the vertex `vertices_per_token` further on."""
        distance = torch.arange(1, self.reach + 1, dtype=torch.float, device=self.distance_bias.device)
        init.copy_(self.distance_bias, -(distance / self.vertices_per_token - 1).abs())

    def _keys(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From latents, the keys (B, G, D) of the vertices, and the scores (B, G, R) of links without the token."""
        number = latents.shape[1]
        keys = self.k_proj(latents) * latents.shape[-1] ** -0.5
        scores = (self.q_proj(latents) @ keys.transpose(-1, -2)).float()
        targets = torch.arange(number, device=latents.device).unsqueeze(1) + 1
        targets = targets + torch.arange(self.reach, device=latents.device)
        near = scores.gather(-1, targets.clamp(max=number - 1).expand(len(latents), -1, -1))
        return keys, (near + self.distance_bias.float()).masked_fill(targets >= number, UNREACHABLE)

    def _token_scores(self, embedding: nn.Embedding, tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What tokens (B, N) add to the scores of each next vertex, (B, N, G)."""
        return (self.token_proj(self.norm(embedding(tokens))) @ keys.transpose(-1, -2)).float()

    def links(self, embedding: nn.Embedding, latents: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probability (B, L, G, R) of the next R vertices, after each vertex and each target token (B, L)."""
        keys, near = self._keys(latents)
        said = of_next_vertices(self._token_scores(embedding, targets, keys), self.reach)
        return (near.unsqueeze(1) + said).log_softmax(-1)

    def log_likelihood(
        self,
        embedding: nn.Embedding,
        logits: torch.Tensor,
        latents: torch.Tensor,
        targets: torch.Tensor,
        eos: Sequence[int],
    ) -> torch.Tensor:
        """Log-probability (B,) of the ids `targets` (B, L) up to EOS; for logits (B, G, V) and latents (B, G, D)."""
        return log_sum_of_paths(self.links(embedding, latents, targets), *_emissions(logits, targets, eos))

    def align(
        self,
        embedding: nn.Embedding,
        logits: torch.Tensor,
        latents: torch.Tensor,
        targets: torch.Tensor,
        eos: Sequence[int],
    ) -> torch.Tensor:
        """The vertices (B, L) of the tokens of a canvas on their most probable path; as in `log_likelihood`."""
        return best_vertices(self.links(embedding, latents, targets), *_emissions(logits, targets, eos))

    def most_likely(
        self,
        embedding: nn.Embedding,
        logits: torch.Tensor,
        latents: torch.Tensor,
        num_tokens: int,
        eos: Sequence[int] = (),
        num_without_eos: int = 0,
        length_penalty: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) of the best path, after which there is EOS, and its vertices (B, L)."""
        best, candidates = _best_tokens(logits, eos, self.num_candidates)
        ends, which = _best_end(logits, eos)
        keys, near = self._keys(latents)
        said = self._token_scores(embedding, candidates.flatten(1), keys).unflatten(1, candidates.shape[1:])
        said = of_next_vertices(said, self.reach).diagonal(dim1=1, dim2=3).movedim(-1, 1)  # of each vertex its own
        links = (near.unsqueeze(2) + said).log_softmax(-1)
        vertices, choices, length, is_ended = best_text(links, best, ends, num_tokens, num_without_eos, length_penalty)
        index = vertices.unsqueeze(-1).expand(-1, -1, candidates.shape[-1])
        text = candidates.gather(1, index).gather(-1, choices.unsqueeze(-1)).squeeze(-1)
        if eos:
            number = torch.arange(num_tokens, device=logits.device)
            is_end = number >= (length - is_ended.long()).unsqueeze(1)
            text = torch.where(is_end, which.gather(1, vertices.gather(1, (length - 1).unsqueeze(1))), text)
        return text, vertices

    def score(
        self,
        embedding: nn.Embedding,
        logits: torch.Tensor,
        latents: torch.Tensor,
        num_tokens: int,
        eos: Sequence[int] = (),
        num_without_eos: int = 0,
        length_penalty: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (B,) of the text of the best path, summed over its paths, and its length (B,) with EOS."""
        text, _ = self.most_likely(embedding, logits, latents, num_tokens, eos, num_without_eos, length_penalty)
        emissions, length = _emissions(logits, text, eos)
        return log_sum_of_paths(self.links(embedding, latents, text), emissions, length), length

    def is_lost(self, embedding: nn.Embedding, latents: torch.Tensor) -> torch.Tensor:
        """Mask (B,) of rows whose links contain NaN, for which a best path would be found nevertheless."""
        keys, near = self._keys(latents)
        first = torch.zeros(len(latents), 1, dtype=torch.long, device=latents.device)  # any token tells
        said = self._token_scores(embedding, first, keys)
        return near.isnan().flatten(1).any(1) | said.isnan().flatten(1).any(1)

    def draw(
        self,
        embedding: nn.Embedding,
        logits: torch.Tensor,
        latents: torch.Tensor,
        uniform: torch.Tensor,
        eos: Sequence[int] = (),
        num_without_eos: int = 0,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Token ids (B, L), drawn with numbers `uniform` (B, L, 2) in (0, 1).

        The temperature divides the log-probabilities of each token and of each link. Dividing that of the whole text
        would make the shortest texts far too frequent.
        """
        # a higher temperature would make what is impossible as probable as the rest
        scale = 1 / min(max(temperature, 1e-4), MOST_TEMPERATURE)
        num_vertices, num_tokens = logits.shape[1], uniform.shape[1]
        log_probs, (keys, near) = scale * _log_probs(logits, eos), self._keys(latents)
        jumps = torch.arange(1, self.reach + 1, device=logits.device)
        vertex = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        is_over = torch.zeros_like(vertex, dtype=torch.bool)
        text: list[torch.Tensor] = []
        for index in range(num_tokens):
            here = _rows_at(log_probs, vertex)
            token = _draw_index(_without_ends(here, eos) if index < num_without_eos else here, uniform[:, index, :1])
            text.append(torch.where(is_over, text[-1], token) if text else token)
            for end in eos:
                is_over = is_over | (token == end)
            said = of_next_vertices(self._token_scores(embedding, token, keys).squeeze(1), self.reach)
            links = _rows_at(near + said, vertex).log_softmax(-1)
            # of the vertices, as many stay as there must be tokens after the next one
            needed = max(0, (num_without_eos if eos else num_tokens - 1) - index - 1)
            is_far = vertex + jumps > num_vertices - 1 - needed
            jump = _draw_index((scale * links).masked_fill(is_far, UNREACHABLE), uniform[:, index, 1:2])
            vertex = (vertex + 1 + jump).clamp(max=num_vertices - 1)
        return torch.cat(text, dim=1)


def _emissions(logits: torch.Tensor, targets: torch.Tensor, eos: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (B, L, G) of each target at each vertex, and the length (B,) of the texts, EOS included."""
    index = targets.unsqueeze(1).expand(-1, logits.shape[1], -1)
    emissions = target_log_probs(logits, index).transpose(1, 2).clamp(min=UNREACHABLE)
    if not eos:
        return emissions, torch.full_like(targets[:, 0], targets.shape[1])
    is_end = torch.stack([targets == token for token in eos]).any(0)
    at_last = _log_probs(logits[:, -1:], eos).squeeze(1).gather(1, targets).unsqueeze(-1)
    length = ((is_end.cumsum(1) == 0).sum(1) + 1).clamp(max=targets.shape[1])
    return torch.cat([emissions[..., :-1], at_last], dim=-1), length


def _log_probs(logits: torch.Tensor, eos: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (B, G, V), float32; at the last vertex, of EOS only, if there is one."""
    log_probs = logits.float().log_softmax(-1).clamp(min=UNREACHABLE)
    if not eos:
        return log_probs
    last = torch.full_like(log_probs[:, :1], UNREACHABLE)
    for token in eos:
        last[..., token] = logits[:, -1:, token].float()
    return torch.cat([log_probs[:, :-1], last.log_softmax(-1).clamp(min=UNREACHABLE)], dim=1)


def _without_ends(log_probs: torch.Tensor, eos: Sequence[int]) -> torch.Tensor:
    """The same (..., V), in which EOS is impossible."""
    if not eos:
        return log_probs
    log_probs = log_probs.clone()
    for token in eos:
        log_probs[..., token] = UNREACHABLE
    return log_probs


def _best_tokens(logits: torch.Tensor, eos: Sequence[int], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and ids (B, G, C) of the most probable tokens of each vertex without EOS, at most `number`."""
    tokens = logits.topk(min(number + len(eos), logits.shape[-1]), dim=-1).indices
    log_probs = target_log_probs(logits, tokens).clamp(min=UNREACHABLE)
    if eos:
        is_last = torch.arange(logits.shape[1], device=logits.device).unsqueeze(-1) == logits.shape[1] - 1
        is_end = torch.stack([tokens == token for token in eos]).any(0)
        log_probs = log_probs.masked_fill(is_end | is_last, UNREACHABLE)
    best, order = log_probs.topk(min(number, logits.shape[-1]), dim=-1)
    return best, tokens.gather(-1, order)


def _best_end(logits: torch.Tensor, eos: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (B, G) of the most probable end of a text at each vertex, and its id."""
    impossible = torch.full(logits.shape[:2], UNREACHABLE, device=logits.device)
    if not eos:
        return impossible, torch.zeros_like(impossible, dtype=torch.long)
    ids = torch.stack([torch.full_like(impossible, token, dtype=torch.long) for token in eos], dim=-1)
    log_probs = target_log_probs(logits, ids)
    at_last = logits[:, -1:].gather(-1, ids[:, -1:]).float().log_softmax(-1)
    best, which = torch.cat([log_probs[:, :-1], at_last], dim=1).clamp(min=UNREACHABLE).max(-1)
    return best, ids.gather(-1, which.unsqueeze(-1)).squeeze(-1)


def _rows_at(table: torch.Tensor, vertex: torch.Tensor) -> torch.Tensor:
    """The rows (B, N) of a table (B, G, N) at one vertex each, (B, 1)."""
    return table.gather(1, vertex.unsqueeze(-1).expand(-1, -1, table.shape[-1])).squeeze(1)


def _draw_index(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Indices (B, 1) drawn in proportion to exp(scores) (B, N), with numbers (B, 1) in (0, 1)."""
    sums = scores.softmax(-1).cumsum(-1)
    return (sums < uniform * sums[:, -1:]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
