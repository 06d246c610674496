"""Filling the gaps of a text: every mask token stands for a gap of any length, and the text around it stays.

Letters of the shape comments: C candidates, L tokens of the longest one, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .base_yan import YanBaseMixin

MAX_GAP_TOKENS = 4
KEPT_WEIGHT = 0.1  # of the text around the gaps, which is the more certain the wider they are
MAX_ROUNDS = 3  # over all gaps; a width seldom changes after the second


@dataclass(frozen=True)
class YanFilling:
    """A text whose gaps are filled.

    Args:
        text: The whole text.
        spans: The text in each gap, in order.
        score: Mean log-probability of the tokens in the gaps, plus 0.1 times that of the other tokens, in nats.
    """

    text: str
    spans: tuple[str, ...]
    score: float


class YanFillingMixin(YanBaseMixin):
    """`fill` for flow models."""

    @torch.no_grad()
    def fill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        max_gap_tokens: int = MAX_GAP_TOKENS,
        num_flow_steps: int | None = None,
    ) -> YanFilling:
        """Replace each mask token of a text by one word or several.

        Each gap is tried with 1 to `max_gap_tokens` tokens, as one batch. The score of a candidate is the mean
        log-probability of the tokens in its gaps, plus 0.1 times that of the other tokens. The best candidate is
        returned. With several gaps, the widths change one gap at a time. The result is deterministic.

        Args:
            tokenizer: The model's tokenizer.
            text: A text with at least one of the tokenizer's mask tokens.
            max_gap_tokens: Widest gap, in tokens; at least 1.
            num_flow_steps: Euler steps, at least 0; `config.num_flow_steps` if None.

        Returns:
            A `YanFilling`: the text, what stands in each gap, and the score.

        Raises:
            ValueError: A text without mask token, or too long for the canvas; a width below 1; a model with a graph
                (`vertices_per_token`).

        Example:

            >>> from transformers import AutoTokenizer
            >>> from modeling_yan import YanForFlowGeneration
            >>> folder = "examples/checkpoints/yan-transformer-tiny"
            >>> tokenizer, model = AutoTokenizer.from_pretrained(folder), YanForFlowGeneration.from_pretrained(folder)
            >>> model.fill(tokenizer, "There was nothing to <mask> done.").text
            'There was nothing to be done.'
        """
        if self.config.vertices_per_token > 1:
            allowed = "1 to fill gaps, which stay where they are"
            raise ValueError(f"vertices_per_token={self.config.vertices_per_token}: must be {allowed}")
        if tokenizer.mask_token is None:
            raise ValueError("tokenizer.mask_token=None: must be a token, which stands for a gap")
        if not isinstance(text, str) or tokenizer.mask_token not in text:
            raise ValueError(f"text={text!r}: must be a string with at least one {tokenizer.mask_token}")
        if isinstance(max_gap_tokens, bool) or not isinstance(max_gap_tokens, int) or max_gap_tokens < 1:
            raise ValueError(f"max_gap_tokens={max_gap_tokens!r}: must be an integer of at least 1")
        parts = text.split(tokenizer.mask_token)
        best: tuple[int, ...] = (1,) * (len(parts) - 1)
        known: dict[tuple[int, ...], YanFilling] = {}
        for _ in range(MAX_ROUNDS):
            before = best
            for gap in range(len(best)):
                others = [(*best[:gap], width, *best[gap + 1 :]) for width in range(1, max_gap_tokens + 1)]
                new = [widths for widths in others if widths not in known]
                known |= dict(zip(new, self._fill_all(tokenizer, parts, new, num_flow_steps), strict=True))
                best = max(others, key=lambda widths: known[widths].score)
            if best == before:
                break
        return known[best]

    def _fill_all(
        self,
        tokenizer: PreTrainedTokenizerBase,
        parts: list[str],
        all_widths: list[tuple[int, ...]],
        num_flow_steps: int | None,
    ) -> list[YanFilling]:
        """The text with gaps of given widths, for each of several choices; wider ones may not fit on the canvas."""
        if not all_widths:
            return []
        prompts = [_with_gaps(parts, widths, tokenizer.mask_token) for widths in all_widths]
        batch = tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        longest, room = int(mask.sum(1).min()), min(self.config.canvas_length, self.config.max_prompt_length)
        if longest > room:
            raise ValueError(f"text has {longest} tokens with its gaps: must be at most {room}, the canvas's width")
        fits = mask.sum(1) <= room
        ids, mask = ids[:, :room], mask[:, :room]
        logits = self(ids, mask.long(), num_flow_steps=num_flow_steps).logits
        log_probs = logits.float().log_softmax(-1)[:, : ids.shape[1] + 1]
        is_gap = (ids == tokenizer.mask_token_id) & mask
        special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
        words = log_probs[:, : ids.shape[1]].index_fill(-1, special, -torch.inf)
        ids = torch.where(is_gap, words.argmax(-1), ids)
        chosen = log_probs[:, : ids.shape[1]].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        in_gaps, kept, length = (chosen * is_gap).sum(1), (chosen * (mask & ~is_gap)).sum(1), mask.sum(1)
        kept = kept + _log_prob_of_end(log_probs, length, self.config.eos_token_id)
        scores = in_gaps / is_gap.sum(1) + KEPT_WEIGHT * kept / (length - is_gap.sum(1) + 1)
        scores = torch.where(fits, scores, -torch.inf)
        fillings = []
        for row, widths in enumerate(all_widths):
            spans = ids[row][is_gap[row]].split(list(widths)) if fits[row] else [ids[row][:0]] * len(widths)
            texts = tuple(str(tokenizer.decode(span)).strip() for span in spans)
            whole = "".join(part + span for part, span in zip(parts, (*texts, ""), strict=True))
            fillings.append(YanFilling(whole, texts, float(scores[row])))
        return fillings


def _with_gaps(parts: list[str], widths: tuple[int, ...], mask_token: str) -> str:
    """The text with the given number of mask tokens in each of its gaps."""
    masks = [mask_token * width for width in widths]
    return "".join(part + gap for part, gap in zip(parts, (*masks, ""), strict=True))


def _log_prob_of_end(log_probs: torch.Tensor, length: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """Log-probability of EOS after each text, 0 where the canvas ends there."""
    is_inside = length < log_probs.shape[1]
    position = length.clamp(max=log_probs.shape[1] - 1).unsqueeze(1)
    return log_probs[..., eos_token_id].gather(1, position).squeeze(1) * is_inside
