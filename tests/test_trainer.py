"""transformers' own Trainer and Seq2SeqTrainer train and evaluate the flow model as they are."""

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_yan import YanForFlowGeneration
from modeling_yan.data import train_tokenizer

SENTENCES = ["The cat sat on the mat.", "Where is the dog?", "Mary is in the garden.", "John has the red apple."]

SMALL = {"num_encoder_layers": 1, "num_flow_layers": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES * 4, vocab_size=300)


@pytest.fixture
def rows(tokenizer) -> list[dict[str, list[int]]]:
    """Sixteen examples of several lengths: a sentence, and its first words as the target."""
    examples = []
    for text in SENTENCES * 4:
        encoded = tokenizer(text)
        examples.append({**encoded, "labels": encoded["input_ids"][: len(text) % 3 + 2]})
    return examples


@pytest.fixture
def model(make_model, tokenizer) -> YanForFlowGeneration:
    return make_model(vocab_size=len(tokenizer), **SMALL)


class Losses(TrainerCallback):
    """Keeps the logged losses."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def of(self, name) -> list[float]:
        return [log[name] for log in self.logs if name in log]


def make_trainer(trainer_class, model, tokenizer, rows, tmp_path, **options):
    arguments_class = Seq2SeqTrainingArguments if trainer_class is Seq2SeqTrainer else TrainingArguments
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3}
    defaults |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3}
    losses = Losses()
    trainer = trainer_class(
        model=model,
        args=arguments_class(output_dir=str(tmp_path), **{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=rows[:7],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=[losses],
    )
    return trainer, losses


def test_the_trainer_trains(model, tokenizer, rows, tmp_path):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    options = {"max_steps": 30, "learning_rate": 1e-2}
    trainer, losses = make_trainer(Trainer, model, tokenizer, rows, tmp_path, **options)
    trainer.train()
    logged = losses.of("loss")
    assert len(logged) == 30
    assert sum(logged[-5:]) < 0.8 * sum(logged[:5])
    moved = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {"model", "flow", "decoder", "lm_head"}


@pytest.mark.parametrize("frozen", ["freeze_encoder", "freeze_decoder"])
def test_frozen_parts_stay_as_they_are(make_model, tokenizer, rows, tmp_path, frozen):
    model = make_model(vocab_size=len(tokenizer), **SMALL, freeze_embeddings=True, **{frozen: True})
    part = model.model if frozen == "freeze_encoder" else model.decoder
    before = {name: parameter.clone() for name, parameter in part.named_parameters()}
    trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, max_steps=2)
    trainer.train()
    assert all(parameter.equal(before[name]) for name, parameter in part.named_parameters())


def test_accumulation_leaves_the_logged_loss_alone(make_model, tokenizer, rows, tmp_path):
    logged = []
    for accumulation in (1, 4):
        model = make_model(vocab_size=len(tokenizer), **SMALL)
        options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation}
        trainer, losses = make_trainer(Trainer, model, tokenizer, rows, tmp_path, max_steps=1, **options)
        trainer.train()
        logged.append(losses.of("loss")[0])
    assert logged[1] == pytest.approx(logged[0], rel=0.1)


def test_evaluation_gives_the_mean_loss_and_the_logits(model, tokenizer, rows, tmp_path):
    trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, per_device_eval_batch_size=7)
    batch = DataCollatorForSeq2Seq(tokenizer)(rows[:7])
    with torch.no_grad():
        expected = model(**batch)
    predictions = trainer.predict(rows[:7])
    assert predictions.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert isinstance(predictions.predictions, type(predictions.label_ids))
    torch.testing.assert_close(torch.tensor(predictions.predictions), expected.logits, atol=1e-5, rtol=1e-5)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_resuming_gives_the_weights_of_an_unbroken_run(make_model, tokenizer, rows, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_model(vocab_size=len(tokenizer), **SMALL)
    make_trainer(Trainer, whole, tokenizer, rows, tmp_path, **options)[0].train()
    resumed = make_model(vocab_size=len(tokenizer), **SMALL)
    trainer, _ = make_trainer(Trainer, resumed, tokenizer, rows, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    weights = whole.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in resumed.state_dict().items())


def written(model, tokenizer, rows, **options) -> torch.LongTensor:
    """What `generate` writes for the prompts of the rows."""
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    del batch["labels"]
    return model.eval().generate(**batch, **options)


def test_seq2seq_evaluation_writes_text(model, tokenizer, rows, tmp_path):
    model.generation_config.return_prompt = False
    seen = []

    def compute_metrics(prediction):
        seen.append(torch.tensor(prediction.predictions))
        return {"rows": len(prediction.predictions)}

    options = {"predict_with_generate": True, "per_device_eval_batch_size": 4}
    trainer, _ = make_trainer(Seq2SeqTrainer, model, tokenizer, rows, tmp_path, max_steps=2, **options)
    trainer.compute_metrics = compute_metrics
    trainer.train()
    expected = written(model, tokenizer, rows[:7])
    # The trainer changes the model's generation config after the first batch; nothing may come of it.
    for _ in range(2):
        assert trainer.evaluate()["eval_rows"] == 7
        assert torch.equal(seen[-1][:, : expected.shape[1]], expected)
    assert torch.equal(written(model, tokenizer, rows[:7]), expected)


def test_seq2seq_options_reach_generate(model, tokenizer, rows, tmp_path):
    model.generation_config.return_prompt = False
    expected = written(model, tokenizer, rows[:7], max_new_tokens=3)
    trainer, _ = make_trainer(Seq2SeqTrainer, model, tokenizer, rows, tmp_path, predict_with_generate=True)
    predictions = trainer.predict(rows[:7], max_new_tokens=3).predictions
    assert torch.equal(torch.tensor(predictions)[:, :3], expected)


def test_a_model_saved_after_an_evaluation_writes_the_same(model, tokenizer, rows, tmp_path):
    expected = written(model, tokenizer, rows[:7])
    trainer, _ = make_trainer(Seq2SeqTrainer, model, tokenizer, rows, tmp_path, predict_with_generate=True)
    trainer.predict(rows[:7])
    trainer.save_model()
    loaded = YanForFlowGeneration.from_pretrained(tmp_path)
    assert torch.equal(written(loaded, tokenizer, rows[:7]), expected)
