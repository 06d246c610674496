"""Draw tables of compare.py, ablate.py or merge_reports.py: one panel a table, one bar a model, with 95% intervals.

    python examples/experiments/chart.py results/four/stories results/four/infilling --figures exact_match rougeL \
        --output four.png
    python examples/experiments/chart.py docs/results.md --section "Last words alone" --output words.png

Every folder holds a table.json; its name is the panel's title. `--figures` are the figures shown, one for all tables
or one for each. The bars show `--length` "free", where the model finds the length itself, or "oracle", and of a model
that can do both, its deterministic texts. With `--section`, the first table of that section of a Markdown page: one
panel a column ("stories: exact match"), one bar a row, cells of "0.95" or "0.95 (0.93 to 0.96)"; differences and
words are left out.
"""

import argparse
import json
import math
import re
from pathlib import Path

from modeling_yan.visualization import saved_figure

MEASURED = re.compile(r"(\d+\.\d+)(?: \((\d+\.\d+) to (\d+\.\d+)\))?")
MARKUP = str.maketrans("", "", "*`")
LONGEST_LABEL = 24
WIDEST = 20  # inches of panels side by side


def read_bars(folder: Path, figure: str, length: str) -> dict[str, dict[str, float]]:
    """From each model of a table to mean, low and high of a figure.

    Raises:
        ValueError: A figure that the table does not have.
    """
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    rows = [row for row in table if row["length"] == length and row["decoding"] == "deterministic"]
    known = sorted({name for row in rows for name, value in row["figures"].items() if "low" in value})
    if figure not in known:
        raise ValueError(f"{folder / 'table.json'}: figure {figure!r} must be one of {', '.join(known)}")
    return {row["model"]: row["figures"][figure] for row in rows}


def read_section(page: Path, section: str) -> list[tuple[str, str, dict[str, dict[str, float]]]]:
    """The panels of a section's first table: title, figure, and bars with mean and, where the cell has them, ends.

    Raises:
        ValueError: A section that the page does not have, or one without a table of figures.
    """
    parts = re.split(r"^##+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    if section not in sections:
        raise ValueError(f"{page}: section {section!r} must be one of {', '.join(sections)}")
    table = re.search(r"(?:^\|.*\|\n)+", sections[section] + "\n", flags=re.MULTILINE)
    rows = [line[1:-1].split("|") for line in table[0].translate(MARKUP).splitlines()] if table else [[]]
    panels = []
    for column, header in enumerate(rows[0][1:], start=1):
        title, _, figure = header.strip().partition(": ")
        bars = {}
        for row in rows[2:]:
            cell = MEASURED.fullmatch(row[column].strip()) if column < len(row) else None
            if cell:
                bars[row[0].strip()] = {n: float(v) for n, v in zip(("mean", "low", "high"), cell.groups()) if v}
        panels += [(title, figure or title, bars)] if bars else []
    if not panels:
        raise ValueError(f"{page}: section {section!r} has no table of figures")
    return panels


def draw(panels: list[tuple[str, str, dict[str, dict[str, float]]]], path: Path):
    """Panels of title, figure and bars, as many side by side as have room; a model has one colour in all of them."""
    from matplotlib import colormaps

    models = list(dict.fromkeys(model for _, _, bars in panels for model in bars))
    colors = {model: colormaps["tab10"](index % 10) for index, model in enumerate(models)}
    labelled, handles = max(map(len, models)) <= LONGEST_LABEL, {}  # longer names stand in a legend
    width = 0.8 + 0.55 * len(models)  # of a panel, in inches
    lines = math.ceil(width * len(panels) / WIDEST)
    columns = math.ceil(len(panels) / lines)
    with saved_figure(path, 1.2 + width * columns, 3.8 * lines) as figure:
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (title, name, bars) in zip(axes.flat, panels):
            means = [bar["mean"] for bar in bars.values()]
            errors = [[abs(bar.get(end, math.nan) - bar["mean"]) for bar in bars.values()] for end in ("low", "high")]
            drawn = axis.bar(list(bars), means, yerr=errors, capsize=3, color=[colors[model] for model in bars])
            handles.update(zip(bars, drawn))
            axis.tick_params(axis="x", rotation=60, labelbottom=labelled)
            axis.set(title=title, ylabel=name.replace("_", " "))
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
        if not labelled:
            handles = {model: handles[model] for model in models}
            figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="folders with table.json, or one page")
    parser.add_argument("--section", help="of the page, whose table is drawn")
    parser.add_argument("--figures", nargs="+", default=["exact_match"], help="one for all tables, or one for each")
    parser.add_argument("--length", default="free", choices=("free", "oracle"))
    parser.add_argument("--output", type=Path, required=True, help="a .png")
    options = parser.parse_args(arguments)
    if options.section is not None:
        if len(options.tables) != 1:
            parser.error(f"section={options.section}: needs one page, not {len(options.tables)}")
        panels = read_section(options.tables[0], options.section)
    else:
        if len(options.figures) not in (1, len(options.tables)):
            parser.error(f"figures={options.figures}: must be 1 or {len(options.tables)}, as many as tables")
        figures = options.figures * (len(options.tables) if len(options.figures) == 1 else 1)
        panels = [
            (path.name, name, read_bars(path, name, options.length)) for path, name in zip(options.tables, figures)
        ]
    draw(panels, options.output)


if __name__ == "__main__":
    main()
