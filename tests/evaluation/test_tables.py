"""Models of every kind on the same rows, in one table."""

import json

import pytest
import torch

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.baselines import BASELINES, make_baseline
from modeling_yan.evaluation import RunOptions, evaluate_models, format_table, load_for_generation
from modeling_yan.evaluation.runs import run_model

ROWS = [
    {"source": "Question: Where is Mary?", "target": "Mary is in the garden."},
    {"source": "Question: Who has the apple? Mary took the apple.", "target": "Mary has the apple."},
    {"source": "Where?", "target": "Nobody knows."},
]
OPTIONS = RunOptions(max_new_tokens=6, num_flow_steps=1, num_diffusion_steps=2, num_seeds=2, batch_size=2)


@pytest.fixture
def config(tokenizer):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
    sizes |= {"num_decoder_layers": 1, "max_position_embeddings": 64, "canvas_length": 8}
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    }
    return YanConfig(vocab_size=len(tokenizer), initializer_range=0.3, attention_conv_kernel=3, **sizes, **ids)


@pytest.fixture
def make(config):
    """Function from the kind of a model to a small random one."""

    def make_model(kind):
        torch.manual_seed(0)
        return (YanForFlowGeneration(config) if kind == "yan" else make_baseline(kind, config)).eval()

    return make_model


@pytest.fixture
def folders(make, tokenizer, tmp_path):
    """Folders of a YAN and of every baseline, by kind."""
    for kind in ("yan", *BASELINES):
        for part in (make(kind), tokenizer):
            part.save_pretrained(tmp_path / "models" / kind)
    return {kind: str(tmp_path / "models" / kind) for kind in ("yan", *BASELINES)}


@pytest.mark.parametrize("kind", ["yan", *BASELINES])
def test_every_kind_is_loaded_as_what_it_is(kind, folders, make):
    model = load_for_generation(folders[kind])
    assert type(model) is type(make(kind))
    assert not model.training


@pytest.mark.parametrize("kind", BASELINES)
def test_every_baseline_is_asked_for_new_text_alone_with_and_without_the_length(kind, make, tokenizer, monkeypatch):
    model, calls = make(kind), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: calls.append(options) or generate(**options))
    sources, references = ([row[key] for row in ROWS] for key in ("source", "target"))
    runs = run_model(model, tokenizer, sources, references, OPTIONS)
    assert [(run.length, run.decoding, len(run.passes)) for run in runs] == [
        ("free", "deterministic", 1),
        ("oracle", "deterministic", 1),
    ]
    for run, most in zip(runs, (6, 8)):
        (result,) = run.passes
        assert len(result.texts) == 3
        assert all(1 <= number <= most for number in result.num_tokens)
        assert not any("Question" in text and text.startswith("Question") for text in result.texts)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references]
    asked = {call["max_new_tokens"] for call in calls}
    assert asked == {1, 6, *(min(length, 8) if "masked_diffusion" in kind else length for length in lengths)}
    if "masked_diffusion" in kind:
        assert all(call["num_diffusion_steps"] == 2 for call in calls[1:])


def test_the_canvas_of_masked_diffusion_is_never_wider_than_it_can_be(make, tokenizer):
    options = RunOptions(max_new_tokens=50, num_diffusion_steps=1)
    sources, references = ([row[key] for row in ROWS] for key in ("source", "target"))
    free, _ = run_model(make("masked_diffusion"), tokenizer, sources, references, options)
    assert max(free.passes[0].num_tokens) <= 8


def test_a_table_of_every_kind_with_paired_tests(folders, tmp_path):
    names = [folders[kind] for kind in ("yan", "decoder", "encoder_decoder", "masked_diffusion")]
    reports = evaluate_models(names, ROWS, tmp_path / "out", OPTIONS, folders["decoder"], metrics=["exact_match"])
    assert list(reports) == ["decoder", "yan", "encoder_decoder", "masked_diffusion"]
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert len(rows) == 4 + 3 * 2
    assert all(row["parameters"] > 0 and row["figures"]["exact_match"]["mean"] >= 0 for row in rows)
    assert all(bool(row["against_baseline"]) == (row["model"] != "decoder") for row in rows)
    assert all((tmp_path / "out" / kind / "predictions.jsonl").exists() for kind in reports)
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table == format_table(reports).splitlines()
    assert len(table) == 2 + 10
    assert [line.split(" | ")[0] for line in table[2:]] == ["| free"] * 5 + ["| oracle"] * 5


def test_the_table_says_what_it_was_given():
    figure = {"mean": 0.5, "low": 0.25, "high": 0.75}
    metrics = {"exact_match": figure, "tokens_per_second": {"mean": 1234.5}}
    run = {"deterministic": {"metrics": metrics}}
    seeds = {"exact_match": {**figure, "std": 0.0625}, "tokens_per_second": {"mean": 1234.5, "std": 7.0}}
    test = {"difference": -0.25, "p_permutation": 0.0123}
    reports = {
        "a": {"runs": {"free": {**run, "sampled": {"metrics": seeds}}}, "num_parameters": 2000},
        "b": {
            "runs": {"free": run},
            "comparison": {"runs": {"free": {"deterministic": {"metrics": {"exact_match": test}}}}},
        },
    }
    head = (
        "| length | model | decoding | parameters | exact_match | tokens_per_second | exact match minus baseline (p) |"
    )
    assert format_table(reports).splitlines() == [
        head,
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| free | a | deterministic | 2,000 | 0.500 (0.250 to 0.750) | 1234 |  |",
        "| free | a | sampled | 2,000 | 0.500 ± 0.062 (0.250 to 0.750) | 1234 ± 7 |  |",
        "| free | b | deterministic |  | 0.500 (0.250 to 0.750) | 1234 | -0.250 (0.0123) |",
    ]


def test_a_baseline_that_is_not_there_and_equal_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="baseline='c': must be one of the models, a, b"):
        evaluate_models(["a", "b"], ROWS, tmp_path, baseline="c")
    with pytest.raises(ValueError, match="must differ"):
        evaluate_models(["x/model", "y/model"], ROWS, tmp_path)
