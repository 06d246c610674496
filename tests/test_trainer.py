"""transformers' own Trainer and Seq2SeqTrainer train and evaluate the models as they are."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from modeling_yan import YanForAutoencoding, YanForFlowGeneration
from modeling_yan.data import AutoencoderCollator, FlowCollator, train_tokenizer
from modeling_yan.evaluation import exact_match
from modeling_yan.trainer_yan import RunningMeans

SENTENCES = ["The cat sat on the mat.", "Where is the dog?", "Mary is in the garden.", "John has the red apple."]

SMALL = {"num_encoder_layers": 1, "num_flow_layers": 1}

FLOW_TERMS = {"nll_loss", "nll_loss_per_dim", "mse_loss", "ce_loss", "gate_entropy", "load_balance_loss"}


@pytest.fixture
def variant():
    """Trainers know nothing of mixers."""
    return "both"


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


@pytest.mark.parametrize("fields", [{}, {"train_expert_choice": "posterior", "expert_scope": "sequence"}])
def test_evaluation_gives_one_number_whatever_the_batch(make_model, tokenizer, rows, tmp_path, fields):
    model = make_model(vocab_size=len(tokenizer), **SMALL, initializer_range=0.2, **fields)
    rows = [{**row, "labels": row["labels"] + [7 + index]} for index, row in enumerate(rows)]
    results = []
    for size, order in ((1, rows), (3, rows), (16, rows[::-1]), (16, rows + rows)):
        trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, per_device_eval_batch_size=size)
        metrics = trainer.evaluate(order)
        results.append([metrics[name] for name in metrics if "loss" in name or "entropy" in name])
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-4)
    alone = {trainer.evaluate([row])["eval_loss"] for row in rows}
    assert len(alone) == len(rows)


def test_predictions_stand_where_the_labels_stand(model, tokenizer, rows, tmp_path):
    trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, per_device_eval_batch_size=7)
    results = []
    for padding_side in ("right", "left"):
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = padding_side
        trainer.data_collator = DataCollatorForSeq2Seq(tokenizer)
        logits, labels = map(torch.tensor, trainer.predict(rows[:7])[:2])
        results.append(logits[labels != -100])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def recombined(config, terms) -> float:
    """The objective from its logged terms."""
    weighted = sum(getattr(config, f"{name}_weight") * terms[f"{name}_loss"] for name in ("mse", "ce", "load_balance"))
    return (
        weighted + config.nll_weight * terms["nll_loss_per_dim"] - config.gate_entropy_weight * terms["gate_entropy"]
    )


def test_every_log_has_the_means_of_the_loss_terms_over_all_passes_since_the_last(model, tokenizer, rows, tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 2}
    trainer, logs = make_trainer(Trainer, model, tokenizer, rows, tmp_path, **options)
    passes = []
    handle = model.register_forward_hook(lambda module, args, outputs: passes.append(outputs.ce_loss.item()))
    trainer.train()
    handle.remove()
    assert len(passes) == 8
    assert logs.of("ce_loss") == pytest.approx([sum(passes[:4]) / 4, sum(passes[4:]) / 4])
    for log in [log for log in trainer.state.log_history if "loss" in log]:
        assert set(log) >= FLOW_TERMS
        assert recombined(model.config, log) == pytest.approx(log["loss"], rel=1e-4)


def test_evaluation_has_the_terms_too(model, tokenizer, rows, tmp_path):
    trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, per_device_eval_batch_size=7)
    with torch.no_grad():
        expected = model(**DataCollatorForSeq2Seq(tokenizer)(rows[:7])).ce_loss.item()
    for _ in range(2):
        assert trainer.evaluate()["eval_ce_loss"] == pytest.approx(expected)
    assert trainer.predict(rows[:7]).metrics["test_ce_loss"] == pytest.approx(expected)
    assert trainer.state.log_history[-1]["eval_mse_loss"] > 0


def test_trackers_see_the_terms(model, tokenizer, rows, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    (events,) = tmp_path.rglob("events.out.*")
    log = event_accumulator.EventAccumulator(str(events.parent)).Reload()
    assert {f"train/{name}" for name in FLOW_TERMS} <= set(log.Tags()["scalars"])
    assert len(log.Scalars("train/mse_loss")) == 2


def test_the_autoencoder_logs_its_terms(make_model, tokenizer, tmp_path):
    model = make_model(YanForAutoencoding, vocab_size=len(tokenizer), **SMALL, mmd_weight=0.5)
    options = {"max_steps": 1, "remove_unused_columns": False}
    texts = [{"text": text} for text in SENTENCES]
    trainer, logs = make_trainer(Trainer, model, tokenizer, texts, tmp_path, **options)
    trainer.data_collator = AutoencoderCollator(tokenizer, max_length=16)
    trainer.train()
    log = logs.logs[0]
    assert log["ce_loss"] + 0.5 * log["mmd_loss"] == pytest.approx(log["loss"], rel=1e-4)
    assert log["latent_norm_loss"] > 0


class Line(torch.nn.Module):
    """A model that is none of ours."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


