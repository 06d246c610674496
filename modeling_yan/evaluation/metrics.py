"""Scores of one prediction against its target, each in [0, 1], and their mean with an interval."""

import random
from collections.abc import Sequence


def exact_match(prediction: str, target: str) -> float:
    """1 if prediction and target are the same words, letter for letter."""
    return float(prediction.split() == target.split())


def rouge_l(prediction: str, target: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L of the rouge-score package, no stemming)."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score(target, prediction)["rougeL"].fmeasure


def masked_words_restored(prediction: str, source: str, target: str, masked: Sequence[str], mask_token: str) -> float:
    """Share of the target's masked words that stand in the prediction where they belong.

    A word counts where a longest common subsequence of prediction and target contains it, so a gap that was filled
    with a word too many does not spoil the ones behind it.

    Args:
        source: The prompt; it begins with the target's words, with mask tokens in place of each span.
        masked: The words of every span, in order.
    """
    words = target.split()
    hidden = _masked_positions(source, len(words), masked, mask_token)
    return len(hidden & _common_positions(words, prediction.split())) / len(hidden)


def _masked_positions(source, num_target_words, masked, mask_token):
    """Positions of the masked words in the target."""
    spans = [span.split() for span in masked]
    num_shown = num_target_words - sum(map(len, spans)) + len(spans)
    shown, positions, position = source.split()[:num_shown], set(), 0
    remaining = iter(spans)
    for word in shown:
        is_span = not word.replace(mask_token, "")
        length = len(next(remaining)) if is_span else 1
        if is_span:
            positions.update(range(position, position + length))
        position += length
    return positions


def _common_positions(words, others):
    """Positions in `words` of one longest common subsequence with `others`."""
    lengths = [[0] * (len(others) + 1) for _ in range(len(words) + 1)]
    for i in reversed(range(len(words))):
        for j in reversed(range(len(others))):
            same = words[i] == others[j]
            lengths[i][j] = 1 + lengths[i + 1][j + 1] if same else max(lengths[i + 1][j], lengths[i][j + 1])
    positions, i, j = set(), 0, 0
    while i < len(words) and j < len(others):
        if words[i] == others[j]:
            positions.add(i)
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return positions


def mean_with_interval(
    scores: Sequence[float], seed: int = 0, num_resamples: int = 1000
) -> tuple[float, float, float]:
    """Mean of the scores and its 95% bootstrap interval (low, high)."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(scores, k=len(scores))) / len(scores) for _ in range(num_resamples))
    return sum(scores) / len(scores), means[int(0.025 * num_resamples)], means[int(0.975 * num_resamples) - 1]
