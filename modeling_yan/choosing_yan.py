"""Which experts write a canvas where none are drawn: those that write the most probable text.

The gate alone does not know: of sixteen experts that are about as probable, some write far better than others.

Letters of the shape comments: B batch, L canvas length, K experts, V vocabulary, D hidden size.
"""

import torch

from .flow_matching_yan import token_log_likelihood
from .reading_yan import best_of_text_and_fill


class YanChoosingMixin:
    """The choice of experts in `YanForFlowGeneration`, from where each of them leads."""

    def best_experts(self, ends, prior, plan) -> torch.LongTensor:
        """The experts (B, L) that are the most probable together with what they write.

        Of one expert a token that is the gate's choice. With one for a text it is the expert whose best text, and the
        expert itself, have the highest log-probability over the text's length to the power `length_penalty`.

        Args:
            ends: What every expert's head predicts, (B, L, K, D). prior: A `YanExpertPrior`. plan: A `CanvasPlan`.
        """
        if prior.scope == "token":
            return prior.choose("argmax")
        return self._best_chain(ends, prior, plan) if prior.scope == "chain" else self._best_of_all(ends, prior, plan)

    def _best_of_all(self, ends, prior, plan):
        scores = [[self._score_text(part, plan) for part in self._split_rows(end)] for end in ends.unbind(2)]
        scores, lengths = (
            torch.stack([torch.cat(part) for part in each], dim=-1)
            for each in zip(*(zip(*parts, strict=True) for parts in scores), strict=True)
        )
        best = ((scores + prior.log_gate[:, 0]) / lengths**plan.length_penalty).argmax(-1, keepdim=True)
        return best.expand(prior.log_gate.shape[:2])

    def _score_text(self, latents, plan):
        """Log-probability (B,) of the best text of latents (B, L, D), and its length (B,) with its EOS."""
        eos = plan.eos if plan.end_choice == "likeliest" else ()
        logits = self._allowed_logits(latents, plan)
        text = self.most_likely(logits, latents, eos, plan.use_transitions, plan.length_penalty)
        length = text.new_full((len(text),), text.shape[1])
        for token in eos:
            length = length.minimum((text != token).cumprod(-1).sum(-1) + 1)
        if self.transitions is None or not plan.use_transitions:
            return token_log_likelihood(logits, text).sum(-1), length
        return self.transitions.log_likelihood(self.get_input_embeddings(), logits, latents, text), length

    def _best_chain(self, ends, prior, plan):
        """For chains of experts: those that write the best text together."""
        eos = plan.eos if plan.end_choice == "likeliest" else ()
        scores = []
        for end in ends.unbind(2):  # one by one, or the logits would be K vocabularies wide
            parts = [best_of_text_and_fill(self._allowed_logits(part, plan), eos) for part in self._split_rows(end)]
            scores.append([torch.cat(part) for part in zip(*parts, strict=True)])
        tokens, *fill = (torch.stack(each, dim=-1) for each in zip(*scores, strict=True))
        return prior.best_chain(tokens, *fill, length_penalty=plan.length_penalty)
