"""The fine-tuning script as a newcomer runs it, on a bundled checkpoint and a file of pairs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_yan.data import generate_stories, write_rows

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("yan-transformer-tiny", []), ("yan-mamba-tiny", ["--lora"])])
def test_finetuning_improves_the_loss_and_saves_what_it_trained(tmp_path, name, options):
    train_file, output = tmp_path / "pairs.jsonl", tmp_path / "output"
    stories = generate_stories(8, seed=5, max_sentences=3, answer_slot="<mask>" * 8 + " ")
    write_rows(train_file, [{**row, "target": row["kind"]} for row in stories])  # a task that the model can't do yet
    command = [sys.executable, ROOT / "examples" / "finetune.py", "--train_file", train_file, *options]
    command += ["--validation_file", train_file, "--model", ROOT / "examples" / "checkpoints" / name]
    command += ["--output_dir", output, "--max_steps", "4", "--learning_rate", "1e-3", "--warmup_steps", "0"]
    command += ["--per_device_train_batch_size", "8", "--use_cpu", "--save_strategy", "no", "--report_to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=True
    ).stdout
    before, after = next(line for line in printed.splitlines() if line.startswith("eval_loss")).split()[1::2]
    assert float(after) < float(before)
    scores = json.loads((output / "eval_results.json").read_text())
    assert 0 <= scores["eval_exact_match"] <= scores["eval_rouge_l"] <= 1
    assert scores["eval_loss"] == pytest.approx(float(after), abs=1e-4)
    assert (output / ("adapter_model.safetensors" if options else "model.safetensors")).exists()
    assert (output / "tokenizer.json").exists()
