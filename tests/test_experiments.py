"""The experiments run from end to end at the smallest size, and their files say what was measured."""

import gzip
import json
import math
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.baselines import CONVOLVED, INPUT_ADAPTERS, count_parameters, make_baseline
from modeling_yan.data import read_rows, write_rows

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "checkpoints" / "yan-transformer-tiny"
RECIPES = sorted((ROOT / "configuration" / "recipes" / "experiments").glob("*.yaml"))
ARMS = [path for path in RECIPES if "arms" in yaml.safe_load(path.read_text())]
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
    """A small random YAN and autoregressive decoder, a preset, and twelve pairs."""
    torch.manual_seed(0)
    for name, model in (("yan", YanForFlowGeneration(config)), ("decoder", make_baseline("decoder", config))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    config.save_pretrained(tmp_path / "preset")
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    return tmp_path


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


def test_steps(load_script, folders, drawings):
    words = [
        "--model",
        folders / "yan",
        "--data",
        folders / "pairs.jsonl",
        "--steps",
        1,
        3,
        "--output",
        folders / "out",
    ]
    load_script("steps").main(list(map(str, words)))
    table = json.loads((folders / "out" / "steps.json").read_text())["table"]
    assert [row["steps"] for row in table] == [1, 3]
    assert all(0 <= row["rougeL"]["low"] <= row["rougeL"]["mean"] <= row["rougeL"]["high"] <= 1 for row in table)
    assert table[-1]["exact_match"]["p"] == 1.0  # against itself
    assert drawings["steps.png"] == [[[row[name]["mean"] for row in table] for name in ("exact_match", "rougeL")]]


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


def test_diversity_of_yan_and_of_an_autoregressive_model(load_script, folders, drawings):
    words = ["--model", folders / "yan", folders / "decoder", "--data", folders / "pairs.jsonl", "--num_candidates", 2]
    words += ["--temperatures", 0, 1, "--num_rows", 4, "--max_new_tokens", 5, "--expert_choice", "argmax"]
    load_script("diversity").main([*map(str, words), "--ranked", "--output", str(folders / "out")])
    table = json.loads((folders / "out" / "diversity.json").read_text())["table"]
    assert [(row["model"], row["temperature"]) for row in table] == [
        (name, temperature) for name in ("yan", "decoder") for temperature in (0, 1, None)
    ]
    for row in table:
        assert row["different_texts"][0] == pytest.approx(1 / 2) if row["temperature"] == 0 else True
        assert row["best_exact_match"][0] >= row["exact_match"][0]
    assert table[-2]["different_texts"][0] > 0.9
    assert table[-1]["different_texts"][0] == 1.0  # beams
    assert table[0]["best_rougeL_difference"] == [0, 0, 0, 1]
    for row in table:
        for name in ("best_exact_match", "best_rougeL"):
            assert row[f"{name}_difference"][0] == pytest.approx(row[name][0] - table[0][name][0])
    best = [row["best_exact_match"][0] for row in table]
    assert drawings["diversity.png"][2] == [
        best[:2],
        [best[2]] * 2,
        best[3:5],
        [best[5]] * 2,
    ]  # ranked: from side to side


def test_reranking(load_script, folders, drawings):
    words = ["--model", folders / "yan", "--data", folders / "pairs.jsonl", "--num_candidates", 3, "--num_rows", 4]
    load_script("reranking").main([*map(str, words), "--output", str(folders / "out")])
    table = json.loads((folders / "out" / "reranking.json").read_text())["tables"]["pairs"]
    assert [row["choice"] for row in table] == ["first", "own", "mean", "agreement", "velocity", "best"]
    assert table[0]["rougeL"]["difference"] == 0
    assert all(row["exact_match"]["mean"] <= table[-1]["exact_match"]["mean"] for row in table)
    assert drawings["reranking.png"] == [[[row["exact_match"]["mean"] for row in table]]]


def test_each_way_of_reranking_chooses_what_it_says(load_script, folders, monkeypatch):
    script = load_script("reranking")
    monkeypatch.setattr(script, "velocity_likelihood", lambda *_: torch.tensor([[0.0, 2.0, 1.0]]))
    canvases = torch.tensor([[[0, 1], [2, 2], [2, 3]]])
    # text 0 is certain where it was read off and impossible elsewhere; text 1 is fair everywhere; text 2 agrees most
    sure, fair = [[0.97, 0.01, 0.01, 0.01], [0.01, 0.97, 0.01, 0.01]], [[0.01, 0.01, 0.97, 0.01], [0, 0, 0.6, 0.4]]
    probabilities = [torch.tensor([each]) for each in (sure, fair, fair)]
    ways = script.rank(None, None, canvases, [each.log() for each in probabilities], num_times=1)
    assert {name: index.item() for name, index in ways.items() if name != "agreement"} == {
        "first": 0, "own": 0, "mean": 1, "velocity": 1,
    }  # fmt: skip
    assert script.rank(None, None, canvases[:, [0, 1, 1]], [each.log() for each in probabilities], 1)["agreement"] == 1


@torch.no_grad()
def test_the_velocitys_likelihood_is_that_of_the_mixture(load_script, folders):
    script, model = load_script("reranking"), YanForFlowGeneration.from_pretrained(folders / "yan").eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    canvases = torch.randint(4, 50, (1, 2, 16), generator=torch.Generator().manual_seed(0))
    scores = script.velocity_likelihood(model, batch, canvases, num_times=1)
    condition = model.condition(model.model(**batch).last_hidden_state, batch["attention_mask"], 16)
    for index in range(2):
        x_1 = model.model(canvases[:, index]).last_hidden_state
        x_0, modulation = model.start_noise((1, 16), x_1, seed=1), model.flow.modulation(torch.tensor([0.5]))
        states = model.flow.trunk((x_0 + x_1) / 2, model._positions(16), modulation, condition)
        velocities = model.flow.velocities(states, (x_0 + x_1) / 2)
        nll = model._nll(x_1 - x_0, velocities, model.flow.gate_log_probs(states, modulation, condition))
        torch.testing.assert_close(scores[0, index], -16 * nll)


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


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in ARMS], ids=lambda path: path.stem)
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


