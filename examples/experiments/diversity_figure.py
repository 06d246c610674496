r"""Draw how good texts are against how alike they are, from the tables of `tasks.py`: a panel for each task.

python examples/experiments/diversity_figure.py docs/results/{multi30k,e2e}/table.json \
    --output docs/figures/diversity.svg

A point is the mean over training seeds of BLEU of one drawn text and self-BLEU of four, at one temperature. A star is
the text that an arm generates without sampling, which is the same every time.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from results_page import TITLES, final_figures

from modeling_yan.visualization import saved_figure

ARMS = {  # colour and line
    "AR decoder": ("black", "-"),
    "YAN, sixteen experts, graph": ("tab:blue", "-"),
    "YAN, one expert, graph": ("tab:blue", "--"),
    "one pass with a graph": ("tab:blue", ":"),
    "YAN, sixteen experts, CRF": ("tab:orange", "-"),
    "YAN, one expert, CRF": ("tab:orange", "--"),
    "one pass with a CRF": ("tab:orange", ":"),
}
LABELLED = ("AR decoder", "YAN, sixteen experts, graph", "YAN, sixteen experts, CRF")  # with their temperatures
ALIKE = 100  # self-BLEU of equal texts


def points_of(runs: dict) -> dict[str, tuple[float, float]]:
    """Mean self-BLEU and BLEU of one arm's runs by temperature, the highest first."""
    temperatures = sorted({name for run in runs.values() for name in run.get("drawn", {})}, key=float, reverse=True)
    found = {}
    for name in temperatures:
        drawn = [run["drawn"][name] for run in runs.values() if name in run.get("drawn", {})]
        found[name] = tuple(float(np.mean([each[key] for each in drawn])) for key in ("self_bleu", "bleu"))
    return found


def draw_panel(axes, table: dict) -> None:
    for arm, (color, line) in ARMS.items():
        points = points_of(table["runs"].get(arm, {}))
        if not points:
            continue
        axes.plot(*zip(*points.values(), strict=True), line, marker="o", markersize=4, color=color, label=arm)
        for temperature, point in points.items() if arm in LABELLED else ():
            axes.annotate(
                f"{float(temperature):g}", point, (0, 5), textcoords="offset points", color=color, fontsize=7
            )
        axes.plot(ALIKE, np.mean(final_figures(table["runs"], arm, "best", "bleu")), "*", markersize=9, color=color)
    axes.set_title(TITLES[table["task"]])
    axes.set_xlabel("self-BLEU of four drawn texts (less is more diverse)")
    axes.set_ylabel("BLEU of one text (more is better)")
    axes.grid(alpha=0.3)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    saved = saved_figure(options.output, 11, 4.6, metadata={"Date": None})  # the same file from the same numbers
    with matplotlib.rc_context({"svg.hashsalt": "yan"}), saved as figure:
        panels = figure.subplots(1, len(options.tables), squeeze=False)[0]
        for axes, path in zip(panels, options.tables, strict=True):
            draw_panel(axes, json.loads(path.read_text()))
        shown = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        names = [arm for arm in ARMS if arm in shown]
        figure.legend([shown[arm] for arm in names], names, loc="outside lower center", ncols=4, frameon=False)


if __name__ == "__main__":
    main()
