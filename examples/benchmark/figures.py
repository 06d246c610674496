"""Figures of the benchmark's results: latency, throughput, speed-ups, and distance from the machine's limits.

    python examples/benchmark/figures.py --input outputs/speed.json outputs/lengths.json --folder docs/figures

Draws `speed_latency.png` where there are several lengths, `speed_throughput.png` where there are several batch sizes,
`speed_up.png` where the AR decoder was measured, and `speed_roofline.png` where parts were measured.
"""

import argparse
import json
from pathlib import Path

from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from modeling_yan.visualization import saved_figure

REFERENCE = "decoder"
PARTS = ("encoder", "trunk", "experts", "decoder")
LINES = ("-", "--", ":", "-.")
COLOURS = {"yan-transformer": "C0", "yan-mamba": "C2", "decoder": "C1", "encoder_decoder": "C8"}
COLOURS |= {"masked_diffusion": "C3", "naive-transformer": "C7", "naive-mamba": "C5"}


def family(name: str) -> str:
    """The model of a contender's name, without its steps or wastes."""
    return max((known for known in COLOURS if name.startswith(known)), key=len, default=name)


def measured(content: dict) -> list[dict]:
    """The cells that were run."""
    return [cell for cell in content["cells"] if "seconds" in cell]


def chosen(content: dict, patterns: list[str]) -> dict:
    """The content with the cells of models whose names begin with one of the patterns; all without any."""
    cells = [c for c in content["cells"] if not patterns or any(c["model"].startswith(p) for p in patterns)]
    return {**content, "cells": cells}


def joined(contents: list[dict]) -> dict:
    """The cells and parts of all contents, with the first one's settings; of what several have, the first one's."""
    kept = {"cells": {}, "parts": {}}
    for content in contents:
        for name, entries in kept.items():
            for entry in content[name]:
                key = entry["model"], entry["batch"], entry["length"]
                if key not in entries or "skipped" in entries[key]:
                    entries[key] = entry
    return {**contents[0], **{name: list(entries.values()) for name, entries in kept.items()}}


def series(cells: list[dict], axis: str, **fixed) -> dict[str, list[dict]]:
    """Cells of each contender along an axis ("length" or "batch"), ascending, where the other fields are fixed."""
    chosen = [cell for cell in cells if all(cell[name] == value for name, value in fixed.items())]
    names = dict.fromkeys(cell["model"] for cell in chosen)
    return {
        name: sorted((cell for cell in chosen if cell["model"] == name), key=lambda cell: cell[axis]) for name in names
    }


def without_naive(cells):
    return [cell for cell in cells if not cell["model"].startswith("naive")]


