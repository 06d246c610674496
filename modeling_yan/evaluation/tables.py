"""Several models on the same rows: each evaluated into a folder of its own, all of them in one table."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..data.rows import write_whole
from .reports import Row, evaluate_task
from .runs import RunOptions, load_for_generation

TABLE_FIGURES = ("exact_match", "token_f1", "rougeL", "distinct_2", "tokens_per_row", "tokens_per_second")


def evaluate_models(
    names: Sequence[str],
    rows: Sequence[Row],
    output: str | os.PathLike[str],
    options: RunOptions | None = None,
    baseline: str | None = None,
    device: str = "cpu",
    description: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Evaluate every model with the same options, and write `table.json` and `table.md` into the folder `output`.

    Args:
        names: Folders or hub names. A model's report goes into `output`/(last part of its name).
        baseline: One of `names`; all others get the paired tests against it.
        settings: Those of `evaluate_task`: metrics, encoder, judge.

    Returns:
        From the last part of each name to its report, the baseline first.

    Raises:
        ValueError: Two names with the same last part, or a baseline that is none of them.
    """
    labels = {Path(name).name: name for name in names}
    if len(labels) < len(names):
        raise ValueError(f"models {', '.join(names)}: the last parts of their names must differ")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline={baseline!r}: must be one of the models, {', '.join(names)}")
    reference = None if baseline is None else Path(output) / Path(baseline).name
    reports = {}
    for label, name in sorted(labels.items(), key=lambda item: item[1] != baseline):
        model, tokenizer = load_for_generation(name, device), AutoTokenizer.from_pretrained(name)
        about = {**(description or {}), "model": name, "device": device, "num_parameters": model.num_parameters()}
        compare = None if name == baseline else reference
        settings_of_model = {**settings, "compare": compare, "description": about}
        reports[label] = evaluate_task(model, tokenizer, rows, Path(output) / label, options, **settings_of_model)
    write_whole(Path(output) / "table.json", json.dumps(table_rows(reports), indent=1) + "\n")
    write_whole(Path(output) / "table.md", format_table(reports) + "\n")
    return reports


def table_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per model, length and decoding: its figures, and its difference to the baseline with the p-value."""
    rows = []
    for label, report in reports.items():
        tests = report.get("comparison", {"runs": {}})["runs"]
        for length, decodings in report["runs"].items():
            for decoding, run in decodings.items():
                own = {"model": label, "parameters": report.get("num_parameters"), "length": length}
                against = tests.get(length, {}).get(decoding, {"metrics": {}})["metrics"]
                rows.append({**own, "decoding": decoding, "figures": run["metrics"], "against_baseline": against})
    return rows


def format_table(reports: Mapping[str, Mapping[str, Any]], figures: Sequence[str] = TABLE_FIGURES) -> str:
    """The table in Markdown: mean, ± deviation over seeds, 95% interval over rows; exact match minus the baseline's.

    Rows are grouped by length, so that a model stands beside the others that knew as much as it did.
    """
    rows = table_rows(reports)
    figures = [name for name in figures if any(name in row["figures"] for row in rows)]
    head = ["length", "model", "decoding", "parameters", *figures]
    compared = any(row["against_baseline"] for row in rows)
    head += ["exact match minus baseline (p)"] * compared
    lines = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda row: row["length"]):
        cells = [row["length"], row["model"], row["decoding"], _count(row["parameters"])]
        cells += [_figure(row["figures"].get(name)) for name in figures]
        lines.append(cells + [_test(row["against_baseline"].get("exact_match"))] * compared)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    digits = 0 if figure["mean"] >= 100 and math.isfinite(figure["mean"]) else 3
    spread = f" ± {figure['std']:.{digits}f}" if figure.get("std") is not None else ""
    interval = f" ({figure['low']:.3f} to {figure['high']:.3f})" if "low" in figure else ""
    return f"{figure['mean']:.{digits}f}{spread}{interval}"


def _test(test: Mapping[str, Any] | None) -> str:
    return "" if test is None else f"{test['difference']:+.3f} ({test['p_permutation']:.4f})"
