"""A text as a path through the vertices of its canvas: sums, maxima and draws over all paths (arXiv 2205.07459).

A canvas that has one position for each token has to know where every word stands. In a graph there are several
vertices for each token, and a text is a path from the first vertex on: every vertex has a distribution of tokens, and
links to the next vertices. The probability of a text is the sum over all paths that say it. So words need no fixed
position, and the path decides which words go together.

A path that has said EOS ends, and so does one of as many tokens as the canvas has. The last vertex says nothing but
EOS, so that the probabilities of all texts sum to 1.

Letters of the shape comments: B batch, G vertices, L tokens of a canvas, R vertices that a link may reach, V
vocabulary, D hidden size, H heads.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_yan import YanConfig

UNREACHABLE = -1e9  # finite, because sums of infinities have no gradient
REACH = 8  # a link goes as far as this number of tokens
UNIFORMS = 2  # numbers that a drawn token needs: for itself, and for the link behind it


def of_next_vertices(scores: torch.Tensor, reach: int) -> torch.Tensor:
    """Scores (..., G, R) of the next vertices of each vertex, from scores (..., G)."""
    return F.pad(scores, (0, reach), value=UNREACHABLE)[..., 1:].unfold(-1, reach, 1)


def log_sum_of_paths(links: torch.Tensor, emissions: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Log-probability (B,) of texts, summed over all paths from the first vertex on.

    Args:
        links: Log-probability (B, G, R) of the next vertices. emissions: That of each of a text's tokens at each
            vertex, (B, L, G). length: Number of tokens (B,), at least 1; what stands behind them does not count.
    """
    rest = torch.zeros_like(emissions[:, 0])
    for index in range(emissions.shape[1] - 1, -1, -1):
        onwards = (links + of_next_vertices(rest, links.shape[-1])).logsumexp(-1)
        rest = emissions[:, index] + onwards.masked_fill((length == index + 1).unsqueeze(1), 0.0)
    return rest[:, 0]


