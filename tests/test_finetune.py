"""The fine-tuning script as a newcomer runs it, on a bundled checkpoint and a file of pairs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from modeling_yan.data import generate_stories, write_rows

ROOT = Path(__file__).parents[1]


def run(*arguments) -> str:
    command = [sys.executable, ROOT / "examples" / "finetune.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("yan-transformer-tiny", []), ("yan-mamba-tiny", ["--lora"])])
def test_finetuning_improves_the_loss_and_saves_what_it_trained(tmp_path, name, options):
    train_file, output = tmp_path / "pairs.jsonl", tmp_path / "output"
    stories = generate_stories(8, seed=5, max_sentences=3, answer_slot="<mask>" * 8 + " ")
    write_rows(train_file, [{**row, "target": row["kind"]} for row in stories])  # a task that the model can't do yet
    command = [
        "--train_file",
        train_file,
        *options,
        "--validation_file",
        train_file,
        "--model",
        ROOT / "examples" / "checkpoints" / name,
    ]
    command += ["--output_dir", output, "--max_steps", "4", "--learning_rate", "1e-3", "--warmup_steps", "0"]
    command += ["--per_device_train_batch_size", "8", "--use_cpu", "--save_strategy", "no", "--report_to", "none"]
    printed = run(*command)
    before, after = next(line for line in printed.splitlines() if line.startswith("eval_loss")).split()[1::2]
    assert float(after) < float(before)
    scores = json.loads((output / "eval_results.json").read_text())
    assert 0 <= scores["eval_exact_match"] <= scores["eval_rouge_l"] <= 1
    assert scores["eval_loss"] == pytest.approx(float(after), abs=1e-4)
    assert (output / ("adapter_model.safetensors" if options else "model.safetensors")).exists()
    assert (output / "tokenizer.json").exists()


@pytest.mark.slow
def test_a_new_model_on_a_pretrained_encoder(tmp_path):
    train_file, encoder, output = tmp_path / "pairs.jsonl", tmp_path / "encoder", tmp_path / "output"
    rows = [
        {"source": row["source"], "target": row["target"]} for row in generate_stories(12, seed=5, max_sentences=2)
    ]
    write_rows(train_file, rows)
    texts = " ".join(row["source"] + " " + row["target"] for row in rows).lower()
    words = sorted({word.strip(".?,") for word in texts.split()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", ",", ":", *words]
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=96, **sizes)).save_pretrained(encoder)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(encoder)
    command = ["--train_file", train_file, "--validation_file", train_file, "--encoder", encoder]
    command += ["--output_dir", output, "--num_train_epochs", "6", "--learning_rate", "3e-3", "--warmup_steps", "0"]
    command += ["--fields", '{"num_flow_layers": 1}', "--per_device_train_batch_size", "4"]
    printed = run(*command, "--use_cpu", "--report_to", "none")
    before, after = next(line for line in printed.splitlines() if line.startswith("eval_loss")).split()[1::2]
    assert float(after) < 0.6 * float(before)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    tokens = model.generate(**tokenizer(rows[0]["source"], return_tensors="pt"), return_prompt=False)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True)
