"""From logits to token ids: each token independently, or all of them as a chain, and nothing but EOS after the end.

Tokens that are decoded independently mix several right answers: "New York" and "Los Angeles" may become "Los York". A
linear-chain conditional random field (CRF) chooses all tokens together. It adds scores of low rank for pairs of
neighbours to the decoder's logits (NART-CRF, arXiv 1910.11555, section 4). The score of a pair depends on the latent
of its first token. Only the most probable candidates of a position have such scores.

Letters of the shape comments: B batch, L canvas length, C candidates of a token, V vocabulary, D hidden size, R rank.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

from .base_yan import YanFlowMixin
from .chains_yan import IMPOSSIBLE, as_markov, best_ending, best_path, draw_path, log_partition, path_score
from .checks_yan import can_look_at
from .compilation_yan import is_exporting, select_rows, use_custom_ops
from .configuration_yan import YanConfig
from .flow_matching_yan import token_log_likelihood
from .graphs_yan import YanGraph
from .linear_yan import ZeroInitLinear

if TYPE_CHECKING:  # its file imports this one
    from .canvas_yan import CanvasPlan

EOS_STRATEGIES = ("likeliest", "first")
MAX_LOGITS, MAX_LOGITS_CPU = 2**28, 2**23  # computed at once; more at a time are slower on a CPU
MOST_TEMPERATURE = 100.0  # of a chain


def argmax_until_eos(logits: torch.Tensor, eos: Sequence[int] = ()) -> torch.Tensor:
    """The most probable token ids (B, L) for logits (B, L, V) among those in which only EOS follows an EOS.

    The probability of a text is that of its n tokens, times that of the EOS in all L - n positions after them. A
    cut at the first position whose most probable token is EOS would lose what comes after one uncertain position.
    Without ids in `eos` every token is chosen independently. A row's result does not depend on the other rows.
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