def draw_lines(ax, lines: dict[str, list[dict]], axis: str, value):
    """One line a contender; members of a family share the colour and differ in the marker."""
    seen = {}
    for name, cells in lines.items():
        index = seen[family(name)] = seen.get(family(name), -1) + 1
        style = {"color": COLOURS.get(family(name)), "marker": "osD^v"[index % 5], "linestyle": LINES[index % 4]}
        ax.plot([cell[axis] for cell in cells], [value(cell) for cell in cells], label=name, markersize=4, **style)
    ax.set(xscale="log", yscale="log")
    ticks = sorted({cell[axis] for cells in lines.values() for cell in cells})
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    label_decades(ax.yaxis)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def label_decades(axis):
    """Plain numbers at 1, 2 and 5 of every decade of a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def draw_latency(content: dict, ax):
    """Seconds of a call against new tokens, at the smallest batch."""
    cells = without_naive(measured(content))
    batch = min(cell["batch"] for cell in cells)
    draw_lines(ax, series(cells, "length", batch=batch), "length", lambda cell: cell["seconds"]["median"])
    ax.set(xlabel="new tokens", ylabel="seconds", title=f"Latency, batch {batch}\n{machine(content)}")


def draw_throughput(content: dict, ax):
    """Tokens per second against the batch size, at the length that most batch sizes were measured at."""
    cells = without_naive(measured(content))
    batches = {length: {c["batch"] for c in cells if c["length"] == length} for length in {c["length"] for c in cells}}
    length = max(batches, key=lambda length: (len(batches[length]), length))
    draw_lines(ax, series(cells, "batch", length=length), "batch", lambda cell: cell["tokens_per_s"])
    ax.set(
        xlabel="batch size", ylabel="tokens per second", title=f"Throughput, {length} new tokens\n{machine(content)}"
    )


def speed_ups(cells: list[dict]) -> dict[str, float]:
    """How many times faster than the reference every contender is, in cells of one batch size and length."""
    medians = {cell["model"]: cell["seconds"]["median"] for cell in cells}
    return {name: medians[REFERENCE] / median for name, median in medians.items()}


def reference_cell(content: dict) -> dict | None:
    """The cell of the reference by which speed-ups are shown: the smallest batch, of its lengths that next to 128."""
    cells = [cell for cell in measured(content) if cell["model"] == REFERENCE]
    return min(cells, key=lambda cell: (cell["batch"], abs(cell["length"] - 128)), default=None)


def draw_speed_ups(content: dict, ax):
    """Bars of the speed-up over the AR decoder."""
    at = reference_cell(content)
    same = [c for c in measured(content) if (c["batch"], c["length"]) == (at["batch"], at["length"])]
    ratios = dict(sorted(speed_ups(same).items(), key=lambda item: item[1]))
    bars = ax.barh(list(ratios), list(ratios.values()), color=[COLOURS.get(family(name), "C9") for name in ratios])
    ax.bar_label(bars, labels=[f"{ratio:.3g}x" for ratio in ratios.values()], padding=3, fontsize=7)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set(xscale="log", xlabel=f"times as fast as the AR decoder ({at['length']} new tokens, batch {at['batch']})")
    ax.margins(x=0.15)
    label_decades(ax.xaxis)
    ax.set_title(machine(content), fontsize=9)
    ax.tick_params(axis="y", labelsize=8)


def parts_of_one_size(content: dict) -> list[dict]:
    """The parts at the smallest batch size and, of the lengths that most models were measured at, that next to 128."""
    batch = min(entry["batch"] for entry in content["parts"])
    models = {}
    for entry in content["parts"]:
        if entry["batch"] == batch:
            models.setdefault(entry["length"], []).append(entry)
    return models[min(models, key=lambda length: (-len(models[length]), abs(length - 128)))]


def draw_roofline(content: dict, ax):
    """Measured seconds of YAN's parts beside the floor that bandwidth and peak set, at one batch size and length."""
    bars = [(entry, part) for entry in parts_of_one_size(content) for part in PARTS]
    places = range(len(bars))
    seconds = [entry[part]["seconds"]["median"] for entry, part in bars]
    floors = [entry[part]["floor"] for entry, part in bars]
    ax.bar([p - 0.2 for p in places], seconds, 0.4, label="measured", color="C0")
    ax.bar([p + 0.2 for p in places], floors, 0.4, label="floor", color="C7")
    for place, second, floor in zip(places, seconds, floors):
        ax.text(place, max(second, floor), f"{second / floor:.1f}x", ha="center", va="bottom", fontsize=8)
    labels = [f"{entry['model'].removeprefix('yan-')}\n{part}" for entry, part in bars]
    ax.set_xticks(list(places), labels, fontsize=7)
    limits = content["machine"]
    rates = f"{limits['bandwidth'] / 1e9:.1f} GB/s copied, {limits['peak'] / 1e9:.0f} GFLOP/s multiplied"
    entry = bars[0][0]
    ax.set(ylabel="seconds", title=f"Three steps, {entry['length']} new tokens, batch {entry['batch']}; {rates}")
    ax.title.set_fontsize(9)
    ax.legend()


def machine(content: dict) -> str:
    settings = content["settings"]
    threads = f", CPU threads: {content['machine']['threads']}" if settings["device"] == "cpu" else ""
    return f"{content['machine']['device']}{threads}, {settings['dtype']}, prompt {settings['prompt_length']}"


def figures_of(content: dict) -> dict:
    """The drawing functions that there are results for, by file name."""
    cells, names = measured(content), {}
    if len({cell["length"] for cell in cells}) > 1:
        names["speed_latency"] = draw_latency
    if len({cell["batch"] for cell in cells}) > 1:
        names["speed_throughput"] = draw_throughput
    if reference_cell(content):
        names["speed_up"] = draw_speed_ups
    if content["parts"]:
        names["speed_roofline"] = draw_roofline
    return names


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, default=[Path("outputs/speed.json")], help="the first wins")
    parser.add_argument("--join", action="store_true", help="draw the inputs, of one machine, as if they were one run")
    parser.add_argument("--models", nargs="*", default=[], help="beginnings of names, such as yan-mamba; default: all")
    parser.add_argument("--folder", type=Path, default=Path("outputs"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    contents = [chosen(json.loads(path.read_text()), options.models) for path in options.input]
    for content in [joined(contents)] if options.join else reversed(contents):
        for name, draw in figures_of(content).items():
            with saved_figure(options.folder / f"{name}.png", 8, 4.5, dpi=150, bbox_inches="tight") as figure:
                draw(content, figure.subplots())
            print(options.folder / f"{name}.png")


if __name__ == "__main__":
    main()
