"""The fine-tuning script as a newcomer runs it, on a bundled checkpoint and a file of pairs."""

import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    EvalPrediction,
    Seq2SeqTrainer,
)

from modeling_yan import YanForFlowGeneration
from modeling_yan.cards_yan import YanModelCard
from modeling_yan.data import generate_stories, write_rows
from modeling_yan.training.finetuning import (
    SHOWN,
    FinetuningArguments,
    choose_epochs,
    fill_card,
    finetune,
    load_pairs,
    next_command,
    parse_finetuning,
)
from modeling_yan.training.run_folder import find_checkpoint
from modeling_yan.training.samples import Samples

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


def save_encoder(folder, texts: str):
    """A small BERT that knows the words of the texts, and its tokenizer."""
    words = sorted({word.strip(".?,") for word in texts.split()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", ",", ":", *words]
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=96, **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)


def options(*words) -> FinetuningArguments:
    return parse_finetuning(["--model", "m", "--output_dir", "out", "--use_cpu", *words])[0]


@pytest.fixture
def folder(tmp_path, monkeypatch, tmp_path_factory) -> Path:
    """A data set of two splits, as a folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    rows = [f"{number},{number % 3}\n" for number in range(20)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("source,target\n" + "".join(rows))
    return tmp_path


def test_rows_are_held_out_from_a_file_a_split_or_a_share(folder):
    rows, held_out, name = load_pairs(options("--train_file", str(folder / "train.csv")), seed=1)
    assert (len(rows), len(held_out)) == (18, 2)
    assert name == "a share of 0.1 cut by the seed 1; rows with one source stay together"
    files = ["--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "test.csv")]
    assert [len(part) for part in load_pairs(options(*files), seed=1)[:2]] == [20, 20]
    dataset = ["--dataset", str(folder), "--train_split", "train[:15]"]
    assert [len(part) for part in load_pairs(options(*dataset, "--validation_split", "test"), 1)[:2]] == [15, 20]
    assert [len(part) for part in load_pairs(options(*dataset), seed=1)[:2]] == [13, 2]
    (folder / "test.csv").rename(folder / "validation.csv")
    rows, held_out, name = load_pairs(options(*dataset), seed=1)
    assert (len(rows), len(held_out), name) == (15, 20, "the split validation")


def test_held_out_rows_that_are_trained_on(folder, warnings_of_transformers):
    """Splits that are trained on are not held out; where all the same rows coincide, a warning says how many."""
    (folder / "test.csv").rename(folder / "validation.csv")
    dataset = ["--dataset", str(folder), "--train_split"]
    for split, numbers in (("train+validation", [36, 4]), ("validation[:50%]", [9, 1]), ("validation", [18, 2])):
        rows, held_out, name = load_pairs(options(*dataset, split), seed=1)
        assert [len(rows), len(held_out)] == numbers
        assert name.startswith("a share of 0.1")
    assert not warnings_of_transformers.text
    load_pairs(options(*dataset, "train[:15]"), seed=1)
    assert "15 of 20 held-out rows are also trained on" in warnings_of_transformers.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--train_file, or --dataset: must be given, and not both"),
        (["--train_file", "x", "--dataset", "x"], "--train_file, or --dataset: must be given, and not both"),
        (["--train_file", "x", "--encoder", "x"], "--model, or --encoder: must be given, and not both"),
        (["--train_file", "x", "--validation_split", "x"], "--validation_split: is for --dataset"),
        (["--train_file", "x", "--dataset_config", "x"], "--dataset_config: is for --dataset"),
        (["--train_file", "x", "--train_split", "x"], "--train_split: is for --dataset"),
        (["--dataset", "x", "--validation_split", "x", "--validation_file", "x"], "must not both be given"),
        (["--train_file", "x", "--fields", "[]"], """--fields '[]': must be a JSON object, such as {"freeze_enc"""),
        (["--train_file", "x", "--fields", "{x}"], "--fields '{x}': must be a JSON object"),
        (["--train_file", "x", "--fields", '{"canvas_length": 8}'], "is for a new model, on an --encoder"),
    ],
)
def test_words_that_do_not_fit_together(capsys, words, message):
    with pytest.raises(SystemExit):
        options(*words)
    assert message in capsys.readouterr().err


