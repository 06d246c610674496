"""What is in order brings no message: loading a part of a checkpoint, going on with a training, streaming."""

import warnings
from logging import getLogger

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from transformers import TextStreamer, Trainer, TrainingArguments
from transformers.utils import logging

from modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel
from modeling_yan.data import FlowCollator, train_tokenizer

ROWS = [{"source": "Where is the dog?", "target": "The dog is here."}] * 4


@pytest.fixture
def variant():
    """What is said does not depend on mixers."""
    return "both"


@pytest.fixture
def messages(caplog):
    """The texts of transformers' warnings, which go past the loggers that pytest listens to, and of the hub."""
    loggers = logging.get_logger("transformers"), getLogger("huggingface_hub")
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def test_saving_twice_brings_no_message(make_model, tmp_path, messages):
    for _ in range(2):
        make_model().save_pretrained(tmp_path)
    assert messages() == []


@pytest.fixture
def folder(make_model, tmp_path):
    make_model(crf_rank=4, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("model_class", [YanModel, YanForAutoencoding, YanForFlowGeneration])
def test_every_class_loads_a_flow_checkpoint(folder, model_class, messages):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert messages() == []


@pytest.mark.parametrize("name", ["flow.other.weight", "decoder.other.weight", "other.weight"])
def test_weights_that_the_class_itself_should_have_are_named(folder, name, messages):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    assert YanForFlowGeneration.from_pretrained(folder, output_loading_info=True)[1]["unexpected_keys"] == {name}
    assert name in "".join(messages())


def test_a_tied_weight_is_saved_once_and_comes_back(make_model, tmp_path):
    """Also where safetensors loads it by itself, as Accelerate does."""
    model, other = (make_model(tie_word_embeddings=True) for _ in range(2))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert other.lm_head.weight is other.get_input_embeddings().weight
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_going_on_says_nothing_of_missing_weights(make_model, tmp_path, messages):
    tokenizer = train_tokenizer([row["source"] + " " + row["target"] for row in ROWS], vocab_size=280)
    options = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    for checkpoint in (None, tmp_path / "checkpoint-1"):
        model = make_model(vocab_size=len(tokenizer), canvas_length=16, tie_word_embeddings=True)
        settings = TrainingArguments(str(tmp_path), remove_unused_columns=False, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            trainer = Trainer(model, settings, FlowCollator(tokenizer, model=model), ROWS)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    assert not [message for message in messages() if "missing" in message]


def test_a_streamer_prints_what_generate_returns(make_model, capsys):
    tokenizer = train_tokenizer([row["source"] for row in ROWS], vocab_size=280)
    model = make_model(vocab_size=len(tokenizer))
    model.lm_head.bias.data[[tokenizer.eos_token_id]] = 10.0
    prompt = tokenizer("Where is", return_tensors="pt")
    output = model.generate(**prompt, streamer=TextStreamer(tokenizer), eos_strategy="first")
    printed = capsys.readouterr().out.removesuffix("\n")
    assert printed == tokenizer.decode(output[0])
    assert tokenizer.pad_token not in printed
    assert printed.endswith(tokenizer.eos_token)
