"""States of a frozen encoder that are kept on the disk: the same training, and never a stale or a broken file."""

import errno
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    T5Config,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)

from modeling_yan import YanForFlowGeneration
from modeling_yan.data import FlowCollator, prepare_tokenizer
from modeling_yan.training import encoder_states
from modeling_yan.training.encoder_states import RowsWithStates, StatesCollator

WORDS = "mary john went to the kitchen garden who".split()
ROWS = [
    {"source": f"{name} went to the {place}" + " who" * number, "target": name}
    for number, name in enumerate(("mary", "john"))
    for place in ("kitchen", "garden", "the kitchen")
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FIELDS = {"freeze_encoder": True, "num_flow_layers": 1, "canvas_length": 4, "crf_rank": 4}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A small random encoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=48, initializer_range=0.2, **SIZES)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    prepare_tokenizer(tokenizer)
    return tokenizer


def build(encoder, tokenizer, **fields):
    torch.manual_seed(0)
    return YanForFlowGeneration.from_encoder_pretrained(encoder, tokenizer=tokenizer, **{**FIELDS, **fields})


def keep(model, tokenizer, folder, rows=ROWS) -> RowsWithStates:
    return RowsWithStates(rows, model, FlowCollator(tokenizer, model=model), folder)


def files(folder) -> list[Path]:
    return sorted(Path(folder).rglob("*.arrow"))


COPIED = {"num_answer_slots": 4, "copy_prompt_to_slots": True}


@pytest.mark.parametrize(
    "fields", [{}, {"num_answer_slots": 4}, COPIED, {"hidden_size": 16}, {"mse_weight": 1.0}], ids=str
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_and_gradients_are_the_same_with_kept_states(encoder, tokenizer, tmp_path, fields, side):
    tokenizer.padding_side = side
    model = build(encoder, tokenizer, **fields).train()
    collator = FlowCollator(tokenizer, model=model)
    kept = StatesCollator(collator)(keep(model, tokenizer, tmp_path).__getitems__(range(len(ROWS))))
    plain = collator(ROWS)
    assert kept["encoder_outputs"].shape[1] == plain["input_ids"].shape[1] + model.config.num_answer_slots
    results = []
    for batch in (plain, kept):
        torch.manual_seed(1)
        model.zero_grad()
        outputs = model(**batch, num_flow_steps=2)
        outputs.loss.backward()
        norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
        results.append((outputs.loss.detach(), torch.stack(norms)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**plain).loss, model(**kept).loss, rtol=1e-5, atol=1e-5)


def test_an_update_asks_the_encoder_of_no_row(encoder, tokenizer, tmp_path, monkeypatch):
    model = build(encoder, tokenizer, mse_weight=0.0)
    losses = []
    for use in (False, True):
        torch.manual_seed(3)
        trained = build(encoder, tokenizer, mse_weight=0.0)
        rows = keep(trained, tokenizer, tmp_path / "states") if use else ROWS
        if use:
            monkeypatch.setattr(trained.model.encoder, "forward", None)
        options = {"max_steps": 3, "per_device_train_batch_size": 4, "remove_unused_columns": False, "use_cpu": True}
        options |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
        collator = StatesCollator(FlowCollator(tokenizer, model=model))
        trainer = Trainer(trained, TrainingArguments(str(tmp_path), **options), collator, rows)
        trainer.train()
        losses.append([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_file_is_made_once_and_anew_for_other_rows_and_weights(encoder, tokenizer, tmp_path, monkeypatch):
    model = build(encoder, tokenizer)
    first = keep(model, tokenizer, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(model, "encoder_states", None)  # not asked again
        again = keep(model, tokenizer, tmp_path)
    assert len(files(tmp_path)) == 1
    assert (again[2]["states"] == first[2]["states"]).all()
    assert len(again[0]["states"]) == len(tokenizer(ROWS[0]["source"]).input_ids)
    keep(model, tokenizer, tmp_path, rows=[*ROWS[1:], {"source": "who went", "target": "mary"}])
    assert len(files(tmp_path)) == 2
    keep(build(encoder, tokenizer, num_answer_slots=4), tokenizer, tmp_path)
    keep(build(encoder, tokenizer, **COPIED), tokenizer, tmp_path)
    assert len(files(tmp_path)) == 4
    next(model.model.encoder.parameters()).data[5] += 0.1
    changed = keep(model, tokenizer, tmp_path)
    assert len(files(tmp_path)) == 5
    assert (changed[0]["states"] != first[0]["states"]).any()


def test_a_file_that_was_half_written_is_not_read(encoder, tokenizer, tmp_path, monkeypatch):
    model, make = build(encoder, tokenizer), encoder_states._encode

    def break_off(*arguments):
        rows = make(*arguments)
        yield next(rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoder_states, "_encode", break_off)
        with pytest.raises(KeyboardInterrupt):
            keep(model, tokenizer, tmp_path)
    assert len(keep(model, tokenizer, tmp_path).states) == len(ROWS)


def test_a_full_disk_says_what_is_needed(encoder, tokenizer, tmp_path, monkeypatch):
    model, make = build(encoder, tokenizer), encoder_states._encode
    with monkeypatch.context() as patch:
        patch.setattr(encoder_states.shutil, "disk_usage", lambda _: type("usage", (), {"free": 100}))
        with pytest.raises(OSError, match=r"states need 0.0 GB, and 0.0 GB are free.*--cache_latents False"):
            keep(model, tokenizer, tmp_path)

    def fill(*arguments):
        yield next(make(*arguments))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoder_states, "_encode", fill)
    with pytest.raises(OSError, match="the encoder's states need"):
        keep(model, tokenizer, tmp_path)
    assert files(tmp_path) == []


def test_states_that_training_changes_are_refused(encoder, tokenizer, tmp_path):
    model = build(encoder, tokenizer, freeze_encoder=False)
    with pytest.raises(ValueError, match="freeze_encoder=False: must be True"):
        keep(model, tokenizer, tmp_path)
    batch = FlowCollator(tokenizer, model=model)(ROWS)
    with pytest.raises(ValueError, match="encoder_outputs: must be None but for a pretrained encoder with freeze_enc"):
        model(**batch, encoder_outputs=torch.zeros(6, 8, 32))
    model = build(encoder, tokenizer)
    with pytest.raises(ValueError, match=r"encoder_outputs of shape \(6, 3, 32\): must be \(6, 12, 32\)"):
        model(**batch, encoder_outputs=(torch.zeros(6, 3, 32),))


def test_learned_answer_slots_change_the_states(tmp_path, tokenizer):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    fields = {"mask_token_id": None, "max_position_embeddings": 32}
    assert build(tmp_path, tokenizer, **fields).keeps_states
    assert not build(tmp_path, tokenizer, num_answer_slots=4, freeze_embeddings=False, **fields).keeps_states


def test_a_model_without_a_pretrained_encoder_has_no_states(tiny_model):
    assert not tiny_model.keeps_states
    with pytest.raises(ValueError, match="encoder_outputs: must be None but for"):
        tiny_model(torch.ones(1, 3, dtype=torch.long), encoder_outputs=torch.zeros(1, 3, 32))
