"""The metrics as `evaluate.Metric` modules: nothing is fetched, `load_metric` returns classes of this package."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .diversity import distinct_n, repetition_rates, self_bleu, unigram_entropies
from .embeddings import bert_scores, mauve_score, mean_pairwise_distance, semantic_distances
from .likelihood import generative_perplexity
from .metrics import accuracy_scores, exact_match_scores, rouge_scores, token_f1_scores
from .speed import num_new_tokens

STRING, INTEGER = datasets.Value("string"), datasets.Value("int64")


class _YanMetric(evaluate.Metric):
    """A metric whose docstring is its description and whose `accepts` says what it takes.

    `compute(..., return_scores=True)` adds "scores": each figure's list with one entry a row, where it has one.
    """

    accepts = datasets.Features(predictions=STRING, references=STRING)

    def _info(self) -> Any:
        features = self.accepts
        columns = features[0] if isinstance(features, list) else features
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=features,
            inputs_description=f"\nTakes {' and '.join(columns)}, one entry a row. {self.__doc__}",
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any] | None = None,
        return_scores: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        columns = [predictions] if references is None else [predictions, references]
        rows = self._score(*columns, **options)
        figures = {name: self._summarize(name, values) for name, values in rows.items()}
        return {**figures, "scores": rows} if return_scores else figures

    def _score(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        raise NotImplementedError

    def _summarize(self, name: str, scores: list[float]) -> float:
        return sum(scores) / len(scores)


class _WithoutReferences(_YanMetric):
    accepts = datasets.Features(predictions=STRING)


class Rouge(_YanMetric):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L. Options: names, use_stemmer, tokenize."""

    def _score(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        return rouge_scores(predictions, references, **options)


class ExactMatch(_YanMetric):
    """Share of predictions with the reference's words. Option: normalize, for SQuAD's normalisation (default no)."""

    def _score(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        return {"exact_match": exact_match_scores(predictions, references, **options)}


class TokenF1(_YanMetric):
    """Mean F1 of the shared words. Option: normalize, for SQuAD's normalisation (default yes)."""

    def _score(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        return {"token_f1": token_f1_scores(predictions, references, **options)}


class Accuracy(_YanMetric):
    """Share of labels, integers or strings, that are right."""

    accepts = [  # the first that fits the first row
        datasets.Features(predictions=INTEGER, references=INTEGER),
        datasets.Features(predictions=STRING, references=STRING),
    ]

    def _score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, list[float]]:
        return {"accuracy": accuracy_scores(predictions, references)}


class BertScore(_YanMetric):
    """Mean precision, recall and F1 of BERTScore. Option: encoder, a name, folder or TextEncoder."""

    def _score(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        return bert_scores(predictions, references, **options)


class SemanticDistance(_YanMetric):
    """Mean of 1 minus the cosine of sentence embeddings. Option: encoder, a name, folder, TextEncoder or function."""

    def _score(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        return {"semantic_distance": semantic_distances(predictions, references, **options)}


class Mauve(_YanMetric):
    """MAUVE of the predictions against the references. Options: encoder, and those of mauve.compute_mauve."""

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, Any]:
        return {"mauve": mauve_score(predictions, references, **options)}


class SelfBleu(_WithoutReferences):
    """Mean BLEU of every prediction against all the others. Option: max_order (default 4)."""

    def _score(self, predictions: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        return {"self_bleu": self_bleu(predictions, **options)}


class Distinct(_WithoutReferences):
    """Different n-grams over all n-grams. Option: orders (default 1 and 2)."""

    def _compute(self, predictions: Sequence[Any], orders: Sequence[int] = (1, 2)) -> dict[str, Any]:
        return {f"distinct_{n}": distinct_n(predictions, n) for n in orders}


class RepetitionRate(_WithoutReferences):
    """Mean share of a prediction's n-grams that stood in it before. Option: n (default 4)."""

    def _score(self, predictions: Sequence[Any], **options: Any) -> dict[str, list[float]]:
        return {"repetition_rate": repetition_rates(predictions, **options)}


class UnigramEntropy(_WithoutReferences):
    """Mean entropy of a prediction's words in nats."""

    def _score(self, predictions: Sequence[Any]) -> dict[str, list[float]]:
        return {"unigram_entropy": unigram_entropies(predictions)}


class PairwiseDistance(_WithoutReferences):
    """Mean distance of sentence embeddings over all pairs. Option: encoder."""

    def _compute(self, predictions: Sequence[Any], **options: Any) -> dict[str, Any]:
        return {"pairwise_distance": mean_pairwise_distance(predictions, **options)}


class GenerativePerplexity(_WithoutReferences):
    """Perplexity under an autoregressive judge. Options: judge (needed), tokenizer, prompts, separator, batch_size."""

    def _compute(
        self, predictions: Sequence[Any], judge: Any, return_scores: bool = False, **options: Any
    ) -> dict[str, Any]:
        result = generative_perplexity(predictions, judge, **options)
        figures = {"generative_perplexity": result.perplexity}
        rows = {"negative_log_likelihood": result.negative_log_likelihoods, "num_tokens": result.num_tokens}
        return {**figures, "scores": rows} if return_scores else figures


class TokensPerSecond(_YanMetric):
    """New tokens up to and including EOS over the seconds taken. Options: eos_token_id and seconds (both needed)."""

    accepts = datasets.Features(predictions=datasets.List(INTEGER))

    def _compute(self, predictions: Sequence[Any], eos_token_id: int, seconds: float) -> dict[str, Any]:
        if not seconds > 0:
            raise ValueError(f"seconds={seconds}: must be above 0")
        num_tokens = sum(num_new_tokens([row], eos_token_id)[0] for row in predictions)  # rows may differ in length
        return {"tokens_per_second": num_tokens / seconds, "num_new_tokens": num_tokens}


METRICS = {
    "accuracy": Accuracy,
    "bert_score": BertScore,
    "distinct": Distinct,
    "exact_match": ExactMatch,
    "generative_perplexity": GenerativePerplexity,
    "mauve": Mauve,
    "pairwise_distance": PairwiseDistance,
    "repetition_rate": RepetitionRate,
    "rouge": Rouge,
    "self_bleu": SelfBleu,
    "semantic_distance": SemanticDistance,
    "token_f1": TokenF1,
    "tokens_per_second": TokensPerSecond,
    "unigram_entropy": UnigramEntropy,
}


def load_metric(name: str, **options: Any) -> evaluate.Metric:
    """The metric of this name, for `compute`, `add` and `add_batch`.

    Args:
        name: A key of `METRICS`.
        options: Of `evaluate.Metric`, such as `keep_in_memory`, `num_process` and `experiment_id`.

    Raises:
        ValueError: There is no such metric.

    Example:

        >>> from modeling_yan.evaluation import load_metric
        >>> load_metric("exact_match").compute(predictions=["a cup", "a hat"], references=["a cup", "a map"])
        {'exact_match': 0.5}
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r}: must be one of {', '.join(METRICS)}")
    return METRICS[name](**options)