def test_the_best_model_is_kept_where_each_is_saved_that_is_measured():
    words = ["--model", "m", "--train_file", "x", "--output_dir", "out", "--use_cpu"]
    assert parse_finetuning(words)[1].load_best_model_at_end
    assert not parse_finetuning([*words, "--save_strategy", "no"])[1].load_best_model_at_end
    assert not parse_finetuning([*words, "--eval_strategy", "no"])[1].load_best_model_at_end


def test_a_pretrained_encoder_learns_at_a_rate_of_its_own():
    words = ["--train_file", "x", "--output_dir", "out", "--use_cpu"]
    given, training = parse_finetuning(["--encoder", "e", *words])
    assert (training.learning_rate, given.encoder_learning_rate) == (3e-4, 1e-4)
    given, training = parse_finetuning(["--model", "m", *words])
    assert (training.learning_rate, given.encoder_learning_rate) == (1e-4, None)
    given, training = parse_finetuning(["--encoder", "e", *words, "--encoder_learning_rate", "2e-5"])
    assert (training.learning_rate, given.encoder_learning_rate) == (3e-4, 2e-5)


@pytest.mark.parametrize(("num_rows", "epochs"), [(100, 20), (6920, 10), (100_000, 3)])
def test_epochs_make_about_so_many_updates(num_rows, epochs):
    words = ["--model", "m", "--train_file", "x", "--output_dir", "out", "--use_cpu"]
    _, training = parse_finetuning(words)
    assert training.num_train_epochs == 0
    assert choose_epochs(num_rows, training) == epochs


def test_the_card_says_what_the_model_was_trained_on_and_how_it_is_asked():
    given = options("--dataset", "owner/reviews", "--template", "{title}: {text}", "--target_column", "label")
    card, scores = YanModelCard(), dict.fromkeys(SHOWN, 0.5)
    command = next_command("out", [{"source": "Very bad: it's very bad"}, {"source": "Bad: it's bad"}])
    fill_card(card, given, command, 1234, scores, 56)
    assert card.datasets == ["owner/reviews"]
    shown = """`yan generate out 'Bad: it'"'"'s bad'`"""
    assert card.prompts == f"`{{title}}: {{text}}`, of which it generates `label`: {shown}."
    assert card.results["rows trained on"] == "1,234 of reviews"
    assert card.results["exact_match, 56 held-out rows"] == "0.5000"
    assert shlex.split(command) == ["yan", "generate", "out", "Bad: it's bad"]


def test_a_few_held_out_rows_are_shown_at_every_evaluation(capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "checkpoints" / "yan-transformer-tiny")
    rows = [{"source": f"Where is {name}?", "target": f"{name} is here."} for name in ("Ann", "Tom", "Eva", "Joe")]
    ids = tokenizer([row["target"] for row in rows], padding=True, return_tensors="np").input_ids
    written = np.where(ids == tokenizer.pad_token_id, -100, ids)
    written[0] = written[1]
    scores = Samples(tokenizer, rows)(EvalPrediction(written, ids))
    assert scores["exact_match"] == 0.75
    assert 0.75 < scores["rouge_l"] < 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in shown] == ["source", "wanted", "generated"] * 3
    assert "   source: Where is Joe?" in shown
    Samples(tokenizer, rows, is_shown=False)(EvalPrediction(written, ids))
    assert capsys.readouterr().out == ""