def _best_of_others(logits: torch.Tensor, eos: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Highest logit (B, L) and its token id of those that are no EOS.

    The vocabulary is not copied, unless what is traced here is then run without a compiler.
    """
    if use_custom_ops():  # a compiler does not store what it only looks through once, and reads all of it aligned
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(torch.stack([ids == token for token in eos]).any(0), -torch.inf).max(-1)
    bounds = pairwise((-1, *sorted(set(eos)), logits.shape[-1]))
    starts = {low + 1: logits[..., low + 1 : high].max(-1) for low, high in bounds if high - low > 1}
    best, part = torch.stack([part.values for part in starts.values()]).max(0)
    tokens = torch.stack([part.indices + start for start, part in starts.items()])
    return best, tokens.gather(0, part.unsqueeze(0)).squeeze(0)


class YanTransitions(nn.Module):
    """Scores of neighbouring tokens, from projections of embeddings and of a latent; zero in a fresh model."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.num_candidates = config.crf_candidates  # or all tokens, of a vocabulary that is smaller
        width = config.word_embedding_size
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.from_proj = nn.Linear(width, config.crf_rank, bias=False)
        self.to_proj = ZeroInitLinear(width, config.crf_rank, bias=False)
        self.gate = ZeroInitLinear(config.hidden_size, config.crf_rank)

    def scores(self, embedding: nn.Embedding, candidates: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Scores (B, L - 1, C, C), float32, of each candidate (B, L, C) with each one of the next token.

        Not `forward`: a hook of that would move the embedding, of which only some rows are needed.

        Args:
            embedding: Of the tokens. candidates: Their ids. latents: (B, L, D), those that the logits are of.
        """
        origins = self._project(self.from_proj, embedding, candidates[:, :-1])
        origins = origins * (1 + self.gate(latents[:, :-1])).unsqueeze(2)
        ends = self._project(self.to_proj, embedding, candidates[:, 1:])
        return (origins @ ends.transpose(-1, -2)).float()

    def _project(self, projection: nn.Linear, embedding: nn.Embedding, candidates: torch.Tensor) -> torch.Tensor:
        """Projected embeddings (B, L, C, R); of the whole vocabulary where it is smaller than the candidates."""
        if is_exporting() or candidates.numel() < embedding.num_embeddings:
            states = self.norm(embedding(candidates))
            # layers that others have quantized may want two dimensions
            return projection(states.flatten(0, 2)).unflatten(0, states.shape[:3])
        vocabulary = torch.arange(embedding.num_embeddings, device=candidates.device).unsqueeze(
            0
        )  # a batch, for hooks
        return select_rows(projection(self.norm(embedding(vocabulary))).squeeze(0), candidates)

    def loss(
        self, embedding: nn.Embedding, logits: torch.Tensor, latents: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Negative log-likelihood per token of the targets; arguments as of `log_likelihood`."""
        return -self.log_likelihood(embedding, logits, latents, targets).sum() / targets.numel()

    def log_likelihood(
        self, embedding: nn.Embedding, logits: torch.Tensor, latents: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Log-likelihood (B,) of the targets (B, L) among all chains of the vocabulary.

        A token that is no candidate has score 0 with its neighbours, so all of them together are one state more. They
        have to be counted: among candidates alone, which would have to include the target, rare tokens would rise.
        """
        logits = logits.float()
        candidates = logits.detach().topk(min(self.num_candidates, logits.shape[-1]), dim=-1).indices
        others = logits.scatter(-1, candidates, IMPOSSIBLE).logsumexp(-1, keepdim=True)
        emissions = torch.cat([logits.gather(-1, candidates), others], dim=-1)
        transitions = F.pad(self.scores(embedding, candidates, latents), (0, 1, 0, 1))
        is_target = candidates == targets.unsqueeze(-1)
        is_other = ~is_target.any(-1)
        path = is_target.int().argmax(-1).masked_fill(is_other, candidates.shape[-1])
        among_others = logits.gather(-1, targets.unsqueeze(-1)) - others  # which of the others a target is
        score = path_score(emissions, transitions, path) + (among_others.squeeze(-1) * is_other).sum(1)
        return score - log_partition(emissions, transitions)

    def most_likely(
        self,
        embedding: nn.Embedding,
        logits: torch.Tensor,
        latents: torch.Tensor,
        eos: Sequence[int] = (),
        length_penalty: float | None = None,
    ) -> torch.Tensor:
        """The token ids (B, L) of the best chain for logits (B, L, V) of latents (B, L, D).

        Only EOS follows one of the ids in `eos`, as in `argmax_until_eos`. With a `length_penalty` the best chains of
        all lengths are compared by their log-probability over their length to this power (`best_ending`).
        """
        candidates, (emissions, transitions), is_end = self._chain(embedding, logits, latents, eos)
        if is_end is not None and length_penalty is not None:
            emissions = self._with_best_length(emissions, transitions, is_end, length_penalty)
        return candidates.gather(-1, best_path(emissions, transitions).unsqueeze(-1)).squeeze(-1)

    def _with_best_length(
        self, emissions: torch.Tensor, transitions: torch.Tensor, is_end: torch.Tensor, length_penalty: float
    ) -> torch.Tensor:
        """Emissions that allow no EOS before the best length, and nothing else after it."""
        tokens, fill = emissions.masked_fill(is_end, IMPOSSIBLE), emissions.masked_fill(~is_end, IMPOSSIBLE)
        length = best_ending(tokens, fill, transitions, length_penalty, log_partition(emissions, transitions))
        is_fill = torch.arange(emissions.shape[1], device=emissions.device) >= length.unsqueeze(1)
        return torch.where(is_fill.unsqueeze(-1), fill, tokens)

    def draw(
        self,
        embedding: nn.Embedding,
        logits: torch.Tensor,
        latents: torch.Tensor,
        uniform: torch.Tensor,
        eos: Sequence[int] = (),
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Token ids (B, L) drawn from the distribution of chains, at a temperature of at least 0.

        `uniform` (B, L, C) are numbers in (0, 1), at least as many for each token as it has candidates; the other
        arguments are those of `most_likely`.
        """
        candidates, chain, _ = self._chain(embedding, logits, latents, eos)
        # a higher temperature would make what is impossible as probable as the rest
        markov = as_markov(*(scores / min(max(temperature, 1e-4), MOST_TEMPERATURE) for scores in chain))
        path = draw_path(*markov, uniform[..., : candidates.shape[-1]])
        return candidates.gather(-1, path.unsqueeze(-1)).squeeze(-1)

    def _chain(
        self, embedding: nn.Embedding, logits: torch.Tensor, latents: torch.Tensor, eos: Sequence[int]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Candidates (B, L, C) of every token, emissions and transitions of their chain, and which are an EOS.

        The candidates are -1 in rows whose transitions are no numbers.
        """
        emissions, candidates = logits.topk(min(self.num_candidates, logits.shape[-1]), dim=-1)
        transitions, is_end = self.scores(embedding, candidates, latents), None
        is_lost = transitions.sum((1, 2, 3)).isnan()  # a best path would be found all the same
        if eos:
            is_end = torch.stack([candidates == token for token in eos]).any(0)
            goes_on = is_end[:, :-1].unsqueeze(-1) & ~is_end[:, 1:].unsqueeze(-2)
            transitions = transitions.masked_fill(goes_on, IMPOSSIBLE)
        return candidates.masked_fill(is_lost.view(-1, 1, 1), -1), (emissions.float(), transitions), is_end


class YanDecodingMixin(YanFlowMixin):
    """How `YanForFlowGeneration` decodes the latents of a canvas."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V) of latents (B, L, D)."""
        return self.lm_head(self.decoder(latents))

    def text_log_likelihood(self, logits: torch.Tensor, latents: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """log p(y) of the ids `canvas` (B, L) without a CRF: of each token (B, L), or of a whole path (B, 1)."""
        if self.graph is None:
            return token_log_likelihood(logits, canvas)
        return self.graph.log_likelihood(
            self.get_input_embeddings(), logits, latents, canvas, self.config.end_ids
        ).unsqueeze(1)

    def text_cross_entropy(self, logits: torch.Tensor, latents: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """The same as a loss: its negative over the number of the canvas's tokens."""
        return -self.text_log_likelihood(logits, latents, canvas).sum() / canvas.numel()

    def most_likely(
        self,
        logits: torch.Tensor,
        latents: torch.Tensor,
        eos: Sequence[int] | None = None,
        crf_decoding: bool = True,
        length_penalty: float = 1.0,
    ) -> torch.Tensor:
        """Token ids (B, L): the best chain of a model with a CRF, else the most probable token of each position.

        A graph is ignored: `generate` decodes its best path.

        Args:
            logits: (B, L, V). latents: (B, L, D), which the logits were decoded from.
            eos: Ids that end a text: only EOS follows one. The config's EOS if None, () for none.
            crf_decoding: Whether to use the CRF, if there is one.
            length_penalty: As in `YanGenerationConfig`, for the CRF of a model trained with
                `train_expert_choice="posterior"`.
        """
        if eos is None:
            eos = () if self.config.eos_token_id is None else (self.config.eos_token_id,)
        if self.transitions is None or not crf_decoding:
            return argmax_until_eos(logits, eos)
        penalty = length_penalty if self.config.train_expert_choice == "posterior" else None
        return self.transitions.most_likely(self.get_input_embeddings(), logits, latents, eos, penalty)

    def decode_tokens(
        self, latents: torch.Tensor, plan: "CanvasPlan", token_uniform: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Most likely allowed token ids (B, L) of latents (B, L, D); never all logits of a large batch at once.

        With uniform numbers (B, L, C) they are drawn instead, each row as a chain. Where the latents are not finite,
        or the logits are NaN, the id is -1.
        """
        texts = []
        for part in self.split_rows(latents):
            logits = self.allowed_logits(part, plan)
            # a weight of the head that is NaN shows in every position, so one of them tells
            is_lost = ~part.isfinite().all(-1) | logits[:, :1].isnan().any(-1)
            uniform = None
            if token_uniform is not None:
                uniform, token_uniform = token_uniform.split([len(part), len(token_uniform) - len(part)])
            if self.graph is not None:
                text = self._read_path(logits, part, plan, uniform)
                is_lost = is_lost.any(1, keepdim=True)
            elif uniform is None or self.transitions is None:
                text = self.most_likely(logits, part, plan.end_ids, plan.crf_decoding, plan.length_penalty)
            else:
                options = uniform, plan.end_ids, plan.temperature
                text = self.transitions.draw(self.get_input_embeddings(), logits, part, *options)
            texts.append(text.masked_fill(is_lost, -1))
        return torch.cat(texts)

    def _read_path(
        self, logits: torch.Tensor, latents: torch.Tensor, plan: "CanvasPlan", uniform: torch.Tensor | None
    ) -> torch.Tensor:
        """Token ids (B, L) of a path through the vertices: the best, or one drawn; -1 where links are no numbers."""
        graph = cast(YanGraph, self.graph)
        if uniform is not None:
            drawing = plan.path_ends, plan.num_without_eos, plan.temperature
            text = graph.draw(self.get_input_embeddings(), logits, latents, uniform, *drawing)
        else:
            number = latents.shape[1] // self.config.vertices_per_token
            options = number, plan.path_ends, plan.num_without_eos, plan.length_penalty
            text, _ = graph.most_likely(self.get_input_embeddings(), logits, latents, *options)
        return text.masked_fill(graph.is_lost(self.get_input_embeddings(), latents).unsqueeze(1), -1)

    def score_tokens(self, latents: torch.Tensor, plan: "CanvasPlan") -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability (B,) of the most likely text of latents (B, L, D), and its length (B,) with its EOS."""
        logits = self.allowed_logits(latents, plan)
        if self.graph is not None:
            number = latents.shape[1] // self.config.vertices_per_token
            options = number, plan.path_ends, plan.num_without_eos, plan.length_penalty
            return self.graph.score(self.get_input_embeddings(), logits, latents, *options)
        text = self.most_likely(logits, latents, plan.end_ids, plan.crf_decoding, plan.length_penalty)
        length = text.new_full((text.shape[0],), text.shape[1])
        for token in plan.end_ids:
            length = length.minimum(((text == token).cumsum(-1) == 0).sum(-1) + 1)
        if self.transitions is None or not plan.crf_decoding:
            chosen = logits.float().log_softmax(-1).gather(-1, text.unsqueeze(-1))  # cross_entropy is no ONNX yet
            return chosen.squeeze(-1).sum(-1), length
        return self.transitions.log_likelihood(self.get_input_embeddings(), logits, latents, text), length

    def allowed_logits(self, latents: torch.Tensor, plan: "CanvasPlan") -> torch.Tensor:
        """Logits (B, L, V) of latents (B, L, D), those of forbidden tokens minus infinity."""
        logits = self.decode(latents)
        # one token after the other: a list as an index would be copied to the device, and keep CUDA graphs out
        for token in plan.suppressed:
            logits[..., token] = -torch.inf
        by_position = plan.num_without_eos > 0 and self.graph is None  # a path counts its tokens itself
        for token in plan.eos if by_position else ():
            logits[:, : plan.num_without_eos, token] = -torch.inf
        return logits

    def split_rows(self, latents: torch.Tensor) -> Sequence[torch.Tensor]:
        """The latents (B, L, D) in parts whose logits fit into memory, or a CPU's cache, together."""
        if is_exporting():  # for any number of rows
            return [latents]
        most = MAX_LOGITS_CPU if can_look_at(latents) else MAX_LOGITS
        chains = 0 if self.transitions is None else self.transitions.num_candidates**3 // 2
        paths = 0 if self.graph is None else self.graph.num_candidates * (latents.shape[1] + self.graph.reach)
        per_token = max(self.config.vocab_size, chains, paths)
        return latents.split(max(1, most // (latents.shape[1] * per_token)))
