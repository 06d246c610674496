"""Scores of predictions against their references, each in [0, 1].

A function whose name ends in `_scores` takes lists and returns one score a row. Two empty texts count as equal, except
for ROUGE, where a row with an empty text scores 0 as in the rouge-score package.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

ROUGE_NAMES = ("rouge1", "rouge2", "rougeL")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, target: str, normalize: bool = False) -> float:
    """1 if prediction and target are the same words, letter for letter; with `normalize` after `normalize_answer`."""
    if normalize:
        prediction, target = normalize_answer(prediction), normalize_answer(target)
    return float(prediction.split() == target.split())


def rouge_l(prediction: str, target: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L of the rouge-score package, no stemming)."""
    return rouge_scores([prediction], [target], names=("rougeL",))["rougeL"][0]


def normalize_answer(text: str) -> str:
    """The text as SQuAD compares it: lower case, without ASCII punctuation, without a, an, the, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def unicode_words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores of any script."""
    return re.findall(r"\w+", text.lower())


def exact_match_scores(predictions: Sequence[str], references: Sequence[str], normalize: bool = False) -> list[float]:
    """`exact_match` of every row.

    Raises:
        ValueError: No rows, a string in place of a list, or lists of different length.
    """
    check_rows(predictions=predictions, references=references)
    return [exact_match(*row, normalize=normalize) for row in zip(predictions, references)]


def accuracy_scores(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> list[float]:
    """1 where the predicted label is the wanted one. Labels may be numbers or strings; a string's outer white space
    is ignored.

    Raises:
        ValueError: No rows, a string in place of a list, or lists of different length.
    """
    check_rows(predictions=predictions, references=references)
    return [float(_label(label) == _label(wanted)) for label, wanted in zip(predictions, references)]


def token_f1_scores(predictions: Sequence[str], references: Sequence[str], normalize: bool = True) -> list[float]:
    """F1 of the words that prediction and reference share, each as often as both have it (SQuAD's F1).

    Args:
        normalize: Whether both go through `normalize_answer` first, as SQuAD's do.

    Raises:
        ValueError: No rows, a string in place of a list, or lists of different length.
    """
    check_rows(predictions=predictions, references=references)
    prepare = normalize_answer if normalize else str
    return [_f1(prepare(text).split(), prepare(wanted).split()) for text, wanted in zip(predictions, references)]


def rouge_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    names: Sequence[str] = ROUGE_NAMES,
    use_stemmer: bool = False,
    tokenize: Callable[[str], list[str]] | None = None,
) -> dict[str, list[float]]:
    """F1 of every row for each name, by the rouge-score package; 0 where prediction or reference has no words.

    Args:
        names: Among "rouge1", "rouge2", ..., "rougeL", "rougeLsum".
        tokenize: Function from text to words. By default the package's own: lower case, runs of a to z and 0 to 9,
            which leaves nothing of other scripts; `unicode_words` keeps those.

    Raises:
        ImportError: rouge-score is not installed.
        ValueError: No rows, a string in place of a list, lists of different length, or an unknown name.
    """
    check_rows(predictions=predictions, references=references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge-score: pip install rouge-score") from error
    tokenizer = None if tokenize is None else _Tokenizer(tokenize)
    scorer = RougeScorer(list(names), use_stemmer=use_stemmer, tokenizer=tokenizer)
    rows = [scorer.score(wanted, text) for text, wanted in zip(predictions, references)]
    return {name: [float(row[name].fmeasure) for row in rows] for name in names}


class _Tokenizer:
    """The object with a method `tokenize` that rouge-score asks for."""

    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self.tokenize = tokenize


def check_rows(**columns: Sequence[Any]) -> None:
    """Raise ValueError, naming the columns, unless they are lists of one and the same length above 0."""
    for name, column in columns.items():
        if isinstance(column, (str, bytes)):
            raise ValueError(f"{name} is one string: must be a list with one entry a row")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = " and ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"there are {found}: must be as many")
    if 0 in lengths.values():
        raise ValueError(f"{' and '.join(lengths)}: no rows, must be at least 1")


def _label(label: Hashable) -> Hashable:
    return label.strip() if isinstance(label, str) else label


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def masked_words_restored(prediction: str, source: str, target: str, masked: Sequence[str], mask_token: str) -> float:
    """Share of the target's masked words that stand in the prediction where they belong.

    A word counts where a longest common subsequence of prediction and target contains it, so a gap that was filled
    with a word too many does not spoil the ones after it.

    Args:
        source: The prompt; it begins with the target's words, with mask tokens in place of each span.
        masked: The words of every span, in order.
    """
    words = target.split()
    hidden = _masked_positions(source, len(words), masked, mask_token)
    return len(hidden & _common_positions(words, prediction.split())) / len(hidden)


def _masked_positions(source: str, num_target_words: int, masked: Sequence[str], mask_token: str) -> set[int]:
    """Positions of the masked words in the target."""
    spans = [span.split() for span in masked]
    num_shown = num_target_words - sum(map(len, spans)) + len(spans)
    shown, position = source.split()[:num_shown], 0
    positions: set[int] = set()
    remaining = iter(spans)
    for word in shown:
        is_span = not word.replace(mask_token, "")
        length = len(next(remaining)) if is_span else 1
        if is_span:
            positions.update(range(position, position + length))
        position += length
    return positions


def _common_positions(words: list[str], others: list[str]) -> set[int]:
    """Positions in `words` of one longest common subsequence with `others`."""
    lengths = [[0] * (len(others) + 1) for _ in range(len(words) + 1)]
    for i in reversed(range(len(words))):
        for j in reversed(range(len(others))):
            same = words[i] == others[j]
            lengths[i][j] = 1 + lengths[i + 1][j + 1] if same else max(lengths[i + 1][j], lengths[i][j + 1])
    i = j = 0
    positions: set[int] = set()
    while i < len(words) and j < len(others):
        if words[i] == others[j]:
            positions.add(i)
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return positions