def run_here(tmp_path, *words, **fields):
    """Train on a few rows, of which the third has a target of six words."""
    places = ("here", "there", "in a house by the sea", "away")
    rows = [{"source": f"where is {name}?", "target": place} for name, place in zip("abcd", places, strict=True)]
    write_rows(tmp_path / "rows.jsonl", rows)
    if not (tmp_path / "encoder").exists():
        save_encoder(tmp_path / "encoder", "where is a b c d here there in house by the sea away")
    settings = dict.fromkeys(("--train_file", "--validation_file"), str(tmp_path / "rows.jsonl"))
    settings |= {"--max_steps": "2", "--report_to": "none", "--disable_tqdm": "True", "--use_cpu": "True"}
    settings |= {"--eval_strategy": "no", "--save_strategy": "no"} | (
        {"--fields": json.dumps(fields)} if fields else {}
    )
    command = [word for name, value in settings.items() if name not in words for word in (name, value)]
    words = [str(tmp_path / word) if word in ("encoder", "rows.jsonl", "out") else word for word in words]
    finetune(*parse_finetuning([*command, *words]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "encoder", "--output_dir", "out"], "encoder': its model_type='bert' must be 'yan'"),
        (["--model", "nowhere", "--output_dir", "out"], "--model 'nowhere': must be a folder or a name on the hub"),
        (
            ["--encoder", "nowhere", "--output_dir", "out"],
            "--encoder 'nowhere': must be a folder or a name on the hub",
        ),
        (["--encoder", "encoder", "--output_dir", "rows.jsonl"], "rows.jsonl': must be a folder, and is a file"),
    ],
)
def test_names_that_can_not_be_are_named(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run_here(tmp_path, *words)


def test_a_target_without_room_is_named(tmp_path):
    words = ["--encoder", "encoder", "--output_dir", "out"]
    with pytest.raises(
        ValueError, match=r"the target 'in a house by the sea' has 6 tokens: shorten it, or give --fields .*=6"
    ):
        run_here(tmp_path, *words, max_position_embeddings=6)
    run_here(tmp_path, *words, max_position_embeddings=6, canvas_length=4, num_flow_layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.canvas_length, model.generation_config.max_new_tokens) == (4, 7)


def test_without_generated_texts_there_is_no_metric_of_them(tmp_path, capsys):
    words = ["--encoder", "encoder", "--output_dir", "out", "--predict_with_generate", "False"]
    run_here(tmp_path, *words, num_flow_layers=1)
    assert "eval_loss" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
    shown = capsys.readouterr().out
    assert "eval_loss" in shown
    assert "exact_match" not in shown


def test_the_dtype_and_the_tokenizer_of_a_new_model(tmp_path):
    save_encoder(tmp_path, "where is a b c d here there")
    make = partial(YanForFlowGeneration.from_encoder_pretrained, str(tmp_path), num_flow_layers=1)
    model = make(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match="dtype='half': must be a dtype of floating-point numbers"):
        make(dtype="half")
    with pytest.raises(TypeError, match="tokenizer='x': must be a tokenizer, as AutoTokenizer loads it"):
        make(tokenizer="x")


@pytest.mark.slow
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_new_model_on_a_pretrained_encoder(tmp_path, is_frozen):
    train_file, encoder, output = tmp_path / "pairs.jsonl", tmp_path / "encoder", tmp_path / "output"
    rows = [
        {"source": row["source"], "target": row["target"]} for row in generate_stories(12, seed=5, max_sentences=2)
    ]
    write_rows(train_file, rows)
    texts = " ".join(row["source"] + " " + row["target"] for row in rows).lower()
    save_encoder(encoder, texts)
    command = ["--train_file", train_file, "--validation_file", train_file, "--encoder", encoder]
    command += ["--output_dir", output, "--num_train_epochs", "6", "--learning_rate", "3e-3", "--warmup_steps", "0"]
    fields = json.dumps({"num_flow_layers": 1, "freeze_encoder": is_frozen})
    command += ["--fields", fields, "--per_device_train_batch_size", "4"]
    printed = run(*command, "--use_cpu", "--report_to", "none")
    before, after = next(line for line in printed.splitlines() if line.startswith("eval_loss")).split()[1::2]
    assert float(after) < 0.6 * float(before)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    tokens = model.generate(**tokenizer(rows[0]["source"], return_tensors="pt"), return_prompt=False)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert len(list(output.rglob("_states/**/*.arrow"))) == is_frozen


def test_an_adapter_of_the_encoder_is_merged_into_the_model(tmp_path):
    pytest.importorskip("peft")
    rows = [{"source": f"where is {name}?", "target": f"in {name}"} for name in "abcdefgh"]
    write_rows(tmp_path / "rows.jsonl", rows)
    save_encoder(tmp_path / "encoder", " ".join(row["source"] + " " + row["target"] for row in rows))
    words = ["--train_file", tmp_path / "rows.jsonl", "--validation_file", tmp_path / "rows.jsonl", "--lora"]
    words += ["--encoder", tmp_path / "encoder", "--output_dir", tmp_path / "model", "--num_train_epochs", 2]
    words += ["--fields", '{"num_flow_layers": 1}', "--learning_rate", 1e-2, "--warmup_steps", 0, "--use_cpu"]
    finetune(*parse_finetuning([*map(str, words), "--report_to", "none"]))
    weights = YanForFlowGeneration.from_pretrained(tmp_path / "model").model.encoder.state_dict()
    assert not any("lora" in name for name in weights)
    for name, before in BertModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False).state_dict().items():
        is_linear = before.dim() == 2 and "embeddings" not in name
        assert weights[name].equal(before) != is_linear, name
    with pytest.raises(ValueError, match="--lora: adapts the encoder, which freeze_encoder in --fields keeps"):
        FinetuningArguments(train_file="x", encoder="x", lora=True, fields='{"freeze_encoder": true}')


