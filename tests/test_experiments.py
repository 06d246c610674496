"""The experiments run from end to end at the smallest size, and their files say what was measured."""

import json
import math
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.data import write_rows

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "checkpoints" / "yan-transformer-tiny"
RECIPES = sorted((ROOT / "configuration" / "recipes" / "experiments").glob("*.yaml"))
ROWS = [
    {"source": f"Question: Where is {name}? {name} went to the {place}.", "target": f"{name} is in the {place}."}
    for name in ("Mary", "John", "Lucy", "Peter")
    for place in ("garden", "office", "market")
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def config(tokenizer):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
    sizes |= {"num_decoder_layers": 1, "max_position_embeddings": 64, "canvas_length": 16, "num_experts": 2}
    sizes["attention_conv_kernel"] = 3
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    return YanConfig(vocab_size=len(tokenizer), initializer_range=0.3, tie_word_embeddings=True, **sizes, **ids)


@pytest.fixture
def folders(config, tokenizer, tmp_path):
    """A small random YAN and twelve pairs."""
    torch.manual_seed(0)
    YanForFlowGeneration(config).save_pretrained(tmp_path / "yan")
    tokenizer.save_pretrained(tmp_path / "yan")
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    return tmp_path


def test_what_the_experts_of_a_model_do(load_script, folders, config, tokenizer, capsys):
    script = load_script("expert_texts")
    words = ["--data", str(folders / "pairs.jsonl"), "--num_rows", "5", "--output", str(folders / "experts.json")]
    with pytest.raises(SystemExit):
        script.main(["--model", str(folders / "yan"), *words])
    assert "must have experts of whole texts" in capsys.readouterr().err
    torch.manual_seed(0)
    fields = {"expert_scope": "sequence", "train_expert_choice": "posterior", "mse_weight": 0.0, "num_experts": 3}
    model = YanForFlowGeneration(config.with_fields(**fields)).eval()
    model.save_pretrained(folders / "experts")
    tokenizer.save_pretrained(folders / "experts")
    script.main(["--model", str(folders / "experts"), *words])
    found = json.loads((folders / "experts.json").read_text())
    assert found["rows"] == 5
    assert found["prompts"] == [row["source"] for row in ROWS[:2]]
    for name in ("gate", "usage"):
        assert sum(expert[name] for expert in found["experts"]) == pytest.approx(1, abs=1e-5)
    gates = [expert["gate"] for expert in found["experts"]]
    assert gates == sorted(gates, reverse=True)
    assert all(0 <= value <= math.log(3) + 0.01 for value in found["information"].values())
    inputs = tokenizer([ROWS[1]["source"]], return_tensors="pt")
    best = model.generate(**inputs, expert_choice="ranked", return_prompt=False, return_dict_in_generate=True)
    text = tokenizer.decode(best.sequences[0], skip_special_tokens=True).strip()
    assert text in [expert["examples"][1] for expert in found["experts"]]


def test_geometry(load_script, folders, drawings):
    words = ["--model", folders / "yan", "--data", folders / "pairs.jsonl", "--output", folders / "out"]
    load_script("geometry").main(list(map(str, words)))
    record = json.loads((folders / "out" / "geometry.json").read_text())
    latents, normal = record["latents"].values()
    assert latents["num_latents"] == normal["num_latents"] > 64
    assert abs(normal["mean_cosine"]) < 0.05 < normal["effective_dimension"]
    assert all(sum(shares) == pytest.approx(1) for shares in record["expert_usage"].values())
    variance, _, usage = drawings["geometry.png"]
    assert variance == [list(found["explained_variance"].values()) for found in (latents, normal)]
    for shown, shares in zip(usage, zip(*record["expert_usage"].values(), strict=True), strict=True):
        assert sorted(shown) == pytest.approx(sorted(shares))


def test_kinds_of_tokens(load_script, tokenizer):
    kind = load_script("geometry").token_class
    ids = tokenizer("Mary is garden .", add_special_tokens=False)["input_ids"]
    kinds = [kind(token, tokenizer) for token in ids]
    assert kinds[0] == "capitalised"
    assert "short word" in kinds
    assert kinds[-1] == "punctuation"
    assert kind(tokenizer.eos_token_id, tokenizer) == kind(tokenizer.pad_token_id, tokenizer) == "fill"


@pytest.mark.parametrize("name", ["experts", "sigma", "choice"])
def test_mixtures(load_script, tmp_path, name, drawings):
    script = load_script("mixtures")
    sizes = ["--num_seeds", "1", "--num_updates", "2", "--num_samples", "50"]
    script.main([name, "--output", str(tmp_path), *sizes])
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert len(results) == 2 * len(script.EXPERIMENTS[name])
    shown = [line for panel in drawings[f"{name}.png"] for line in panel]
    assert shown == [[errors["astray"]["mean"] for errors in entry["errors"].values()] for entry in results]


@pytest.mark.parametrize("dimension", [2, 16])
def test_the_errors_of_the_target_itself_are_small(load_script, dimension):
    script = load_script("mixtures")
    found = script.errors(script.sample_target(8000, dimension))
    assert found["astray"] < 0.004
    assert found["unevenness"] < 0.03
    assert script.errors(torch.zeros(10, dimension))["astray"] == 1
    assert script.errors(script.centres(dimension)[:4])["unevenness"] == pytest.approx(0.5)


def test_the_networks_of_the_mixtures_are_of_about_one_size(load_script):
    script = load_script("mixtures")
    sizes = [sum(p.numel() for p in script.VelocityNet(16, count).parameters()) for count in (1, 2, 4, 8)]
    assert max(sizes) < 1.05 * min(sizes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_script_that_a_recipe_is_named_after_takes_its_options(load_script, path):
    main, recipe = load_script(path.stem.split("-")[0]).main, yaml.safe_load(path.read_text())
    given = parsed_by(main, ["--recipe", str(path)])
    assert {name: as_words(given[name]) for name in recipe} == {name: as_words(recipe[name]) for name in recipe}


def parsed_by(main, words) -> dict:
    """What a script takes from its words, where none of them has to be there."""

    class Parsed(Exception):
        pass

    def parse(parser, words):
        for action in parser._actions:
            action.required = False
        raise Parsed(vars(parser.parse_known_args(words)[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed) as caught:
            main(words)
    return caught.value.args[0]


def as_words(value) -> list:
    """Numbers or strings, however a parser or YAML reads them."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [float(each) if isinstance(each, (int, float)) or each[:1].isdigit() else str(each) for each in values]
