"""Rows as a person has them, context and question, can be learned from without any marks of the model's own."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from modeling_yan.data import FlowCollator, generate_stories
from modeling_yan.evaluation import generate_answers

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yan-transformer-tiny", "yan-mamba-tiny"])
def test_a_short_training_on_plain_rows_keeps_the_model_right(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    rows = [{key: row[key] for key in ("source", "target")} for row in generate_stories(8, seed=5, max_sentences=3)]
    assert not any(tokenizer.mask_token in row["source"] for row in rows)

    def exact(model):
        answers = generate_answers(model.eval(), tokenizer, [row["source"] for row in rows])
        return sum(answer == row["target"] for answer, row in zip(answers, rows, strict=True)) / len(rows)

    assert exact(model) >= 0.8
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-4, "use_cpu": True}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
    settings = TrainingArguments(str(tmp_path), **options)
    Trainer(model, settings, FlowCollator(tokenizer, model=model), rows).train()
    assert exact(model) >= 0.8
    assert torch.isfinite(next(model.parameters())).all()