@pytest.mark.slow
def test_a_seed_decides_the_new_weights_too(tmp_path):
    weights = []
    for seed, folder in ((7, "a"), (7, "b"), (8, "c")):
        words = ["--encoder", "encoder", "--output_dir", str(tmp_path / folder), "--seed", str(seed)]
        run_here(tmp_path, *words, num_flow_layers=1, num_decoder_layers=1)
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_target_of_unknown_characters_is_never_right(tmp_path, caplog):
    save_encoder(tmp_path / "encoder", "red cat")
    rows = [{"source": "red", "target": "Δ"}, {"source": "cat", "target": "red"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    written = tokenizer([row["target"] for row in rows], add_special_tokens=False, return_tensors="np").input_ids
    assert Samples(tokenizer, rows)(EvalPrediction(written, written))["exact_match"] == 0.5
    table, words = tmp_path / "unknown.jsonl", ["--encoder", str(tmp_path / "encoder"), "--use_cpu"]
    write_rows(table, [rows[0]] * 2)
    words += ["--train_file", str(table), "--validation_file", str(table), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(
        ValueError, match="4 of 4 targets have characters that the tokenizer does not know, such as 'Δ'"
    ):
        finetune(*parse_finetuning(words))
    write_rows(table, [{"source": "red", "target": "cat [SEP] red"}] * 2)
    with pytest.raises(
        ValueError, match=r"4 of 4 targets have special tokens of the tokenizer, such as .cat .SEP. red"
    ):
        finetune(*parse_finetuning(words))


def test_a_held_out_target_may_be_the_longest(tmp_path):
    write_rows(tmp_path / "longer.jsonl", [{"source": "where", "target": "in a house by the sea away here there"}])
    words = ["--encoder", "encoder", "--output_dir", "out", "--validation_file", str(tmp_path / "longer.jsonl")]
    run_here(tmp_path, *words, num_flow_layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.canvas_length, model.generation_config.max_new_tokens) == (10, 10)


@pytest.mark.slow
def test_the_loss_of_held_out_rows_is_over_all_of_their_canvases(tmp_path, capsys):
    targets = {"ends": "x x x x y y y y", "otherwise": "x x x x z z z z"}
    save_encoder(tmp_path / "encoder", "where is a b c d here there in house by the sea away x y z")
    losses = []
    for name, target in targets.items():
        rows = [{"source": "where", "target": target}, {"source": "x", "target": "y"}]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        words = ["--encoder", "encoder", "--output_dir", str(tmp_path / name), "--max_steps", "0"]
        words += ["--validation_file", str(tmp_path / f"{name}.jsonl")]
        run_here(tmp_path, *words, num_flow_layers=1, canvas_length=4)
        losses.append(json.loads((tmp_path / name / "eval_results.json").read_text())["eval_loss"])
    assert losses[0] != losses[1]
    assert "| rows trained on | 4 of rows.jsonl |" in (tmp_path / name / "README.md").read_text()


def test_a_run_goes_on_and_does_not_mix_with_another(tmp_path):
    words = ["--encoder", "encoder", "--output_dir", "out", "--save_strategy", "steps", "--save_steps", "1"]
    run_here(tmp_path, *words, num_flow_layers=1)
    with pytest.raises(
        FileExistsError, match="out' holds the checkpoints of another run: give --resume_from_checkpoint"
    ):
        run_here(tmp_path, *words, num_flow_layers=1)
    torn = tmp_path / "out" / "checkpoint-9"
    torn.mkdir()
    words += ["--save_total_limit", "9"]  # or transformers might take the torn one for the newest and drop the others
    run_here(tmp_path, *words, "--resume_from_checkpoint", "True", "--max_steps", "3", num_flow_layers=1)
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    run_here(tmp_path, *words[:2], "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint", "True")


@pytest.mark.parametrize("damage", ["", "[", "1"])
def test_a_checkpoint_that_is_cut_off_is_passed_over(tmp_path, damage):
    words = ["--encoder", "encoder", "--output_dir", "out", "--save_strategy", "steps", "--save_steps", "1"]
    words += ["--save_total_limit", "9"]
    run_here(tmp_path, *words, num_flow_layers=1)
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").write_text(damage)  # as where the disk was full
    (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "out" / "checkpoint-best")
    training = parse_finetuning(["--model", "m", "--train_file", "x", "--output_dir", str(tmp_path / "out")])[1]
    with pytest.raises(FileExistsError, match="holds a finished model: give another --output_dir"):
        find_checkpoint(training)
    (tmp_path / "out" / "checkpoint-best").rename(tmp_path / "out" / "checkpoint-1")
    training.resume_from_checkpoint = "True"
    assert find_checkpoint(training) == str(tmp_path / "out" / "checkpoint-1")


def test_a_finished_model_is_not_overwritten(tmp_path):
    words = ["--encoder", "encoder", "--output_dir", "out"]
    run_here(tmp_path, *words, num_flow_layers=1)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    for again in (words, [*words, "--resume_from_checkpoint", "True"], ["--model", "out", "--output_dir", "out"]):
        with pytest.raises(FileExistsError, match="out' holds a finished model: give another --output_dir"):
            run_here(tmp_path, *again, "--seed", "7")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_the_optimizer_is_the_one_that_is_asked_for(tmp_path, monkeypatch):
    made = []
    train = Seq2SeqTrainer.train
    monkeypatch.setattr(Seq2SeqTrainer, "train", lambda self, **kwargs: made.append(self) or train(self, **kwargs))
    words = ["--encoder", "encoder", "--output_dir", "out", "--optim", "sgd", "--learning_rate", "0.5"]
    run_here(tmp_path, *words, num_flow_layers=1)
    optimizer = getattr(made[0].optimizer, "optimizer", made[0].optimizer)  # in accelerate's wrapper
    assert type(optimizer) is torch.optim.SGD
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.5, 1e-4}


@pytest.mark.parametrize(
    "words",
    [
        ["--batch_eval_metrics", "True"],
        ["--train_sampling_strategy", "group_by_length"],
        ["--dataloader_drop_last", "True"],
        ["--num_train_epochs", "-1"],
        ["--per_device_train_batch_size", "0"],
        ["--gradient_accumulation_steps", "0"],
        ["--metric_for_best_model", "exact_match", "--predict_with_generate", "False"],
    ],
)
def test_options_of_the_trainer_that_do_not_fit(capsys, words):
    with pytest.raises(SystemExit):
        options("--train_file", "x", *words)
    assert f"{words[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_with_an_adapter_in_it_is_refused(tmp_path):
    pytest.importorskip("peft")
    words = ["--encoder", "encoder", "--output_dir", "out", "--save_strategy", "steps", "--save_steps", "1", "--lora"]
    run_here(tmp_path, *words, num_flow_layers=1)
    with pytest.raises(ValueError, match="checkpoint-2: the weights lie in an adapter's layers: finish the run with"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]["missing_keys"] == set()


def test_a_graph_takes_the_place_of_the_crf_of_a_new_model(tmp_path):
    words = ["--encoder", "encoder", "--output_dir", "out"]
    run_here(tmp_path, *words, num_flow_layers=1, vertices_per_token=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.vertices_per_token, model.config.crf_rank) == (2, 0)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_rows_and_the_patience_that_is_left(tmp_path):
    words = ["--encoder", "encoder", "--output_dir", "out", "--save_strategy", "epoch", "--eval_strategy", "epoch"]
    words += ["--learning_rate", "0", "--encoder_learning_rate", "0", "--max_steps", "-1", "--save_total_limit", "9"]
    run_here(tmp_path, *words, "--num_train_epochs", "3", num_flow_layers=1)
    again = [*words, "--resume_from_checkpoint", "True"]
    with pytest.raises(ValueError, match=r"out was trained with other --seed$"):
        run_here(tmp_path, *again, "--seed", "1", num_flow_layers=1)
    with pytest.raises(ValueError, match=r"out was trained with other --fields, --lora or --lora_rank$"):
        run_here(tmp_path, *again, "--lora", num_flow_layers=2)
    run_here(tmp_path, *words, "--num_train_epochs", "9", "--resume_from_checkpoint", "True", num_flow_layers=1)
    epochs = [int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*")]
    assert max(epochs) == 4  # the first evaluation is the best, and three more may be no better


def test_words_of_any_script_count():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "checkpoints" / "yan-transformer-tiny")
    rows = [{"source": "a", "target": "привет мир"}]
    ids = tokenizer([row["target"] for row in rows], return_tensors="np").input_ids
    assert Samples(tokenizer, rows)(EvalPrediction(ids, ids)) == {"exact_match": 1.0, "rouge_l": 1.0}
