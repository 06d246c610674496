"""Figures are drawn from what was measured, and from nothing else."""

import json

import figures
import pytest


def cell(model, length, batch, seconds):
    timing = {"median": seconds, "low": seconds, "high": seconds, "all": [seconds]}
    return {
        "model": model,
        "length": length,
        "batch": batch,
        "seconds": timing,
        "tokens_per_s": length * batch / seconds,
    }


@pytest.fixture
def content():
    part = {"seconds": {"median": 0.2}, "floor": 0.1, "flops": 1.0, "bytes": 1.0}
    cells = [cell(*key, 0.001 * key[1]) for key in [("yan-transformer-3", n, b) for n in (32, 128) for b in (1, 4)]]
    cells += [cell("decoder", length, 1, 0.02 * length) for length in (32, 128)]
    cells += [{"model": "decoder", "length": 128, "batch": 4, "skipped": "predicted to take 90 s a call"}]
    return {
        "machine": {"device": "a processor", "threads": 2, "bandwidth": 1e10, "peak": 1e11},
        "settings": {"device": "cpu", "dtype": "float32", "prompt_length": 64},
        "cells": cells,
        "parts": [{"model": "yan-transformer", "batch": 1, "length": 128, **dict.fromkeys(figures.PARTS, part)}],
    }


def test_all_figures_are_drawn(content, tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(content))
    figures.main(["--input", str(path), "--folder", str(tmp_path)])
    names = {file.stem for file in tmp_path.glob("*.png")}
    assert names == {"speed_latency", "speed_throughput", "speed_up", "speed_roofline"}


def test_a_figure_without_results_is_not_drawn(content):
    content["cells"] = [
        c for c in content["cells"] if c["model"] != "decoder" and (c["length"], c["batch"]) == (32, 1)
    ]
    content["parts"] = []
    assert figures.figures_of(content) == {}


def test_speed_ups_are_ratios_of_medians_at_one_batch_and_length(content):
    assert figures.reference_cell(content)["length"] == 128
    cells = [c for c in figures.measured(content) if (c["batch"], c["length"]) == (1, 128)]
    assert figures.speed_ups(cells) == {"yan-transformer-3": pytest.approx(20), "decoder": 1}


def test_skipped_cells_are_no_points(content):
    lines = figures.series(figures.measured(content), "batch", length=128)
    assert [c["batch"] for c in lines["decoder"]] == [1]
    assert [c["batch"] for c in lines["yan-transformer-3"]] == [1, 4]


def test_of_what_is_in_several_files_the_first_one_s_counts(content):
    again = {**content, "cells": [cell("decoder", 128, 1, 9.0), cell("decoder", 512, 1, 20.0)], "parts": []}
    times = {
        c["length"]: c["seconds"]["median"]
        for c in figures.series(figures.measured(figures.joined([content, again])), "length", batch=1)["decoder"]
    }
    assert times == {32: 0.64, 128: 2.56, 512: 20.0}


def test_parts_beside_one_another_are_of_one_size(content):
    (part,) = content["parts"]
    others = [("yan-transformer", 1, 512), ("yan-mamba", 1, 512), ("yan-mamba", 4, 128), ("yan-mamba", 1, 64)]
    content["parts"] += [{**part, "model": model, "batch": batch, "length": length} for model, batch, length in others]
    assert [(e["model"], e["length"]) for e in figures.parts_of_one_size(content)] == [
        ("yan-transformer", 512),
        ("yan-mamba", 512),
    ]
    content["parts"].pop(2)
    assert [(e["model"], e["length"]) for e in figures.parts_of_one_size(content)] == [("yan-transformer", 128)]
