"""Arms of a task on a pretrained encoder."""

import json

import pytest
import torch
import transformers
import yaml
from accelerate.state import AcceleratorState

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.data import write_rows
from modeling_yan.training import PretrainingArguments, optimization
from modeling_yan.training.throughput import baseline_flops, linear_flops, training_flops

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "good", "bad", "yes", "no", *"abcdef"]
FIELDS = {"num_flow_layers": 1, "canvas_length": 4, "crf_rank": 4, "crf_candidates": 4}
ARMS = {
    "YAN": {},
    "YAN on it": {"encoder": True},
    "YAN on it, LoRA": {"encoder": True, "lora": 2},
    "one pass on it": {"encoder": True, "kind": "one pass, joint"},
    "AR encoder-decoder on it": {"encoder": True, "kind": "encoder_decoder"},
    "head": {"encoder": True, "kind": "classifier"},
}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def encoder(tmp_path):
    """Folder of a small random BERT and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    folder = tmp_path / "encoder"
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(encoder, tmp_path):
    rows = [
        {"source": "is it good", "target": "yes", "task": "a"},
        {"source": "is it bad", "target": "no", "task": "b"},
    ]
    for part in ("train", "validation", "test"):
        write_rows(tmp_path / f"words-{part}.jsonl.gz", rows)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    YanConfig(vocab_size=300, max_position_embeddings=32, **sizes, **FIELDS).save_pretrained(tmp_path / "preset")
    own = {"intermediate_size": 128, "num_answer_slots": 4, "train_expert_choice": "posterior", "num_experts": 1}
    recipe = {"task": "words", "config": str(tmp_path / "preset"), "fields": own, "vocab_size": 300, "updates": 2}
    recipe |= {"autoencoder_share": 0, "batch_size": 2, "steps": [1], "temperatures": [], "encoder": "a/name"}
    recipe |= {"encoder_fields": FIELDS, "encoder_training": {"learning_rate": 0.001}, "metric": "exact"}
    recipe |= {"training": {"max_source_length": 8, "warmup_steps": 1}, "arms": ARMS}
    path = tmp_path / "words.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("error::FutureWarning")
def test_arms_on_an_encoder_are_trained_and_measured(load_script, recipe, encoder, tmp_path):
    words = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--seeds", "0"]
    load_script("tasks").main([str(recipe), *words, "--encoder", str(encoder)])
    runs = json.loads((tmp_path / "out" / "table.json").read_text())["runs"]
    best = {arm: list(seeds["0"]["best"]) for arm, seeds in runs.items()}
    assert best["YAN on it"] == ["1"]
    assert best["one pass on it"] == ["0"]
    assert best["AR encoder-decoder on it"] == ["greedy"]
    assert best["head"] == ["class"]
    figures = runs["head"]["0"]["best"]["class"]
    assert figures["unknown"] == 0
    assert set(figures["by_task"]) == {"a", "b"}
    assert figures["exact"] == pytest.approx(sum(figures["by_task"].values()) / 2)
    sizes = {arm: seeds["0"]["parameters"] for arm, seeds in runs.items()}
    assert sizes["one pass on it"] == pytest.approx(sizes["YAN on it"], rel=0.03)
    assert sizes["YAN on it, LoRA"] == sizes["YAN on it"]
    own_words = len(WORDS) * 16
    assert sizes["AR encoder-decoder on it"] - own_words == pytest.approx(sizes["YAN on it"], rel=0.05)


def test_the_trainers_arms_get_the_rows_and_the_schedule_of_the_others(load_script, recipe, tmp_path):
    arms, own = load_script("encoder_arms"), {**yaml.safe_load(recipe.read_text()), "updates": 10}
    rows = [{"source": str(number)} for number in range(9)]
    drawn = arms.draw_rows(rows, own, seed=0)
    assert (len(drawn), drawn) == (20, arms.draw_rows(rows, own, seed=0))
    assert drawn != arms.draw_rows(rows, own, seed=1)

    settings = arms.trainer_arguments(own, {"learning_rate": 0.1}, 0, tmp_path)
    options = settings.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)], 0.1), settings.warmup_steps, 10
    schedule = transformers.get_scheduler(*options, settings.lr_scheduler_kwargs)
    arguments = PretrainingArguments("flow", "c", "t", "o", max_steps=10, warmup_steps=1, decay_steps=5)
    (found,) = schedule.lr_lambdas
    expected = [optimization._constant(step, arguments) for step in range(1, 10)]
    assert [found(step) for step in range(1, 10)] == pytest.approx(expected)
    assert settings.weight_decay == arguments.weight_decay


def test_an_encoder_decoder_starts_from_the_encoder_that_yan_has(load_script, encoder, tmp_path):
    arms = load_script("encoder_arms")
    arms.start_model(str(encoder), FIELDS, "encoder_decoder", [{"source": "is it good"}], tmp_path / "start")
    from modeling_yan.training.models import load_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "start")
    model = load_model("encoder_decoder", str(tmp_path / "start"), tokenizer)
    own = YanForFlowGeneration.from_pretrained(tmp_path / "start").model.encoder
    for name, weight in own.named_parameters():
        assert torch.equal(model.get_encoder().get_parameter(name), weight)
    words = model.get_decoder().get_input_embeddings().weight
    assert torch.equal(words, own.get_input_embeddings().weight)


def test_the_work_of_a_pretrained_encoder_is_counted(encoder):
    model = YanForFlowGeneration.from_encoder_pretrained(str(encoder), **FIELDS)
    counted = [training_flops(model, 2, width, 4, 1) for width in (4, 8)]
    assert counted[1] - counted[0] > 3 * 2 * 4 * linear_flops(model.model.encoder)
    sizes = {name: getattr(model.config.encoder, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    decoder = transformers.BertConfig(is_decoder=True, add_cross_attention=True, num_attention_heads=2, **sizes)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(model.config.encoder, decoder)
    baseline = transformers.EncoderDecoderModel(config)
    parts = 8 * linear_flops(baseline.encoder) + 4 * linear_flops(baseline.decoder)
    assert baseline_flops(baseline, 2, 8, 4) == 3 * 2 * parts
