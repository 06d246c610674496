"""From a model's runs to `metrics.json` and `predictions.jsonl`, and from two of these folders to paired tests."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.rows import write_whole
from .diversity import distinct_n, repetition_rates, self_bleu, unigram_entropies
from .embeddings import (
    bert_scores,
    import_mauve,
    load_sentence_encoder,
    load_token_encoder,
    mauve_score,
    semantic_distances,
)
from .likelihood import GenerativePerplexity, generative_perplexity, load_judge
from .metrics import accuracy_scores, exact_match_scores, rouge_scores, token_f1_scores
from .runs import DETERMINISTIC, Run, RunOptions, run_model
from .statistics import (
    import_stats,
    mcnemar_exact,
    mean_and_deviation,
    mean_with_interval,
    paired_bootstrap,
    paired_permutation_test,
)

# name -> function of predictions and references to figures with one score a row
ROW_METRICS: dict[str, Callable[..., dict[str, list[float]]]] = {
    "exact_match": lambda texts, wanted: {
        "exact_match": exact_match_scores(texts, wanted),
        "normalized_exact_match": exact_match_scores(texts, wanted, normalize=True),
    },
    "accuracy": lambda texts, wanted: {"accuracy": accuracy_scores(texts, wanted)},
    "token_f1": lambda texts, wanted: {"token_f1": token_f1_scores(texts, wanted)},
    "rouge": rouge_scores,
    "repetition": lambda texts, _: {"repetition_rate": repetition_rates(texts)},
    "entropy": lambda texts, _: {"unigram_entropy": unigram_entropies(texts)},
}
# name -> function of predictions and references to figures of all rows together
SET_METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "self_bleu": lambda texts, _: {"self_bleu": float(np.mean(self_bleu(texts)))} if len(texts) > 1 else {},
    "distinct": lambda texts, _: {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)},
}
ENCODER_METRICS = ("bert_score", "semantic_distance", "mauve")
METRIC_NAMES = (*ROW_METRICS, *SET_METRICS, *ENCODER_METRICS)
DEFAULT_METRICS = tuple(name for name in METRIC_NAMES if name not in ("accuracy", *ENCODER_METRICS))

Row = Mapping[str, Any]

Metric = Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]]
Functions = tuple[list[Metric], list[Metric], Callable[[list[str]], GenerativePerplexity] | None]


def evaluate_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    options: RunOptions | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    encoder: Any = None,
    judge: Any = None,
    compare: str | os.PathLike[str] | None = None,
    description: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Generate for every row, score, and write `metrics.json` and `predictions.jsonl` into the folder `output`.

    Each file appears whole or not at all, `metrics.json` last. `predictions.jsonl` has a line per run, seed and row
    with its text, token count and scores. The returned content of `metrics.json`:

    - "runs": for "free" and "oracle" length, for "sampled" and "deterministic" decoding (see `run_model`), each
      figure's "mean", 95% bootstrap interval "low" and "high" over the rows (of the rows' means over the seeds), its
      "per_seed" values and their standard deviation "std", None with one seed. Figures of all rows together, such as
      distinct-2, have no interval: resampled rows would repeat themselves.
    - "comparison": with `compare`, the paired tests of `compare_runs`.
    - "options", "num_rows" and whatever is in `description`.

    Args:
        model: A YAN or any other language model that generates. It is set to evaluation mode.
        rows: Mappings with "source" and "target".
        metrics: Names among `METRIC_NAMES`: exact_match, accuracy, token_f1, rouge, repetition, entropy, self_bleu,
            distinct, bert_score, semantic_distance and mauve.
        encoder: For BERTScore, semantic distance and MAUVE; each has its own default.
        judge: Name or folder of the autoregressive judge of generative perplexity, which is left out if None.
        compare: The folder of an earlier call for the same rows.

    Raises:
        ValueError: A metric that is unknown, a row without source and target, a prompt that is too long, or a
            comparison with other rows.
        FileNotFoundError: There are no predictions to compare with.
    """
    options = options or RunOptions()
    _check(rows, metrics)
    others = None if compare is None else read_predictions(compare, rows)
    sources, references = ([row[key] for row in rows] for key in ("source", "target"))
    functions = _functions(metrics, encoder, judge, sources)
    runs = run_model(model.eval(), tokenizer, sources, references, options)
    scored = [(run, *_score(run, references, *functions)) for run in runs]
    report = {**(description or {}), "num_rows": len(rows), "options": asdict(options), "runs": {}}
    for run, scores, figures in scored:
        report["runs"].setdefault(run.length, {})[run.decoding] = _summary(run, scores, figures)
    if others is not None:
        own = {(run.length, run.decoding): scores for run, scores, _ in scored}
        report["comparison"] = {"with": str(compare), "runs": compare_runs(own, others)}
    lines = [line for run, scores, _ in scored for line in _lines(run, scores, rows)]
    write_whole(
        Path(output) / "predictions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    write_whole(Path(output) / "metrics.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def compare_runs(own: Mapping[Any, Any], others: Mapping[Any, Any]) -> dict[str, Any]:
    """Paired tests, figure by figure, of runs over the same rows.

    Args:
        own, others: From (length, decoding) to the scores of each figure, (seeds, rows). A run is compared with the
            other's run of the same length and decoding or, where there is none, with its deterministic one.

    Returns:
        For each length and decoding of `own`, for each figure that both have: the mean "difference" own - other of
        the rows' means over the seeds, its bootstrap interval "low" and "high", the p-values "p_bootstrap" and
        "p_permutation" and, for scores of 0 and 1, "p_mcnemar" of the first seed's rows.
    """
    results: dict[str, Any] = {}
    for (length, decoding), scores in own.items():
        other_decoding = decoding if (length, decoding) in others else DETERMINISTIC
        other = others.get((length, other_decoding))
        if other is None:
            continue
        tests = {name: _paired_tests(scores[name], other[name]) for name in scores if name in other}
        results.setdefault(length, {})[decoding] = {"against": other_decoding, "metrics": tests}
    return results


def read_predictions(
    folder: str | os.PathLike[str], rows: Sequence[Row]
) -> dict[tuple[str, str], dict[str, np.ndarray[Any, Any]]]:
    """The scores (seeds, rows) of each figure of each (length, decoding) in a folder's `predictions.jsonl`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Its rows are not `rows`; the message names the first that differs.
    """
    path = Path(folder) / "predictions.jsonl"
    scores: dict[tuple[str, str], dict[str, dict[int, dict[int, float]]]] = {}
    # split at "\n" alone: a prediction may hold other characters that end a line for `splitlines`
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    num_rows = 1 + max((line["row"] for line in lines), default=-1)
    if num_rows != len(rows):
        raise ValueError(f"{path} has {num_rows} rows: must have {len(rows)} to be compared")
    for line in lines:
        row = rows[line["row"]]
        if (line["source"], line["target"]) != (row["source"], row["target"]):
            raise ValueError(f"{path}, row {line['row']}: source and target must be those of the rows compared")
        for name, score in line["scores"].items():
            run = scores.setdefault((line["length"], line["decoding"]), {}).setdefault(name, {})
            run.setdefault(line["seed"], {})[line["row"]] = score
    return {run: {name: _matrix(by_seed) for name, by_seed in figures.items()} for run, figures in scores.items()}


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text, one line a figure, and the paired tests behind it."""
    lines = []
    for length, decodings in report["runs"].items():
        for decoding, run in decodings.items():
            lines.append(f"\n{length} length, {decoding}, {run['num_seeds']} seed(s), {report['num_rows']} rows")
            lines += [f"  {name:24} {_cells(figure)}" for name, figure in run["metrics"].items()]
    comparison = report.get("comparison", {"runs": {}})
    for length, decodings in comparison["runs"].items():
        for decoding, tests in decodings.items():
            lines.append(f"\n{length} length, {decoding} minus {tests['against']} of {comparison['with']}")
            lines += [f"  {name:24} {_test_cells(test)}" for name, test in tests["metrics"].items()]
    return "\n".join(lines).lstrip("\n")


def _check(rows: Sequence[Row], metrics: Sequence[str]) -> None:
    unknown = [name for name in metrics if name not in METRIC_NAMES]
    if unknown:
        raise ValueError(f"metric {', '.join(unknown)}: must be among {', '.join(METRIC_NAMES)}")
    if not rows:
        raise ValueError("no rows: must be at least 1")
    for index, row in enumerate(rows):
        if not {"source", "target"} <= row.keys():
            raise ValueError(f"row {index} has the keys {sorted(row)}: must have source and target")


def _functions(metrics: Sequence[str], encoder: Any, judge: Any, sources: Sequence[str]) -> Functions:
    """Row metrics, set metrics, and the function for the judge or None, as the options ask for them.

    Models are loaded here, once, and what isn't installed is missed here, before anything is generated.
    """
    import_stats()
    of_rows: list[Metric] = [ROW_METRICS[name] for name in metrics if name in ROW_METRICS]
    of_sets: list[Metric] = [SET_METRICS[name] for name in metrics if name in SET_METRICS]
    if "bert_score" in metrics:
        of_tokens = load_token_encoder(encoder)
        of_rows.append(lambda texts, wanted: {"bert_score_f1": bert_scores(texts, wanted, of_tokens)["f1"]})
    if {"semantic_distance", "mauve"} & set(metrics):
        embed = load_sentence_encoder(encoder)
    if "semantic_distance" in metrics:
        of_rows.append(lambda texts, wanted: {"semantic_distance": semantic_distances(texts, wanted, embed)})
    if "mauve" in metrics:
        import_mauve()
        of_sets.append(lambda texts, wanted: {"mauve": mauve_score(texts, wanted, embed)})
    for function in of_rows:
        function(["a"], ["a"])
    if judge is None:
        return of_rows, of_sets, None
    loaded, own = load_judge(judge)
    return of_rows, of_sets, lambda texts: generative_perplexity(texts, loaded, own, sources)


def _score(
    run: Run,
    references: Sequence[str],
    of_rows: list[Metric],
    of_sets: list[Metric],
    judged: Callable[[list[str]], GenerativePerplexity] | None,
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Scores of each figure (seeds, rows), and the finished entries of the figures without scores of rows."""
    scores: dict[str, list[Any]] = {}
    values: dict[str, list[float]] = {}
    for result in run.passes:
        for function in of_rows:
            for name, column in function(result.texts, references).items():
                scores.setdefault(name, []).append(column)
        for function in of_sets:
            for name, value in function(result.texts, references).items():
                values.setdefault(name, []).append(value)
    figures = {name: _over_seeds(per_seed) for name, per_seed in values.items()}
    if judged is not None:
        figures |= _perplexity(run, judged)
    return {name: np.array(rows) for name, rows in scores.items()}, figures


def _summary(run: Run, scores: Mapping[str, np.ndarray[Any, Any]], figures: Mapping[str, Any]) -> dict[str, Any]:
    intervals = {}
    for name, matrix in scores.items():
        mean, low, high = mean_with_interval(matrix.mean(0))
        intervals[name] = {**_over_seeds(matrix.mean(1).tolist()), "mean": mean, "low": low, "high": high}
    speeds = [sum(result.num_tokens) / result.seconds for result in run.passes]
    tokens = [sum(result.num_tokens) / len(result.num_tokens) for result in run.passes]
    counts = {"tokens_per_second": _over_seeds(speeds), "tokens_per_row": _over_seeds(tokens)}
    return {"num_seeds": len(run.passes), "metrics": {**intervals, **figures, **counts}}


def _over_seeds(per_seed: Sequence[float]) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(per_seed)
    return {"mean": mean, "std": deviation, "per_seed": list(per_seed)}


def _perplexity(run: Run, judged: Callable[[list[str]], GenerativePerplexity]) -> dict[str, Any]:
    """Perplexity of all seeds' tokens together, its interval over rows, and that of each seed; none if no token."""
    if not any(text for result in run.passes for text in result.texts):
        return {}
    results = [judged(result.texts) for result in run.passes if any(result.texts)]
    sums = np.sum([result.negative_log_likelihoods for result in results], axis=0)
    tokens = np.sum([result.num_tokens for result in results], axis=0)
    counted = tokens > 0
    interval = mean_with_interval(sums[counted] / tokens[counted], weights=tokens[counted])
    mean, low, high = map(math.exp, interval)
    over_seeds = _over_seeds([result.perplexity for result in results])
    return {"generative_perplexity": {**over_seeds, "mean": mean, "low": low, "high": high}}


def _paired_tests(scores: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> dict[str, float]:
    a, b = scores.mean(0), other.mean(0)
    difference, low, high, p_bootstrap = paired_bootstrap(a, b)
    tests = {"difference": difference, "low": low, "high": high, "p_bootstrap": p_bootstrap}
    tests["p_permutation"] = paired_permutation_test(a, b)
    if np.isin(scores, (0, 1)).all() and np.isin(other, (0, 1)).all():
        tests["p_mcnemar"] = mcnemar_exact(scores[0], other[0])
    return tests


def _lines(run: Run, scores: Mapping[str, np.ndarray[Any, Any]], rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for seed, result in enumerate(run.passes):
        for index, row in enumerate(rows):
            yield {
                "length": run.length,
                "decoding": run.decoding,
                "seed": seed,
                "row": index,
                "source": row["source"],
                "target": row["target"],
                "prediction": result.texts[index],
                "num_tokens": result.num_tokens[index],
                "scores": {name: float(matrix[seed, index]) for name, matrix in scores.items()},
            }


def _matrix(by_seed: Mapping[int, Mapping[int, float]]) -> np.ndarray[Any, Any]:
    return np.array([[by_seed[seed][row] for row in sorted(by_seed[seed])] for seed in sorted(by_seed)])


def _cells(figure: Mapping[str, Any]) -> str:
    interval = f"{figure['low']:.3f} to {figure['high']:.3f}" if "low" in figure else ""
    deviation = "" if figure["std"] is None else f"std {figure['std']:.3f}"
    return f"{figure['mean']:10.3f}  {interval:20} {deviation}".rstrip()


def _test_cells(test: Mapping[str, Any]) -> str:
    p_values = "  ".join(f"{name} {value:.4f}" for name, value in test.items() if name.startswith("p_"))
    return f"{test['difference']:+10.3f}  {test['low']:+.3f} to {test['high']:+.3f}  {p_values}"