def best_vertices(links: torch.Tensor, emissions: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The most probable path (B, L) of a text; arguments as of `log_sum_of_paths`."""
    rest, jumps = torch.zeros_like(emissions[:, 0]), []
    for index in range(emissions.shape[1] - 1, -1, -1):
        onwards, jump = (links + of_next_vertices(rest, links.shape[-1])).max(-1)
        rest = emissions[:, index] + onwards.masked_fill((length == index + 1).unsqueeze(1), 0.0)
        jumps.append(jump)
    return torch.stack(_follow(jumps[::-1]), dim=1)


def _follow(jumps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The vertices (B,) of each token, from what every vertex jumps over behind it, (B, G)."""
    vertices = [torch.zeros_like(jumps[0][:, 0])]
    for jump in jumps[:-1]:
        here = vertices[-1].unsqueeze(1)
        vertices.append((here + 1 + jump.gather(1, here)).squeeze(1).clamp(max=jump.shape[1] - 1))
    return vertices


def best_text(
    links: torch.Tensor,
    tokens: torch.Tensor,
    ends: torch.Tensor,
    num_tokens: int,
    num_without_end: int = 0,
    length_penalty: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vertices (B, L) of the best path of any length, the number of its tokens (B,), and whether it has an end (B,).

    The paths are compared by their log-probability over their length to the power `length_penalty`.

    Args:
        links: Log-probability (B, G, R) of the next vertices. tokens, ends: That of each vertex's best token that is
            no end of a text, and of its best end, (B, G). num_tokens: L, of the longest text, which may have no end.
            num_without_end: So many tokens at the beginning are no end.
    """
    rest = torch.stack([ends, tokens], dim=1)  # of what ends in an end, and of what does not
    scores, jumps = [rest[:, 0, 0]], []
    for _ in range(num_tokens - 1):
        onwards, jump = (links.unsqueeze(1) + of_next_vertices(rest, links.shape[-1])).max(-1)
        rest = tokens.unsqueeze(1) + onwards
        scores.append(rest[:, 0, 0])
        jumps.append(jump)
    lengths = torch.arange(1, num_tokens + 1, device=links.device).clamp(min=1)
    ended = torch.stack(scores, dim=1).masked_fill(lengths <= num_without_end, 2 * UNREACHABLE)
    penalised = torch.cat([ended, rest[:, 1, :1]], dim=1) / torch.cat([lengths, lengths[-1:]]) ** length_penalty
    best = penalised.argmax(1)
    is_ended, length = best < num_tokens, (best + 1).clamp(max=num_tokens)
    if not jumps:
        return torch.zeros_like(best).unsqueeze(1), length, is_ended
    kind = (~is_ended).long().view(-1, 1, 1).expand(-1, 1, links.shape[1])
    table = torch.stack([jump.gather(1, kind).squeeze(1) for jump in jumps])  # by tokens behind this one
    ordered = []
    for index in range(num_tokens):
        behind = (length - index - 2).clamp(min=0).view(1, -1, 1).expand(1, -1, links.shape[1])
        ordered.append(table.gather(0, behind).squeeze(0))
    return torch.stack(_follow(ordered), dim=1), length, is_ended


class YanGraph(nn.Module):
    """The links between the vertices of a canvas, from their latents.

    A fresh link goes `vertices_per_token` vertices on: the vertices of a copied prompt are then read in its order.
    """

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.num_heads, self.vertices_per_token = config.num_attention_heads, config.vertices_per_token
        self.reach = REACH * config.vertices_per_token
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_gate = nn.Linear(config.hidden_size, self.num_heads)
        self.distance_bias = nn.Parameter(torch.empty(self.num_heads, self.reach))

    @torch.no_grad()
    def reset_distances(self) -> None:
        """Start with links that are the likelier, the nearer they are to one token's number of vertices."""
        distance = torch.arange(1, self.reach + 1, dtype=torch.float, device=self.distance_bias.device)
        init.copy_(self.distance_bias, -((distance / self.vertices_per_token - 1).abs()).expand(self.num_heads, -1))

    def links(self, latents: torch.Tensor) -> torch.Tensor:
        """Log-probability (B, G, R), float32, of the vertices 1 to R behind each one, from latents (B, G, D)."""
        number = latents.shape[1]
        queries, keys = (
            proj(latents).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj)
        )
        scores = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5
        vertices = torch.arange(number, device=latents.device)
        targets = vertices.unsqueeze(1) + torch.arange(1, self.reach + 1, device=latents.device)
        is_beyond = targets >= number
        index = targets.clamp(max=number - 1).expand(*scores.shape[:3], -1)
        near = scores.gather(-1, index) + self.distance_bias.float().unsqueeze(1)
        shares = self.head_gate(latents).float().log_softmax(-1).transpose(1, 2).unsqueeze(-1)
        near = near.masked_fill(is_beyond, UNREACHABLE).log_softmax(-1)
        return (near + shares).logsumexp(1).masked_fill(is_beyond, UNREACHABLE)

    def log_likelihood(
        self, logits: torch.Tensor, latents: torch.Tensor, targets: torch.Tensor, eos: Sequence[int]
    ) -> torch.Tensor:
        """Log-probability (B,) of the ids `targets` (B, L) up to EOS; for logits (B, G, V) and latents (B, G, D)."""
        return log_sum_of_paths(self.links(latents), *_emissions(logits, targets, eos))

    def align(
        self, logits: torch.Tensor, latents: torch.Tensor, targets: torch.Tensor, eos: Sequence[int]
    ) -> torch.Tensor:
        """The vertices (B, L) of the tokens of a canvas on their most probable path; as in `log_likelihood`."""
        return best_vertices(self.links(latents), *_emissions(logits, targets, eos))

    def most_likely(
        self,
        logits: torch.Tensor,
        latents: torch.Tensor,
        num_tokens: int,
        eos: Sequence[int] = (),
        num_without_eos: int = 0,
        length_penalty: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) of the best path, behind which there is EOS, and its vertices (B, L)."""
        log_probs = _log_probs(logits, eos)
        ends, which = _best_end(log_probs, eos)
        best, tokens = _without_ends(log_probs, eos).max(-1)
        vertices, length, is_ended = best_text(
            self.links(latents), best.clamp(min=UNREACHABLE), ends, num_tokens, num_without_eos, length_penalty
        )
        number = torch.arange(num_tokens, device=logits.device)
        text = tokens.gather(1, vertices)
        if eos:
            is_end = number >= (length - is_ended.long()).unsqueeze(1)
            last = vertices.gather(1, (length - 1).unsqueeze(1))
            text = torch.where(is_end, which.gather(1, last), text)
        return text, vertices

    def score(
        self,
        logits: torch.Tensor,
        latents: torch.Tensor,
        num_tokens: int,
        eos: Sequence[int] = (),
        num_without_eos: int = 0,
        length_penalty: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (B,) of the text of the best path, summed over its paths, and its length (B,) with EOS."""
        text, _ = self.most_likely(logits, latents, num_tokens, eos, num_without_eos, length_penalty)
        emissions, length = _emissions(logits, text, eos)
        return log_sum_of_paths(self.links(latents), emissions, length), length

    def is_lost(self, latents: torch.Tensor) -> torch.Tensor:
        """Rows (B,) whose links are no numbers: a best path would be found all the same."""
        return self.links(latents).isnan().flatten(1).any(1)

    def draw(
        self,
        logits: torch.Tensor,
        latents: torch.Tensor,
        uniform: torch.Tensor,
        eos: Sequence[int] = (),
        num_without_eos: int = 0,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Token ids (B, L), drawn with numbers `uniform` (B, L, 2) in (0, 1).

        The log-probabilities of each token and each link are divided by the temperature, one after the other: those of
        whole texts would make the shortest ones far too frequent.
        """
        scale, (num_vertices, num_tokens) = 1 / max(temperature, 1e-4), (logits.shape[1], uniform.shape[1])
        log_probs, links = scale * _log_probs(logits, eos), scale * self.links(latents)
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
            # of the vertices, as many stay as there must be tokens behind the next one
            needed = max(0, (num_without_eos if eos else num_tokens - 1) - index - 1)
            is_far = vertex + jumps > num_vertices - 1 - needed
            jump = _draw_index(_rows_at(links, vertex).masked_fill(is_far, UNREACHABLE), uniform[:, index, 1:2])
            vertex = (vertex + 1 + jump).clamp(max=num_vertices - 1)
        return torch.cat(text, dim=1)


def _emissions(logits: torch.Tensor, targets: torch.Tensor, eos: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (B, L, G) of each target at each vertex, and the length (B,) of the texts, EOS included."""
    index = targets.unsqueeze(1).expand(-1, logits.shape[1], -1)
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    emissions = log_probs.gather(-1, index).transpose(1, 2).clamp(min=UNREACHABLE)
    if not eos:
        return emissions, torch.full_like(targets[:, 0], targets.shape[1])
    is_end = torch.stack([targets == token for token in eos]).any(0)
    at_last = _log_probs(logits[:, -1:], eos).squeeze(1).gather(1, targets).unsqueeze(-1)
    length = ((is_end.cumsum(1) == 0).sum(1) + 1).clamp(max=targets.shape[1])
    return torch.cat([emissions[..., :-1], at_last], dim=-1), length


def _log_probs(logits: torch.Tensor, eos: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (B, G, V), float32; at the last vertex of the ends alone, if there are any."""
    log_probs = logits.float().log_softmax(-1).clamp(min=UNREACHABLE)
    if not eos:
        return log_probs
    last = torch.full_like(log_probs[:, :1], UNREACHABLE)
    for token in eos:
        last[..., token] = logits[:, -1:, token].float()
    return torch.cat([log_probs[:, :-1], last.log_softmax(-1).clamp(min=UNREACHABLE)], dim=1)


def _without_ends(log_probs: torch.Tensor, eos: Sequence[int]) -> torch.Tensor:
    """The same (..., V), with ends that are impossible."""
    if not eos:
        return log_probs
    log_probs = log_probs.clone()
    for token in eos:
        log_probs[..., token] = UNREACHABLE
    return log_probs


def _best_end(log_probs: torch.Tensor, eos: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (B, G) of the likeliest end of a text at each vertex, and its id."""
    if not eos:
        impossible = torch.full_like(log_probs[..., 0], UNREACHABLE)
        return impossible, torch.zeros_like(impossible, dtype=torch.long)
    best, which = torch.stack([log_probs[..., token] for token in eos]).max(0)
    return best, torch.stack([torch.full_like(which, token) for token in eos]).gather(0, which.unsqueeze(0)).squeeze(0)


def _rows_at(table: torch.Tensor, vertex: torch.Tensor) -> torch.Tensor:
    """The rows (B, N) of a table (B, G, N) at one vertex each, (B, 1)."""
    return table.gather(1, vertex.unsqueeze(-1).expand(-1, -1, table.shape[-1])).squeeze(1)


def _draw_index(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Indices (B, 1) drawn in proportion to exp(scores) (B, N), with numbers (B, 1) in (0, 1)."""
    sums = scores.softmax(-1).cumsum(-1)
    return (sums < uniform * sums[:, -1:]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
