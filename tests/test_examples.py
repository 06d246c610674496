"""The examples run as a newcomer would run them, from the bundled checkpoints alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKPOINTS = sorted((ROOT / "examples" / "checkpoints").iterdir())


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_quickstart_shows_three_drafts_of_every_answer_of_both_models():
    output = run("quickstart.py")
    assert "yan-transformer-tiny: 3.0 million" in output
    assert "yan-mamba-tiny: 2.8 million" in output
    assert output.count("step 3") == output.count("step 1") == 2 * 6
    assert output.count("original") == 2 * 9
    assert output.count("filled") == 2 * 3
    assert "step 4" not in output


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_bundled_checkpoint_is_small_and_whole(folder):
    assert (folder / "model.safetensors").stat().st_size < 12e6
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= set(os.listdir(folder))


@pytest.mark.slow
def test_evaluation_gives_every_score_with_interval_and_baseline(tmp_path):
    figures = tmp_path / "figures.json"
    run("evaluate_checkpoint.py", "--model", CHECKPOINTS[-1], "--num_rows", 100, "--output", figures)
    scores = json.loads(figures.read_text())["3"]
    (mean, low, high), (baseline, *_), (gain, *_) = scores["stories: exact match"]
    assert 0 <= low <= mean <= high <= 1
    assert mean > 0.8 > baseline + 0.4  # a constant answer hardly ever fits
    assert abs(gain - (mean - baseline)) < 1e-6