@pytest.mark.parametrize("path", ARMS, ids=lambda path: path.stem)
def test_the_arms_of_a_recipe_are_valid_and_of_one_size(load_script, path):
    script = load_script("ablate")
    recipe = script.read_recipe(path)
    preset = YanConfig.from_pretrained(ROOT / recipe["config"])
    arms = [fields or {} for fields in recipe["arms"].values()]
    if recipe["share_autoencoder"]:  # the arms are as large as they come
        configs = [preset.with_fields(**fields) for fields in arms]
    else:
        configs = [script.match_size(preset, **fields) for fields in arms]
    assert len({json.dumps(config.to_dict(), sort_keys=True) for config in configs}) == len(configs)
    assert all(count_parameters(config) == pytest.approx(count_parameters(preset), rel=0.005) for config in configs)


def test_arms_are_trained_and_compared_and_go_on_where_they_were(load_script, folders):
    stage = {"max_words": 16, "warmup_steps": 1, "per_device_train_batch_size": 4, "peak_tflops": 0.1}
    arms = {"narrow": {"flow_sigma": 0.5}, "wide": {"flow_sigma": 2.0}}
    recipe = {"config": str(folders / "preset"), "share_autoencoder": True, "autoencoder": stage, "flow": stage}
    (folders / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "arms": arms}))
    words = [folders / "recipe.yaml", "--tokenizer", folders / "yan", "--train_file", folders / "pairs.jsonl"]
    words += ["--validation_file", folders / "pairs.jsonl", "--test_file", folders / "pairs.jsonl", "--max_steps", 1]
    words += ["--num_rows", 3, "--seeds", 1, "--max_new_tokens", 4, "--use_cpu"]
    script = load_script("ablate")
    for _ in range(2):  # the second time there is nothing left to train
        script.main(list(map(str, [*words, "--output_dir", folders / "out"])))
    assert YanConfig.from_pretrained(folders / "out" / "wide" / "wide").flow_sigma == 2.0
    table = (folders / "out" / "table.md").read_text()
    assert len(table.splitlines()) == 2 + 2 * 4
    finished = ["--output_dir", folders / "again", "--autoencoder", folders / "out" / "autoencoder"]
    script.main(list(map(str, [*words, *finished])))
    assert not (folders / "again" / "autoencoder").exists()
    wide = [load_file(folders / name / "wide" / "wide" / "model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(wide[0][name], wide[1][name]) for name in wide[0])


def test_a_chart_shows_the_tables_of_other_scripts(load_script, tmp_path, drawings):
    cells = {"exact_match": {"mean": 0.5, "low": 0.4, "high": 0.7}, "tokens_per_second": {"mean": 9.0}}
    rows = [
        {"model": model, "length": length, "decoding": decoding, "figures": cells}
        for model in ("yan", "decoder")
        for length in ("free", "oracle")
        for decoding in ("sampled", "deterministic")
    ]
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "table.json").write_text(json.dumps(rows))
    chart = load_script("chart")
    assert chart.read_bars(tmp_path / "stories", "exact_match", "free") == dict.fromkeys(
        ("yan", "decoder"), cells["exact_match"]
    )
    chart.main([str(tmp_path / "stories"), "--output", str(tmp_path / "figures" / "chart.png")])
    assert drawings["chart.png"][0] == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="figure 'tokens_per_second' must be one of exact_match"):
        chart.main([str(tmp_path / "stories"), "--figures", "tokens_per_second", "--output", str(tmp_path / "x.png")])


