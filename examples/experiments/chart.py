"""Draw the tables of compare.py, arms.py or join.py: one panel a table, one bar a model, with 95% intervals.

    python examples/experiments/chart.py results/four/stories results/four/infilling --figures exact_match rougeL \
        --output four.png

Every folder holds a table.json; its name is the panel's title. `--figures` are the figures shown, one for all tables
or one for each. The bars show `--length` "free", where the model finds the length itself, or "oracle", and of a model
that can do both, its deterministic texts.
"""

import argparse
import json
from pathlib import Path


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


def draw(panels: list[tuple[str, str, dict[str, dict[str, float]]]], path: Path):
    """Panels of title, figure and bars, side by side; a model has the same colour in all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(model for _, _, bars in panels for model in bars))
    colors = {model: pyplot.get_cmap("tab10")(index % 10) for index, model in enumerate(models)}
    size = (1.2 + (0.8 + 0.55 * len(models)) * len(panels), 3.8)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, name, bars) in zip(axes[0], panels):
        means = [bar["mean"] for bar in bars.values()]
        errors = [[abs(bar[end] - bar["mean"]) for bar in bars.values()] for end in ("low", "high")]
        axis.bar(list(bars), means, yerr=errors, capsize=3, color=[colors[model] for model in bars])
        axis.tick_params(axis="x", rotation=60)
        axis.set(title=title, ylabel=name.replace("_", " "))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="folders with table.json")
    parser.add_argument("--figures", nargs="+", default=["exact_match"], help="one for all tables, or one for each")
    parser.add_argument("--length", default="free", choices=("free", "oracle"))
    parser.add_argument("--output", type=Path, required=True, help="a .png")
    options = parser.parse_args(arguments)
    if len(options.figures) not in (1, len(options.tables)):
        parser.error(f"figures={options.figures}: must be 1 or {len(options.tables)}, as many as tables")
    figures = options.figures * (len(options.tables) if len(options.figures) == 1 else 1)
    bars = [read_bars(*each, options.length) for each in zip(options.tables, figures)]
    draw([(folder.name, *each) for folder, *each in zip(options.tables, figures, bars)], options.output)


if __name__ == "__main__":
    main()
