"""Diversity and repetition of texts, without references.

A text is a string, whose tokens are its words between white space, or a list of tokens or token ids.
"""

import bisect
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from .metrics import check_rows

Text = str | Sequence[Hashable]
EPSILON = 0.1  # takes the place of a count of 0 in BLEU's precisions


def self_bleu(texts: Sequence[Text], max_order: int = 4) -> list[float]:
    """BLEU of every text with all the others as its references, in [0, 1]; a high mean says that texts are alike.

    The geometric mean of the clipped precisions of orders 1 to `max_order`, where a count of 0 is replaced by 0.1 (the
    first smoothing of Chen and Cherry, 2014), times the brevity penalty of the closest length. A text that shares no
    word with another one, such as an empty one, scores 0.

    Raises:
        ValueError: Fewer than two texts, or a string in place of a list.
    """
    check_rows(texts=texts)
    if len(texts) < 2:
        raise ValueError(f"Self-BLEU of {len(texts)} text: must be at least 2")
    tokens = [_tokens(text) for text in texts]
    orders = [_matches(tokens, order) for order in range(1, max_order + 1)]
    lengths = sorted(map(len, tokens))
    scores = []
    for index, text in enumerate(tokens):
        matches = [of_order[index] for of_order in orders]
        totals = [max(1, len(text) - order) for order in range(max_order)]
        scores.append(_bleu(matches, totals, len(text), _closest(lengths, len(text))))
    return scores


def distinct_n(texts: Sequence[Text], n: int) -> float:
    """Number of different n-grams of all texts over the number of n-grams, in (0, 1]; 0 where there is no n-gram.

    It falls with the amount of text, so compare only sets of equal size.

    Raises:
        ValueError: No texts, a string in place of a list, or n below 1.
    """
    check_rows(texts=texts)
    _check_order(n)
    counts: Counter[tuple[Any, ...]] = Counter()
    for text in texts:
        counts.update(_ngrams(_tokens(text), n))
    return len(counts) / counts.total() if counts else 0.0


def repetition_rates(texts: Sequence[Text], n: int = 4) -> list[float]:
    """Share of each text's n-grams that stood in it before, in [0, 1); 0 for a text without n-gram.

    Raises:
        ValueError: No texts, a string in place of a list, or n below 1.
    """
    check_rows(texts=texts)
    _check_order(n)
    counts = [_ngrams(_tokens(text), n) for text in texts]
    return [1 - len(count) / count.total() if count else 0.0 for count in counts]


def unigram_entropies(texts: Sequence[Text]) -> list[float]:
    """Entropy in nats of the token frequencies of each text: 0 for one token over and over, and for no token;
    log(L) for L different ones. For the entropy of a whole output join its texts into one.

    Raises:
        ValueError: No texts, or a string in place of a list.
    """
    check_rows(texts=texts)
    return [_entropy(Counter(_tokens(text))) for text in texts]


def _tokens(text: Text) -> list[Any]:
    return text.split() if isinstance(text, str) else list(text)


def _ngrams(tokens: Sequence[Any], n: int) -> Counter[tuple[Any, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n))))


def _check_order(n: int) -> None:
    if n < 1:
        raise ValueError(f"n={n}: must be at least 1")


def _entropy(counts: Counter[Any]) -> float:
    total = counts.total()
    return sum(count / total * math.log(total / count) for count in counts.values())


def _matches(tokens: list[list[Any]], order: int) -> list[int]:
    """For every text its n-grams, each as often as text and one of the other texts have it.

    Two counts an n-gram are enough for all the others: the largest with its owner, and the next.
    """
    counts = [_ngrams(text, order) for text in tokens]
    largest: dict[tuple[Any, ...], tuple[int, int | None, int]] = {}
    for owner, count in enumerate(counts):
        for ngram, number in count.items():
            first, first_owner, second = largest.get(ngram, (0, None, 0))
            if number > first:
                largest[ngram] = (number, owner, first)
            else:
                largest[ngram] = (first, first_owner, max(second, number))
    return [
        sum(min(number, _of_others(largest[ngram], owner)) for ngram, number in count.items())
        for owner, count in enumerate(counts)
    ]


def _of_others(largest: tuple[int, int | None, int], owner: int) -> int:
    first, first_owner, second = largest
    return second if owner == first_owner else first


def _closest(lengths: list[int], length: int) -> int:
    """The length nearest to `length` among the sorted ones without one of its kind; of two the shorter."""
    position = bisect.bisect_left(lengths, length)
    candidates = [*lengths[max(0, position - 1) : position], *lengths[position + 1 : position + 2]]
    return min(candidates, key=lambda other: (abs(other - length), other))


def _bleu(matches: list[int], totals: list[int], length: int, reference_length: int) -> float:
    if matches[0] == 0:
        return 0.0
    logarithms = [math.log((match or EPSILON) / total) for match, total in zip(matches, totals)]
    brevity = min(0.0, 1 - reference_length / length)
    return math.exp(brevity + sum(logarithms) / len(logarithms))