def test_a_chart_shows_the_table_of_a_page(load_script, tmp_path, drawings):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n## Empty\n\nWords | only.\n\n## Measured\n\n"
        "| | stories: exact match | ROUGE-L | p |\n|---|---|---|---|\n"
        "| a very long name of the `decoder` | 0.5 | 0.25 (0.2 to 0.375) | |\n"
        "| difference | +0.4 (+0.3 to +0.5) | -0.1 | 0.01 (paired) |\n"
        "| **YAN** | **0.9** (0.75 to 1.0) | | 1 |\n\n| another | table |\n|---|---|\n| x | 0.7 |\n"
    )
    chart = load_script("chart")
    decoder = "a very long name of the decoder"
    assert chart.read_section(page, "Measured") == [
        ("stories", "exact match", {decoder: {"mean": 0.5}, "YAN": {"mean": 0.9, "low": 0.75, "high": 1.0}}),
        ("ROUGE-L", "ROUGE-L", {decoder: {"mean": 0.25, "low": 0.2, "high": 0.375}}),
    ]
    chart.main([str(page), "--section", "Measured", "--output", str(tmp_path / "chart.png")])
    assert drawings["chart.png"] == [[[0.5, 0.9]], [[0.25]]]
    with pytest.raises(ValueError, match="section 'Missing' must be one of Empty, Measured"):
        chart.read_section(page, "Missing")
    with pytest.raises(ValueError, match="section 'Empty' has no table of figures"):
        chart.read_section(page, "Empty")


def test_a_finished_first_stage_and_an_unknown_baseline_are_refused(load_script, capsys):
    mixers = ROOT / "configuration" / "recipes" / "experiments" / "mixers.yaml"
    words = "--tokenizer t --train_file a --validation_file b --test_file c --output_dir d".split()
    script = load_script("ablate")
    for more, message in ((["--autoencoder", "e"], "have one each"), (["--baseline", "f"], "transformer, mamba")):
        with pytest.raises(SystemExit):
            script.main([str(mixers), *words, *more])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["compare", "ablate"])
def test_what_evaluation_lacks_is_missed_before_anything_is_trained(load_script, folders, script, monkeypatch):
    def old_scorer(names, use_stemmer):
        raise AssertionError("must not get so far")

    module = load_script(script)
    first = f"--config={folders / 'preset'}" if script == "compare" else RECIPES[0]
    words = [first, "--tokenizer", folders / "yan", "--output_dir", folders / "missed", "--metrics", "rouge"]
    words += [word for name in ("train", "validation", "test") for word in (f"--{name}_file", folders / "pairs.jsonl")]
    monkeypatch.setattr("rouge_score.rouge_scorer.RougeScorer", old_scorer)
    with pytest.raises(TypeError, match="tokenizer"):
        module.main(list(map(str, words)))
    assert not (folders / "missed").exists()
    words[words.index("--test_file") + 1] = folders / "nowhere.jsonl"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module.main(list(map(str, words)))
    assert not (folders / "missed").exists()


