"""Evaluating YAN and an autoregressive baseline on the same pairs: the command, its files, and what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.data import generate_stories, write_rows
from modeling_yan.evaluation import (
    DEFAULT_METRICS,
    RunOptions,
    evaluate_task,
    exact_match_scores,
    format_report,
    generate_answers,
    mcnemar_exact,
    mean_with_interval,
    paired_bootstrap,
    paired_permutation_test,
    read_predictions,
    run_model,
)

ROOT = Path(__file__).parents[2]
NUM_ROWS = 8


@pytest.fixture(scope="module")
def rows():
    slot = "<mask>" * 8 + " "
    rows = generate_stories(NUM_ROWS, 1, max_sentences=3, answer_slot=slot)
    return [{key: row[key] for key in ("source", "target")} for row in rows]


@pytest.fixture
def yan(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def evaluate_in_subprocess(*arguments):
    command = [sys.executable, str(ROOT / "examples" / "evaluate_task.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def lines_of(folder):
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.slow
def test_the_command_measures_yan_and_compares_a_baseline_with_it(rows, checkpoint, gpt2_folder, tmp_path):
    data = tmp_path / "pairs.jsonl.gz"
    write_rows(data, rows)
    options = ("--data", data, "--max_new_tokens", 16)
    steps = ("--num_flow_steps", 3, "--canvas_length", 8, "--seeds", 2)
    printed = evaluate_in_subprocess("--model", checkpoint, *options, *steps, "--output", tmp_path / "yan")
    assert "oracle length, sampled, 2 seed(s), 8 rows" in printed
    figures = json.loads((tmp_path / "yan" / "metrics.json").read_text())
    assert {length: set(runs) for length, runs in figures["runs"].items()} == {
        "free": {"sampled", "deterministic"},
        "oracle": {"sampled", "deterministic"},
    }
    score = figures["runs"]["free"]["sampled"]["metrics"]["exact_match"]
    assert 0.3 < score["mean"] <= 1  # it was trained on such stories
    assert score["low"] <= score["mean"] <= score["high"]
    assert score["mean"] == pytest.approx(np.mean(score["per_seed"]))
    assert len(lines_of(tmp_path / "yan")) == 2 * (2 + 1) * NUM_ROWS

    judge = ("--judge", gpt2_folder, "--compare", tmp_path / "yan")
    printed = evaluate_in_subprocess("--model", gpt2_folder, *options, *judge, "--output", tmp_path / "baseline")
    assert "free length, deterministic minus deterministic" in printed
    report = json.loads((tmp_path / "baseline" / "metrics.json").read_text())
    assert set(report["runs"]["free"]) == set(report["runs"]["oracle"]) == {"deterministic"}
    test = report["comparison"]["runs"]["free"]["deterministic"]["metrics"]["exact_match"]
    of_yan = figures["runs"]["free"]["deterministic"]["metrics"]["exact_match"]["mean"]
    assert test["difference"] == pytest.approx(-of_yan)  # a random model is never right
    perplexity = report["runs"]["free"]["deterministic"]["metrics"]["generative_perplexity"]
    assert 1 < perplexity["low"] <= perplexity["mean"] <= perplexity["high"]
    assert sorted(os.listdir(tmp_path / "baseline")) == ["metrics.json", "predictions.jsonl"]


@pytest.mark.parametrize("fields", [{"refine_draft": True}, {"vertices_per_token": 2, "num_answer_slots": 0}])
def test_a_reference_beyond_the_answer_slots_is_no_error(tokenizer, fields):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
    sizes |= {"num_experts": 1, "max_position_embeddings": 40, "canvas_length": 4, "num_answer_slots": 8}
    settings = {"train_expert_choice": "posterior", "mse_weight": 0.0, **sizes, **fields}
    model = YanForFlowGeneration(YanConfig(vocab_size=len(tokenizer), **settings)).eval()
    options = RunOptions(max_new_tokens=8, num_seeds=1)
    runs = run_model(model, tokenizer, ["hello"], ["one two three four five six seven eight nine ten eleven"], options)
    assert len(runs) == 4


def test_a_baseline_decodes_greedily_whatever_its_batch(gpt2, tokenizer, rows):
    sources, targets = [row["source"] for row in rows], [row["target"] for row in rows]
    options = RunOptions(max_new_tokens=10, batch_size=3)
    free, oracle = run_model(gpt2, tokenizer, sources, targets, options)
    for row, source in enumerate(sources):
        batch = tokenizer(source, return_tensors="pt")
        length = batch["input_ids"].shape[1]
        ids = batch["input_ids"]
        for _ in range(10):  # without cache, one row at a time
            with torch.no_grad():
                ids = torch.cat([ids, gpt2(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert free.passes[0].texts[row] == tokenizer.decode(ids[0, length:], skip_special_tokens=True)
        assert free.passes[0].num_tokens[row] == ids.shape[1] - length
        num_wanted = len(tokenizer(targets[row], add_special_tokens=False)["input_ids"])
        told = ids[0, length : length + min(10, num_wanted)]
        assert oracle.passes[0].texts[row] == tokenizer.decode(told, skip_special_tokens=True)


def test_seeds_change_the_sampled_run_alone_and_batches_have_their_own_noise(yan, tokenizer, rows):
    sources, targets = [row["source"] for row in rows], [row["target"] for row in rows]
    sources[4:] = sources[:4]  # the second batch has the prompts of the first
    yan.config.init_noise = 30.0  # so much that every noise gives another text
    options = RunOptions(max_new_tokens=8, num_flow_steps=1, canvas_length=8, num_seeds=2, batch_size=4)
    runs = run_model(yan, tokenizer, sources, targets, options)
    assert [(run.length, run.decoding, len(run.passes)) for run in runs] == [
        ("free", "sampled", 2),
        ("oracle", "sampled", 2),
        ("free", "deterministic", 1),
        ("oracle", "deterministic", 1),
    ]
    sampled, _, deterministic, _ = runs
    assert sampled.passes[0].texts != sampled.passes[1].texts
    assert sampled.passes[0].texts[:4] != sampled.passes[0].texts[4:]
    assert deterministic.passes[0].texts[:4] == deterministic.passes[0].texts[4:]
    answers = generate_answers(yan, tokenizer, sources, 4, num_flow_steps=1, canvas_length=8, max_new_tokens=8)
    assert deterministic.passes[0].texts == answers
    again = run_model(yan, tokenizer, sources, targets, options)
    assert [[one.texts for one in run.passes] for run in again] == [[one.texts for one in run.passes] for run in runs]


def test_a_long_source_keeps_its_end(yan, tokenizer, rows):
    options = {"num_flow_steps": 1, "canvas_length": 8, "max_new_tokens": 8, "max_source_length": 12}
    source = rows[0]["source"]
    end = tokenizer.decode(tokenizer(source)["input_ids"][-12:])
    yan.config.init_noise = 0.0
    before = tokenizer.truncation_side
    assert generate_answers(yan, tokenizer, [" ".join([source] * 50)], **options) == generate_answers(
        yan, tokenizer, [end], **options
    )
    assert tokenizer.truncation_side == before


def test_with_oracle_length_no_row_gets_more_tokens_than_its_reference(yan, tokenizer, rows):
    sources = [row["source"] for row in rows]
    targets = ["Yes.", *(row["target"] for row in rows[1:])]
    lengths = [len(ids) for ids in tokenizer(targets, add_special_tokens=False)["input_ids"]]
    assert len(set(lengths)) > 1
    calls, generate = [], yan.generate

    def record(**options):
        calls.append((options.get("canvas_length"), options["max_new_tokens"], len(options["input_ids"])))
        return generate(**options)

    yan.generate = record
    run = run_model(yan, tokenizer, sources, targets, RunOptions(16, canvas_length=8, num_seeds=1))[1]
    assert all(number <= length for number, length in zip(run.passes[0].num_tokens, lengths))
    told = [call for call in calls[1:] if call[:2] != (8, 16)]  # the first is the warm-up
    assert told == 2 * [(length, length, lengths.count(length)) for length in sorted(set(lengths))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas_length": 0}, "canvas_length=0: must be at least 1"),
        ({"num_diffusion_steps": -1}, "num_diffusion_steps=-1: must be at least 1"),
        ({"template": "{question}"}, "must hold {source}, and no other field"),
        ({"template": "{source} {context}"}, "must hold {source}, and no other field"),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunOptions(**options)


@pytest.mark.parametrize(
    "options", [{"return_prompt": False}, {"num_return_sequences": 2}, {"return_dict_in_generate": True}]
)
def test_there_is_one_answer_for_each_source(yan, tokenizer, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*: must be .*, or left out"):
        generate_answers(yan, tokenizer, ["Where is it?"], do_sample=True, **options)


@pytest.mark.slow
def test_further_options_reach_generate_and_those_of_a_run_are_refused(yan, tokenizer, rows, checkpoint, tmp_path):
    calls, generate = [], yan.generate
    yan.generate = lambda **options: calls.append(options) or generate(**options)
    sources, targets = [row["source"] for row in rows], [row["target"] for row in rows]
    run_model(yan, tokenizer, sources, targets, RunOptions(8, num_seeds=1, yan_options={"expert_choice": "mixture"}))
    assert all(call["expert_choice"] == "mixture" for call in calls[1:])  # the first is the warm-up
    with pytest.raises(ValueError, match="seed must not be there"):
        RunOptions(yan_options={"seed": 1})
    with pytest.raises(ValueError, match="return_prompt=False: must be True, or left out"):
        RunOptions(yan_options={"return_prompt": False})  # the prompt would be cut off a second time

    write_rows(tmp_path / "pairs.jsonl", rows)
    options = ("--data", tmp_path / "pairs.jsonl", "--max_new_tokens", 8, "--seeds", 1, "--output", tmp_path / "yan")
    evaluate_in_subprocess(
        "--model", checkpoint, *options, "--yan_options", "eos_strategy=first", "expert_choice=mixture"
    )
    report = json.loads((tmp_path / "yan" / "metrics.json").read_text())
    assert report["options"]["yan_options"] == {"eos_strategy": "first", "expert_choice": "mixture"}


def fake_report(folder, model, tokenizer, rows, texts, **options):
    """A report of a model whose answers are `texts`, one row after the other, again and again."""
    remaining = iter(texts * 100)

    def generate(input_ids, **options):
        answers = [next(remaining) for _ in input_ids]
        new = tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, new], 1)

    model.generate = generate
    return evaluate_task(model, tokenizer, rows, folder, RunOptions(8, batch_size=len(rows)), **options)


def test_figures_and_paired_tests_are_those_of_the_scores(gpt2, tokenizer, tmp_path):
    rows = [{"source": f"Question {number}", "target": "the key"} for number in range(6)]
    first, second = (["the key"] * right + ["a house"] * (6 - right) for right in (5, 1))
    fake_report(tmp_path / "first", gpt2, tokenizer, rows, first)
    report = fake_report(tmp_path / "second", gpt2, tokenizer, rows, second, compare=tmp_path / "first")
    a, b = ([float(text == "the key") for text in texts] for texts in (second, first))
    figure = report["runs"]["free"]["deterministic"]["metrics"]["exact_match"]
    assert (figure["mean"], figure["low"], figure["high"]) == mean_with_interval(a)
    assert (figure["per_seed"], figure["std"]) == ([1 / 6], None)
    test = report["comparison"]["runs"]["free"]["deterministic"]["metrics"]["exact_match"]
    assert tuple(test.values()) == (*paired_bootstrap(a, b), paired_permutation_test(a, b), mcnemar_exact(a, b))
    assert "p_mcnemar" not in report["comparison"]["runs"]["free"]["deterministic"]["metrics"]["unigram_entropy"]
    assert "-0.667" in format_report(report)


def test_predictions_come_back_whatever_characters_they_hold(gpt2, tokenizer, tmp_path):
    rows = [{"source": "Question\u2028one", "target": "a\x85b"}, {"source": "犬", "target": "ünïcode"}]
    texts = ["line\u2028separator\x85and\x0cothers", "ünïcode"]
    report = fake_report(tmp_path, gpt2, tokenizer, rows, texts)
    written = [line["prediction"] for line in lines_of(tmp_path) if line["length"] == "free"]
    assert written == [text.strip() for text in tokenizer.batch_decode(tokenizer(texts)["input_ids"])]
    scores = read_predictions(tmp_path, rows)[("free", "deterministic")]["exact_match"]
    assert scores.tolist() == [exact_match_scores(written, [row["target"] for row in rows])]
    assert report["runs"]["free"]["deterministic"]["metrics"]["exact_match"]["mean"] == scores.mean()


def test_one_row_and_empty_predictions_have_figures(gpt2, tokenizer, tmp_path, gpt2_folder):
    rows = [{"source": "Question", "target": "the key"}]
    report = fake_report(tmp_path / "one", gpt2, tokenizer, rows, ["</s>"], judge=gpt2_folder)
    figures = report["runs"]["free"]["deterministic"]["metrics"]
    assert figures["rougeL"]["mean"] == figures["token_f1"]["mean"] == figures["distinct_1"]["mean"] == 0
    assert figures["tokens_per_row"]["mean"] == 1
    assert "self_bleu" not in figures
    assert "generative_perplexity" not in figures


def test_another_data_set_is_no_comparison(gpt2, tokenizer, tmp_path):
    rows = [{"source": "Question", "target": "the key"}, {"source": "Other", "target": "a house"}]
    fake_report(tmp_path / "first", gpt2, tokenizer, rows, ["the key", "a house"])
    with pytest.raises(ValueError, match=r"has 2 rows: must have 1"):
        fake_report(tmp_path / "second", gpt2, tokenizer, rows[:1], ["a"], compare=tmp_path / "first")
    with pytest.raises(ValueError, match="row 1: source and target"):
        fake_report(tmp_path / "second", gpt2, tokenizer, [rows[0], rows[0]], ["a"], compare=tmp_path / "first")
    with pytest.raises(FileNotFoundError):
        fake_report(tmp_path / "second", gpt2, tokenizer, rows, ["a"], compare=tmp_path / "none")
    assert not (tmp_path / "second").exists()


def test_a_failure_while_writing_leaves_the_old_files(gpt2, tokenizer, tmp_path, monkeypatch):
    rows = [{"source": "Question", "target": "the key"}]
    fake_report(tmp_path, gpt2, tokenizer, rows, ["the key"])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fake_report(tmp_path, gpt2, tokenizer, rows, ["a house"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_what_is_missing_is_said_before_anything_is_generated(gpt2, tokenizer, tmp_path, monkeypatch):
    rows = [{"source": "Question", "target": "the key"}]
    monkeypatch.setitem(sys.modules, "mauve", None)
    gpt2.generate = None  # calling it would be a TypeError
    with pytest.raises(ImportError, match="pip install mauve-text"):
        evaluate_task(gpt2, tokenizer, rows, tmp_path, metrics=["mauve"], encoder=lambda texts: None)
    with pytest.raises(ValueError, match="metric bleu: must be among exact_match"):
        evaluate_task(gpt2, tokenizer, rows, tmp_path, metrics=["bleu"])
    with pytest.raises(ValueError, match=r"row 0 has the keys \['text'\]"):
        evaluate_task(gpt2, tokenizer, [{"text": "a"}], tmp_path)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_task(gpt2, tokenizer, [], tmp_path)
    with pytest.raises(ValueError, match="must be at most 0 for this model with 64 new tokens"):
        evaluate_task(gpt2, tokenizer, rows, tmp_path, RunOptions(max_new_tokens=64))


@pytest.mark.parametrize("options", [{"num_seeds": 0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"template": "x"}])
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.*must"):
        RunOptions(**options)


def test_a_template_makes_the_prompt(gpt2, tokenizer):
    seen = []

    def generate(input_ids, **options):
        seen.extend(tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        return torch.cat([input_ids, torch.full((len(input_ids), 1), 2)], 1)

    gpt2.generate = generate
    run_model(gpt2, tokenizer, ["Where {is} it?"], ["here"], RunOptions(4, template="Question: {source} Answer:"))
    expected = tokenizer.decode(tokenizer("Question: Where {is} it? Answer:")["input_ids"])
    assert {text.strip() for text in seen} == {expected.strip()}


def test_bert_score_and_semantic_distance_are_reported_with_one_encoder(gpt2, bert, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"source": "Question", "target": "the key"}, {"source": "Other", "target": "a house"}]
    names = ["bert_score", "semantic_distance"]
    answers = ["the key", "the key"]
    report = fake_report(tmp_path / "out", gpt2, tokenizer, rows, answers, metrics=names, encoder=tmp_path / "bert")
    scores = read_predictions(tmp_path / "out", rows)[("free", "deterministic")]
    assert scores["bert_score_f1"][0, 0] == pytest.approx(1)
    assert scores["bert_score_f1"][0, 1] < 0.99
    assert scores["semantic_distance"][0, 0] == 0 < scores["semantic_distance"][0, 1]
    assert set(report["runs"]["free"]["deterministic"]["metrics"]) == {
        *("bert_score_f1", "semantic_distance", "tokens_per_second", "tokens_per_row")
    }


def test_accuracy_of_labels_is_reported_where_it_is_asked_for(gpt2, tokenizer, tmp_path):
    rows = [{"source": "Question", "target": label} for label in ("news", "news", "the news")]
    answers = ["news", "fiction", "news"]
    report = fake_report(tmp_path / "out", gpt2, tokenizer, rows, answers, metrics=["accuracy"])
    assert report["runs"]["free"]["deterministic"]["metrics"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert "accuracy" not in DEFAULT_METRICS
