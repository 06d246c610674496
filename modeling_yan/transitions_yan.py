"""Reading a canvas off as a chain: neighbouring tokens have to fit each other, not only their own latents.

A text written at once mixes what it may say: each token is the likeliest in its own place, and two names become one
that is none. A linear-chain conditional random field over the decoder's logits, with scores of low rank for pairs of
neighbours, chooses all tokens together (NART-CRF, arXiv 1910.11555, section 4). What a pair is worth depends on the
latent of the first of the two. Only the likeliest candidates of a place have such scores.

Letters of the shape comments: B batch, L canvas length, C candidates of a token, V vocabulary, D hidden size, R rank.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .chains_yan import IMPOSSIBLE, as_markov, best_ending, best_path, draw_path, log_partition, path_score
from .compilation_yan import select_rows
from .layers_yan import YanZeroLinear


class YanTransitions(nn.Module):
    """Scores of neighbouring tokens, from projections of embeddings and of a latent; zero in a fresh model."""

    def __init__(self, config):
        super().__init__()
        self.num_candidates = min(config.transition_candidates, config.vocab_size)
        width = config.word_embedding_size
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.from_proj = nn.Linear(width, config.transition_rank, bias=False)
        self.to_proj = YanZeroLinear(width, config.transition_rank, bias=False)
        self.gate = YanZeroLinear(config.hidden_size, config.transition_rank)

    def scores(self, embedding: nn.Embedding, candidates: torch.LongTensor, latents: torch.Tensor) -> torch.Tensor:
        """Scores (B, L - 1, C, C), float32, of each candidate (B, L, C) with each one of the next token.

        Not `forward`: a hook of that would move the embedding, of which only some rows are needed.

        Args:
            embedding: Of the tokens. candidates: Their ids. latents: (B, L, D), those that the canvas is read off.
        """
        origins = self._project(self.from_proj, embedding, candidates[:, :-1])
        origins = origins * (1 + self.gate(latents[:, :-1])).unsqueeze(2)
        ends = self._project(self.to_proj, embedding, candidates[:, 1:])
        return (origins @ ends.transpose(-1, -2)).float()

    def _project(self, projection, embedding, candidates):
        """Projected embeddings (B, L, C, R); of the whole vocabulary where it is smaller than the candidates."""
        if candidates.numel() < embedding.num_embeddings:
            states = self.norm(embedding(candidates))
            # layers that others have quantized may want two dimensions
            return projection(states.flatten(0, 2)).unflatten(0, states.shape[:3])
        vocabulary = torch.arange(embedding.num_embeddings, device=candidates.device)
        return select_rows(projection(self.norm(embedding(vocabulary))), candidates)

    def loss(self, embedding, logits: torch.Tensor, latents: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
        """Negative log-likelihood per token of the targets; arguments as of `log_likelihood`."""
        return -self.log_likelihood(embedding, logits, latents, targets).sum() / targets.numel()

    def log_likelihood(
        self, embedding, logits: torch.Tensor, latents: torch.Tensor, targets: torch.LongTensor
    ) -> torch.Tensor:
        """Log-likelihood (B,) of the targets (B, L) among all chains of the vocabulary.

        A token that is no candidate has score 0 with its neighbours, so all of them together are one state more. They
        have to be counted: among candidates alone, which would have to include the target, rare tokens would rise.
        """
        logits = logits.float()
        candidates = logits.detach().topk(self.num_candidates, dim=-1).indices
        others = logits.scatter(-1, candidates, IMPOSSIBLE).logsumexp(-1, keepdim=True)
        emissions = torch.cat([logits.gather(-1, candidates), others], dim=-1)
        transitions = F.pad(self.scores(embedding, candidates, latents), (0, 1, 0, 1))
        is_target = candidates == targets.unsqueeze(-1)
        is_other = ~is_target.any(-1)
        path = is_target.int().argmax(-1).masked_fill(is_other, self.num_candidates)
        among_others = logits.gather(-1, targets.unsqueeze(-1)) - others  # which of the others a target is
        score = path_score(emissions, transitions, path) + (among_others.squeeze(-1) * is_other).sum(1)
        return score - log_partition(emissions, transitions)

    def most_likely(
        self, embedding, logits: torch.Tensor, latents: torch.Tensor, eos: Sequence[int] = (), length_penalty=None
    ) -> torch.LongTensor:
        """The token ids (B, L) of the best chain for logits (B, L, V) of latents (B, L, D).

        Only EOS follows one of the ids in `eos`, as in `best_text`. With a `length_penalty` the best chains of all
        lengths are compared by their log-probability over their length to this power (`best_ending`).
        """
        candidates, (emissions, transitions), is_end = self._chain(embedding, logits, latents, eos)
        if is_end is not None and length_penalty is not None:
            emissions = self._with_best_length(emissions, transitions, is_end, length_penalty)
        return candidates.gather(-1, best_path(emissions, transitions).unsqueeze(-1)).squeeze(-1)

    def _with_best_length(self, emissions, transitions, is_end, length_penalty):
        """Emissions that allow no EOS before the best length, and nothing else behind it."""
        total = log_partition(emissions, transitions)
        emissions = torch.cat([emissions[:, :1] - total.view(-1, 1, 1), emissions[:, 1:]], dim=1)
        tokens, fill = emissions.masked_fill(is_end, IMPOSSIBLE), emissions.masked_fill(~is_end, IMPOSSIBLE)
        length = best_ending(tokens, fill, transitions, length_penalty)
        is_fill = torch.arange(emissions.shape[1], device=emissions.device) >= length.unsqueeze(1)
        return torch.where(is_fill.unsqueeze(-1), fill, tokens)

    def draw(
        self, embedding, logits, latents, uniform: torch.Tensor, eos: Sequence[int] = (), temperature: float = 1.0
    ) -> torch.LongTensor:
        """Token ids (B, L) drawn from the distribution of chains, at a temperature of at least 0.

        `uniform` (B, L, C) are numbers in (0, 1), at least as many for each token as it has candidates; the other
        arguments are those of `most_likely`.
        """
        candidates, chain, _ = self._chain(embedding, logits, latents, eos)
        markov = as_markov(*(scores / max(temperature, 1e-4) for scores in chain))
        path = draw_path(*markov, uniform[..., : candidates.shape[-1]])
        return candidates.gather(-1, path.unsqueeze(-1)).squeeze(-1)

    def _chain(self, embedding, logits, latents, eos):
        """Candidates (B, L, C) of every token, emissions and transitions of their chain, and which are an EOS.

        The candidates are -1 in rows whose transitions are no numbers.
        """
        emissions, candidates = logits.topk(self.num_candidates, dim=-1)
        transitions, is_end = self.scores(embedding, candidates, latents), None
        is_lost = transitions.sum((1, 2, 3)).isnan()  # a best path would be found all the same
        if eos:
            is_end = torch.stack([candidates == token for token in eos]).any(0)
            goes_on = is_end[:, :-1].unsqueeze(-1) & ~is_end[:, 1:].unsqueeze(-2)
            transitions = transitions.masked_fill(goes_on, IMPOSSIBLE)
        return candidates.masked_fill(is_lost.view(-1, 1, 1), -1), (emissions.float(), transitions), is_end