def test_a_recipe_with_an_unknown_name_is_refused(load_script, tmp_path):
    (tmp_path / "recipe.yaml").write_text("config: a\narm: {}\n")
    with pytest.raises(ValueError, match="must have config, share_autoencoder, autoencoder, flow, arms"):
        load_script("ablate").read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_yan_and_all_baselines_are_trained_and_compared(load_script, folders):
    words = ["--config", folders / "preset", "--tokenizer", folders / "yan", "--output_dir", folders / "out"]
    words += [word for name in ("train", "validation", "test") for word in (f"--{name}_file", folders / "pairs.jsonl")]
    (folders / "more.jsonl.gz").write_bytes(gzip.compress((folders / "pairs.jsonl").read_bytes()))
    words += [folders / "more.jsonl.gz", "--metrics", "exact_match", "rouge", "--max_steps", 4, "--warmup_steps", 1]
    words += ["--trial_share", 0.5, "--learning_rates", 1e-3, 3e-3]
    words += ["--per_device_train_batch_size", 4, "--num_rows", 3, "--seeds", 1, "--max_new_tokens", 4, "--use_cpu"]
    words += ["--peak_tflops", 0.1]
    compare = load_script("compare")
    assert set(compare.parse_options(list(map(str, words))).models) == {"yan", "flow_matching", *INPUT_ADAPTERS} - {
        *CONVOLVED
    }
    compare.main(list(map(str, [*words, "--models", "yan", "flow_matching", *INPUT_ADAPTERS])))
    rows = json.loads((folders / "out" / "pairs" / "table.json").read_text())
    assert {row["model"] for row in rows} == {"yan", "flow_matching", *INPUT_ADAPTERS}
    more = json.loads((folders / "out" / "more" / "table.json").read_text())
    scores = [[row["figures"]["rougeL"]["mean"] for row in table] for table in (rows, more)]
    assert scores[0] == scores[1]
    results = [folders / "out" / "more" / name for name in ("yan", "decoder")]
    words = [*results, "--baseline", results[1], "--data", folders / "more.jsonl.gz", "--num_rows", 3]
    load_script("merge_reports").main(list(map(str, [*words, "--output", folders / "joined"])))
    joined = json.loads((folders / "joined" / "table.json").read_text())
    assert all(row in more for row in joined)
    sizes = [row["parameters"] for row in rows]
    assert max(sizes) < 1.05 * min(sizes)
    for name in ("yan/autoencoder", "yan/yan", "flow_matching/flow_matching", *INPUT_ADAPTERS):
        record = json.loads((folders / "out" / "training" / name / "learning_rates.json").read_text())
        assert record["chosen"] in (1e-3, 3e-3)


def test_a_teacher_writes_the_targets_of_some_tasks(load_script, folders, tokenizer):
    """Sources of different lengths in one batch, and a tokenizer that pads on the right."""
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folders / "decoder")
    rows = [
        {**row, "source": row["source"] + " Mary went." * (number % 4), "task": "where" if number % 3 else "other"}
        for number, row in enumerate(ROWS)
    ]
    write_rows(folders / "tasks.jsonl", rows)
    words = ["--model", folders / "decoder", "--data", folders / "tasks.jsonl", "--tasks", "where", "--batch_size", 3]
    words += ["--max_new_tokens", 4, "--output", folders / "distilled.jsonl.gz"]
    distill = load_script("distill")
    distill.main(list(map(str, words)))
    model = AutoModelForCausalLM.from_pretrained(folders / "decoder").eval()
    distilled = read_rows(folders / "distilled.jsonl.gz")
    for old, new in zip(rows, distilled, strict=True):
        if old["task"] == "other":
            assert new == old
            continue
        prompt = tokenizer(old["source"], return_tensors="pt")["input_ids"]
        written = model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
        answer = tokenizer.decode(written, skip_special_tokens=True)
        assert new == ({**old, "target": answer, "reference": old["target"]} if answer else old)
    assert len({row["target"] for row in distilled if "reference" in row}) > 1
    write_rows(folders / "texts.jsonl", [{"text": "Mary went."}])
    for wrong in (["--tasks", "when"], ["--data", str(folders / "texts.jsonl")]):
        with pytest.raises(SystemExit):
            distill.main([*map(str, words), *wrong])