def test_trainers_of_other_models_log_what_they_did(tmp_path):
    options = {"output_dir": str(tmp_path), "max_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    trainer = Trainer(Line(), TrainingArguments(**options, save_strategy="no"), train_dataset=[{"x": [1.0]}] * 2)
    trainer.train()
    assert set(trainer.state.log_history[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def mean_over_processes(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    means = RunningMeans()
    for value in (1.0, 2.0):
        means.add({"first": torch.tensor(value + 4 * rank), "second": torch.tensor(float(rank))})
    (folder / str(rank)).write_text(repr((means.take(), means.take())))
    distributed.destroy_process_group()


def test_terms_are_means_over_all_processes(tmp_path):
    multiprocessing.start_processes(mean_over_processes, (tmp_path,), nprocs=2, start_method="fork")
    for rank in "01":
        assert (tmp_path / rank).read_text() == repr(({"first": 3.5, "second": 0.5}, {}))


def trained_weights(make_model, tokenizer, rows, tmp_path, **options):
    model = make_model(vocab_size=len(tokenizer), **SMALL)
    trainer, losses = make_trainer(Trainer, model, tokenizer, rows, tmp_path, max_steps=2, **options)
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), losses.of("loss")


def test_gradient_checkpointing_changes_no_update(make_model, tokenizer, rows, tmp_path):
    plain, losses = trained_weights(make_model, tokenizer, rows, tmp_path)
    saving, same_losses = trained_weights(make_model, tokenizer, rows, tmp_path, gradient_checkpointing=True)
    assert same_losses == pytest.approx(losses)
    torch.testing.assert_close(saving, plain)


@pytest.mark.slow
def test_bfloat16_trains_nearly_the_same(make_model, tokenizer, rows, tmp_path):
    _, losses = trained_weights(make_model, tokenizer, rows, tmp_path)
    _, narrow = trained_weights(make_model, tokenizer, rows, tmp_path, bf16=True)
    assert narrow == pytest.approx(losses, rel=0.05)
    assert narrow != losses


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


def test_seq2seq_evaluation_gives_metrics_of_the_answers_alone(model, tokenizer, rows, tmp_path):
    expected = written(model, tokenizer, rows[:7], return_prompt=False)
    texts = tokenizer.batch_decode(expected, skip_special_tokens=True)
    # Of the seven answers that are wanted, the model gives the first three.
    wanted = [{**row, "labels": ids.tolist()} for row, ids in zip(rows[:3], expected)] + rows[3:7]
    seen = []

    def compute_metrics(prediction):
        ids = torch.tensor(prediction.predictions).where(torch.tensor(prediction.predictions) >= 0, 0)
        labels = torch.tensor(prediction.label_ids).where(torch.tensor(prediction.label_ids) >= 0, 0)
        answers, targets = (tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (ids, labels))
        seen.append(answers)
        return {"exact_match": sum(map(exact_match, answers, targets)) / len(answers)}

    options = {"predict_with_generate": True, "per_device_eval_batch_size": 4}
    trainer, _ = make_trainer(Seq2SeqTrainer, model, tokenizer, rows, tmp_path, **options)
    trainer.compute_metrics = compute_metrics
    for _ in range(2):
        metrics = trainer.evaluate(wanted)
        assert seen[-1] == texts
        assert metrics["eval_exact_match"] == pytest.approx(3 / 7)
        assert metrics["eval_loss"] > 0 < metrics["eval_ce_loss"]


@pytest.mark.parametrize("options", [{}, {"num_flow_steps": 2, "max_length": 40}], ids=["default", "chosen"])
def test_evaluation_leaves_the_generation_config_as_it_was(model, tokenizer, rows, tmp_path, options):
    model.generation_config.update(**options)
    before, config = model.generation_config.to_dict(), model.generation_config
    trainer, _ = make_trainer(Seq2SeqTrainer, model, tokenizer, rows, tmp_path, predict_with_generate=True)
    trainer.evaluate()
    trainer.predict(rows[:3])
    assert model.generation_config is config
    assert config.to_dict() == before


def test_seq2seq_options_reach_generate(model, tokenizer, rows, tmp_path):
    expected = written(model, tokenizer, rows[:7], max_new_tokens=3, return_prompt=False)
    trainer, _ = make_trainer(Seq2SeqTrainer, model, tokenizer, rows, tmp_path, predict_with_generate=True)
    for limit in ({"max_new_tokens": 3}, {"max_length": 3}):  # of the answer, which is all that is returned
        predictions = trainer.predict(rows[:7], **limit).predictions
        assert torch.equal(torch.tensor(predictions)[:, :3], expected)


def test_noise_on_embeddings(model, tokenizer, rows, tmp_path):
    """NEFTune's hook wants batches of them."""
    model = YanForFlowGeneration(model.config.with_fields(crf_rank=4))
    trainer, losses = make_trainer(Trainer, model, tokenizer, rows, tmp_path, neftune_noise_alpha=5)
    trainer.train()
    assert len(losses.of("loss")) == 4


def test_a_model_saved_after_an_evaluation_writes_the_same(model, tokenizer, rows, tmp_path):
    expected = written(model, tokenizer, rows[:7])
    trainer, _ = make_trainer(Seq2SeqTrainer, model, tokenizer, rows, tmp_path, predict_with_generate=True)
    trainer.predict(rows[:7])
    trainer.save_model()
    loaded = YanForFlowGeneration.from_pretrained(tmp_path)
    assert torch.equal(written(loaded, tokenizer, rows[:7]), expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_labels_that_are_the_input_are_refused(make_model, tokenizer, tmp_path, batch_size):
    model = make_model(vocab_size=len(tokenizer), canvas_length=40, **SMALL)
    rows = [dict(tokenizer(text)) for text in SENTENCES]
    trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, per_device_train_batch_size=batch_size)
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"repeat input_ids.*FlowCollator"):
            run()


@pytest.mark.parametrize("pad_token", ["<pad>", "</s>"])
def test_a_target_may_be_a_copy_of_its_source(make_model, tokenizer, pad_token):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad_token
    model = make_model(vocab_size=len(tokenizer), canvas_length=40, **SMALL)
    rows = [{"source": text, "target": text} for text in SENTENCES]
    for batch in (rows, rows[:1], rows[1:2]):
        assert model(**FlowCollator(tokenizer, 40, 40)(batch)).loss.isfinite()
    ids = torch.tensor([[9, 8, model.config.eos_token_id]])  # of a tokenizer that ends prompts with EOS, too
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("width", [None, 8])
def test_label_smoothing_is_refused_where_it_replaces_the_loss(model, tokenizer, rows, tmp_path, width):
    rows = [{**row, "labels": (row["labels"] * 8)[: width or 3]} for row in rows]
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1: must be 0"):
        make_trainer(Trainer, model, tokenizer, rows, tmp_path, label_smoothing_factor=0.1)


def test_label_smoothing_of_a_plain_autoencoder_works(make_model, tokenizer, tmp_path):
    options = {"max_steps": 1, "remove_unused_columns": False, "label_smoothing_factor": 0.1}
    rows = [{"text": text} for text in SENTENCES]
    model = make_model(YanForAutoencoding, vocab_size=len(tokenizer), **SMALL)
    trainer, losses = make_trainer(Trainer, model, tokenizer, rows, tmp_path, **options)
    trainer.data_collator = AutoencoderCollator(tokenizer, max_length=16)
    trainer.train()
    assert losses.of("loss")[0] > 0
    model = make_model(YanForAutoencoding, vocab_size=len(tokenizer), **SMALL, latent_norm_weight=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(Trainer, model, tokenizer, rows, tmp_path, **options)


@pytest.mark.slow
def test_accumulation_changes_no_update_of_the_autoencoder(make_model, tokenizer, tmp_path):
    generator, norms = torch.Generator().manual_seed(0), []
    ids = torch.randint(4, 64, (8, 10), generator=generator)
    labels = ids.where(torch.arange(10) < torch.tensor([[1], [2], [9], [10], [1], [7], [3], [10]]), -100)
    rows = [{"input_ids": row, "labels": targets} for row, targets in zip(ids, labels)]
    for size in (8, 2):
        model = make_model(YanForAutoencoding, vocab_size=len(tokenizer), **SMALL, decoder_dropout=0.0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer, logs = make_trainer(Trainer, model, tokenizer, rows, tmp_path, **options)
        trainer.data_collator = default_data_collator
        trainer.train()
        norms.append((logs.of("grad_norm")[0], logs.of("loss")[0]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.slow
def test_resuming_the_autoencoder_in_the_middle_changes_nothing(make_model, tokenizer, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5, "remove_unused_columns": False}
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):  # the second update of the second epoch
        model = make_model(YanForAutoencoding, vocab_size=len(tokenizer), **SMALL, latent_noise=0.1)
        rows = [{"text": text + " " + other} for text in SENTENCES for other in SENTENCES]
        trainer, _ = make_trainer(Trainer, model, tokenizer, rows, tmp_path, **options)
        trainer.data_collator = AutoencoderCollator(tokenizer, max_length=40, mask_ratio=0.4)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_term_that_is_not_in_every_pass_is_a_mean_over_its_own():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    means.add({"a": torch.tensor(2.0)}, weight=3)
    assert means.take() == {"a": 1.75, "b": 4.0}
    assert means.take() == {}
