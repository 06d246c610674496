"""Generative perplexity: how likely texts are to an autoregressive model that judges them."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .metrics import check_rows

Judge = PreTrainedModel | str | os.PathLike[str]
NOT_AUTOREGRESSIVE = ("yan", "yan-masked-diffusion")


class GenerativePerplexity(NamedTuple):
    """exp of the mean negative log-likelihood of all tokens, and each text's sum of it in nats and token count."""

    perplexity: float
    negative_log_likelihoods: list[float]
    num_tokens: list[int]


def generative_perplexity(
    texts: Sequence[str],
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[str] | None = None,
    separator: str = " ",
    batch_size: int = 8,
) -> GenerativePerplexity:
    """Perplexity of the texts under an autoregressive judge, every token counting the same whatever its text.

    The judge sees its BOS token, if it has one, then the prompt, then the text; only the text's tokens are counted,
    without an EOS. Without BOS and prompt nothing predicts a text's first token, which is then
    left out. Empty texts have no tokens. A prompt that is too long for the judge loses its beginning.

    Args:
        judge: A causal language model, or its hub name or folder.
        tokenizer: The judge's; loaded by the judge's name if None.
        prompts: What each text continues; None or empty for nothing.
        separator: Stands between a prompt that is not empty and its text, and counts as part of the text.

    Raises:
        ValueError: No texts, or none with a token to count; as many prompts as texts are needed; a text that is
            longer than the judge's context; a judge that is not autoregressive.
        OSError: The judge can't be loaded.
    """
    prompts = [""] * len(texts) if prompts is None else prompts
    check_rows(texts=texts, prompts=prompts)
    judge, tokenizer = load_judge(judge, tokenizer)
    rows = [_row(*row, judge, tokenizer, separator) for row in zip(prompts, texts)]
    counted = [index for index, (_, num_tokens) in enumerate(rows) if num_tokens]
    if not counted:
        raise ValueError(f"{len(texts)} texts without a token to count: must be at least 1")
    sums = [0.0] * len(rows)
    for start in range(0, len(counted), batch_size):
        chosen = counted[start : start + batch_size]
        for index, total in zip(chosen, _sums(judge, [rows[index] for index in chosen])):
            sums[index] = total
    num_tokens = [number for _, number in rows]
    return GenerativePerplexity(math.exp(sum(sums) / sum(num_tokens)), sums, num_tokens)


def load_judge(
    judge: Judge, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The judge and its tokenizer, loaded if it is a hub name or a folder; errors as in `generative_perplexity`."""
    if isinstance(judge, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(judge) if tokenizer is None else tokenizer
        judge = AutoModelForCausalLM.from_pretrained(judge)
    if tokenizer is None:
        raise ValueError("tokenizer=None: must be the tokenizer of the judge, unless the judge is a name or a folder")
    if judge.config.model_type in NOT_AUTOREGRESSIVE:
        hint = "YAN's own likelihood of whole texts is model.log_likelihood"
        raise ValueError(f"judge of model_type {judge.config.model_type!r}: must be autoregressive; {hint}")
    return judge.eval(), tokenizer


def _row(
    prompt: str, text: str, judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, separator: str
) -> tuple[list[int], int]:
    """Ids of BOS, prompt and text, and the number of the last of them that are counted."""
    encode = lambda string: tokenizer(string, add_special_tokens=False)["input_ids"] if string else []  # noqa: E731
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before, ids = encode(prompt), encode(separator + text if prompt and text else text)
    longest = getattr(judge.config, "max_position_embeddings", None) or math.inf
    room = longest - len(start) - len(ids)
    if room < 0:
        raise ValueError(f"text of {len(ids)} tokens: must be at most {longest - len(start)} for this judge")
    before = before[len(before) - int(room) :] if room < len(before) else before
    return start + before + ids, len(ids) if start or before else max(0, len(ids) - 1)


@torch.no_grad()
def _sums(judge: PreTrainedModel, rows: list[tuple[list[int], int]]) -> list[float]:
    """Negative log-likelihood in nats of the counted tokens of each row."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=judge.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=judge.device)
    logits = judge(input_ids=ids, attention_mask=mask).logits
    sums = []
    for row, (known, num_tokens) in enumerate(rows):
        first = len(known) - num_tokens
        scores = logits[row, first - 1 : len(known) - 1].double().log_softmax(-1)
        sums.append(-float(scores.gather(1, ids[row, first : len(known), None]).sum()))
    return sums
