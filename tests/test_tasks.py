"""Tasks with several training seeds, and the page that is made from their tables."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

from modeling_yan import YanConfig
from modeling_yan.data import read_rows, write_rows

ROOT = Path(__file__).parents[1]
TASKS = sorted((ROOT / "configuration" / "recipes" / "tasks").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "examples/checkpoints/yan-transformer-tiny")


@pytest.fixture
def config(tokenizer):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_encoder_layers": 1, "num_flow_layers": 1}
    sizes |= {"num_decoder_layers": 1, "max_position_embeddings": 64, "num_experts": 2}
    return YanConfig(vocab_size=len(tokenizer), canvas_length=16, attention_conv_kernel=3, **sizes)


def test_several_answers_are_as_frequent_as_they_are_right(load_script, tmp_path):
    script = load_script("several_answers")
    script.main(["--output_dir", str(tmp_path), "--num_prompts", "3", "--num_rows", "3000"])
    answers = script.make_answers(3)
    words = [word for prompt, texts in answers.items() for word in [prompt, *" ".join(texts).split()]]
    assert len(set(words)) == 3 * 9
    for texts in answers.values():
        first, second, third = (text.split() for text in texts)
        assert first[0] == second[0] != third[0]
    drawn = read_rows(tmp_path / "several_answers-train.jsonl.gz")
    shares = [sum(row["target"] == texts[2] for row in drawn) for texts in answers.values()]
    assert abs(sum(shares) / 3000 - 0.4) < 0.05
    test = read_rows(tmp_path / "several_answers-test.jsonl.gz")
    assert [sum(row["target"] == text for row in test) for text in next(iter(answers.values()))] == [3, 3, 4]


def test_rows_of_tasks_are_made_of_their_public_files(load_script, tmp_path):
    script = load_script("task_rows")
    story = " ".join(f"Sentence {number} ends here." for number in range(9))
    write_rows(tmp_path / "e2e-validation.jsonl.gz", [{"source": str(i % 20), "target": str(i)} for i in range(60)])
    write_rows(tmp_path / "e2e-test.jsonl.gz", [{"source": "a", "target": "b"}])
    for part in ("train", "validation", "test"):
        for name in ("tinystories", "fairytaleqa_sections"):
            write_rows(tmp_path / f"{name}-{part}.jsonl.gz", [{"text": story}] * 4)
    for part in ("train", "test"):
        write_rows(tmp_path / f"scan-{part}.jsonl.gz", [{"source": "jump left", "target": "I_TURN_LEFT I_JUMP"}] * 10)
    for part in ("train", "validation", "test"):
        write_rows(tmp_path / f"agnews-{part}.jsonl.gz", [{"source": "s", "target": "Sci/Tech"}])
        source = "The ship 's crew ( of 9 ) sank it : a 'Manchu' . [ 1 ]" if part == "train" else "s"
        write_rows(tmp_path / f"dbpedia-{part}.jsonl.gz", [{"source": source, "target": "MeanOfTransportation"}])
        questions = [{"source": f"{part} {n}", "target": "n,w", "task": f"qa{n % 2}"} for n in range(300)]
        shared = [{"source": "Where?", "target": "hall", "task": "qa1"}]
        write_rows(tmp_path / f"babi-{part}.jsonl.gz", questions + shared)
    for name in ("wikitext103", "narrativeqa_summaries"):
        texts = [{"text": "One two three four five six seven eight 9 ."}] * 5 + [{"text": "Too short ."}]
        write_rows(tmp_path / f"{name}-validation.jsonl.gz", texts)
        write_rows(tmp_path / f"{name}-test.jsonl.gz", texts)
    words = [{"source": f"story {number}", "target": "here"} for number in range(3)]
    write_rows(tmp_path / "tinystories_lastword-validation.jsonl.gz", words)
    script.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "rows")])
    parts = {path.name.split(".")[0]: read_rows(path) for path in (tmp_path / "rows").iterdir()}
    train, held_out = ({row["source"] for row in parts[f"e2e-{part}"]} for part in ("train", "validation"))
    assert (len(train), len(held_out), train & held_out) == (18, 2, set())
    assert {name: len(rows) for name, rows in parts.items() if "continuation" in name} == {
        "continuation-train": 16,
        "continuation-validation": 12,
        "continuation-test": 12,
    }
    first = parts["continuation-train"][0]
    assert first["target"] == "Sentence 3 ends here."
    assert f"{first['source']} {first['target']}" in story
    assert [len(parts[f"scan-{part}"]) for part in ("train", "validation", "test")] == [9, 1, 10]
    assert parts["scan-test"][0]["target"] == "TURNLEFT JUMP"
    assert parts["agnews-train"] == [{"source": "s", "target": "sci tech"}]
    assert parts["dbpedia-train"][0]["source"] == "The ship's crew (of 9) sank it: a 'Manchu'. [1]"
    assert parts["dbpedia-test"] == [{"source": "s", "target": "mean of transportation"}]
    assert Counter(row["task"] for row in parts["babi-test"]) == {"qa0": 100, "qa1": 100}
    assert {row["target"] for row in parts["babi-validation"]} == {"n w", "hall"}
    assert [len(parts[f"babi-{part}"]) for part in ("train", "validation")] == [300, 301]
    assert [len(parts[f"lastword-{part}"]) for part in ("train", "validation", "test")] == [24, 2, 1]
    assert parts["lastword-train"][0] == {"source": story.split(" here. Sentence 4")[0], "target": "here"}
    assert [len(parts[f"maskedword-{part}"]) for part in ("train", "validation", "test")] == [32, 2, 10]
    whole = "One two three four five six seven eight 9 ."
    assert all(row["source"].replace("[MASK]", row["target"]) == whole for row in parts["maskedword-train"])
    assert len({row["target"] for row in parts["maskedword-train"][:4]}) == 4


TASK_ARMS = {
    "YAN": {},
    "one expert": {"fields": {"num_experts": 1, "moe_intermediate_size": 32, "expert_scope": "token"}},
    "one pass": {"kind": "one pass"},
    "one pass with a CRF": {"kind": "one pass, joint"},
    "one pass with cross-attention": {"kind": "one pass, cross-attention"},
    "AR decoder": {"kind": "decoder"},
    "taught": {"teacher": "AR decoder"},
    "most frequent answer": {"kind": "most frequent"},
}


@pytest.fixture
def task_recipe(config, tmp_path):
    """Path of a recipe of the smallest size, beside the rows of its task."""
    load = importlib.util.spec_from_file_location("answers", ROOT / "examples/experiments/several_answers.py")
    answers = importlib.util.module_from_spec(load)
    load.loader.exec_module(answers)
    answers.main(["--output_dir", str(tmp_path), "--num_prompts", "2", "--num_rows", "40"])
    config.save_pretrained(tmp_path / "preset")
    fields = {"canvas_length": 16, "num_answer_slots": 16, "moe_intermediate_size": 16, "expert_scope": "sequence"}
    fields |= {"train_expert_choice": "posterior", "crf_rank": 4}
    fields |= {"intermediate_size": 128}
    recipe = {"task": "several_answers", "config": str(tmp_path / "preset"), "fields": fields, "vocab_size": 300}
    recipe |= {
        "updates": 2,
        "autoencoder_share": 0.5,
        "batch_size": 4,
        "steps": [1],
        "temperatures": [1.0],
        "draws": 2,
    }
    path = tmp_path / "several_answers.yaml"
    stages = {"tiny-autoencoder": {"max_steps": 2, "decay_steps": 1, "config": str(tmp_path / "preset")}}
    slots = "canvas_length=16,num_answer_slots=16,copy_prompt_to_slots=true"
    stages["tiny-autoencoder"]["config_overrides"] = slots
    arms = {**TASK_ARMS, "by the recipes": {"recipes": {**stages, "tiny-flow": {"max_steps": 2, "decay_steps": 1}}}}
    recipe |= {"training": {"max_source_length": 8}, "arms": arms}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture
def words(task_recipe, tmp_path):
    """What begins the command that trains the arms of the recipe."""
    return [str(task_recipe), "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--use_cpu"]


@pytest.mark.slow
def test_tasks_train_every_arm(load_script, words, tmp_path):
    load_script("tasks").main([*words, "--seeds", "0", "1"])
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["runs"]) == [*TASK_ARMS, "by the recipes"]
    assert all(list(seeds) == ["0", "1"] for seeds in table["runs"].values())
    first = {arm: seeds["0"] for arm, seeds in table["runs"].items()}
    assert list(first["YAN"]["best"]) == ["0", "1"]
    assert list(first["one pass"]["best"]) == list(first["one pass with a CRF"]["best"]) == ["0"]
    assert list(first["one pass with cross-attention"]["best"]) == ["1"]
    assert list(first["AR decoder"]["best"]) == ["greedy"]
    sizes = [first[arm]["parameters"] for arm in TASK_ARMS if arm != "most frequent answer"]
    assert max(sizes) < 1.04 * min(sizes)
    assert (
        len(list((tmp_path / "out").glob("autoencoder-*-0"))) == 2
    )  # two YANs began with one, the taught with its own
    taught = read_rows(tmp_path / "out" / "AR_decoder-0" / "taught.jsonl.gz")
    own = read_rows(tmp_path / "several_answers-train.jsonl.gz")
    assert Counter(row["source"] for row in taught) == Counter(row["source"] for row in own)
    assert len({(row["source"], row["target"]) for row in taught}) == 2  # one answer for each prompt


def test_an_arm_goes_on_where_it_was(load_script, task_recipe, words, tmp_path):
    script = load_script("tasks")
    script.main([*words, "--seeds", "0", "--arms", "YAN"])
    model = tmp_path / "out" / "YAN-0" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        script.main([*words, "--arms", "YAN", "two passes"])
    recipe = yaml.safe_load(task_recipe.read_text())
    task_recipe.write_text(yaml.safe_dump({**recipe, "steps": [2]}, sort_keys=False))
    script.main([*words, "--seeds", "0", "--arms", "YAN"])  # measured again, not trained again
    assert model.stat().st_mtime_ns == before
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {arm: list(seeds) for arm, seeds in table["runs"].items()} == {"YAN": ["0"]}
    assert list(table["runs"]["YAN"]["0"]["best"]) == ["0", "2"]
    task_recipe.write_text(yaml.safe_dump({**recipe, "updates": 3}, sort_keys=False))
    with pytest.raises(ValueError, match="was trained with another recipe"):
        script.main([*words, "--seeds", "0", "--arms", "YAN"])


def test_tasks_refuse_an_arm_of_another_size(load_script, task_recipe, tokenizer):
    script = load_script("tasks")
    recipe = script.read_recipe(task_recipe)
    with pytest.raises(ValueError, match=r"must have .* as the others, within 3%"):
        script.preset(recipe, tokenizer, {"num_flow_layers": 4})


def test_tasks_refuse_a_recipe_with_another_name(load_script, task_recipe):
    task_recipe.write_text(task_recipe.read_text() + "update: 3\n")
    with pytest.raises(ValueError, match="must have task, config"):
        load_script("tasks").read_recipe(task_recipe)


def test_a_reference_counts_without_the_spaces_around_it(load_script, task_recipe, tmp_path):
    write_rows(tmp_path / "several_answers-test.jsonl.gz", [{"source": "a", "target": "b c "}])
    task = load_script("tasks").Task(yaml.safe_load(task_recipe.read_text()), tmp_path, tmp_path)
    scores = task.scores(["b c"])
    assert (scores["exact"], scores["unknown"]) == (1.0, 0.0)


def test_changed_rows_are_measured_again(load_script, words, tmp_path):
    script, arm = load_script("tasks"), ["--arms", "most frequent answer", "--seeds", "0"]
    script.main([*words, *arm])
    others = [{"source": source, "target": "nothing"} for source in "ab"]  # as many as before
    write_rows(tmp_path / "several_answers-test.jsonl.gz", others)
    script.main([*words, *arm])
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["runs"]["most frequent answer"]["0"]["best"]["class"]["exact"] == 0


def test_a_distribution_is_compared_with_its_references(load_script, task_recipe, tmp_path):
    task = load_script("tasks").Task(yaml.safe_load(task_recipe.read_text()), tmp_path, tmp_path)
    one, two, three = (task.references[task.sources[0]][index] for index in (0, 3, 6))
    exact = [one] * 3 + [two] * 3 + [three] * 4
    others = [list(task.references[task.sources[1]])]
    assert task.distribution([exact, *others]) == {"right": 1.0, "total_variation": 0.0}
    found = task.distribution([[three] * 5 + ["no answer"] * 5, *others])
    assert found == pytest.approx({"right": 0.75, "total_variation": 0.3})


@pytest.mark.slow
@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_the_recipes_of_tasks_are_whole(load_script, path, tokenizer):
    script = load_script("tasks")
    recipe = script.read_recipe(path)
    for arm in recipe["arms"].values():
        assert set(arm) <= {"kind", "fields", "training", "teacher", "autoencoder_share", "encoder", "lora", "recipes"}
        assert all((ROOT / f"configuration/recipes/{name}.yaml").exists() for name in arm.get("recipes", ()))
        assert arm.get("teacher", "AR decoder") in recipe["arms"]
        if arm.get("encoder"):
            assert {"encoder", "encoder_fields", "encoder_training"} <= set(recipe)
            continue
        script.preset(recipe, tokenizer, arm.get("fields", {}))


def test_a_page_has_means_over_seeds_and_their_intervals(load_script, tmp_path):
    pytest.importorskip("scipy")
    script = load_script("results_page")
    runs = {"YAN, one expert, graph": {}, "one pass": {}, "YAN, one expert, graph, less": {}}
    for seed, value in enumerate((20, 22)):
        runs["YAN, one expert, graph"][seed] = runs["YAN, one expert, graph, less"][seed] = {
            "parameters": 1e6,
            "best": {"3": {"bleu": value}},
            "nats": {"3": value / 10},
        }
        runs["one pass"][seed] = {
            "parameters": 1e6,
            "best": {"0": {"bleu": 14 + seed}},
            "nats": {"0": 2.5 + seed / 10},
        }
    table = {"task": "t", "recipe": {"updates": 5, "batch_size": 2}, "rows": 7, "hardware": "h", "torch": "2"}
    (tmp_path / "t").mkdir()
    path = tmp_path / "t" / "table.json"
    path.write_text(json.dumps({**table, "date": "d", "runs": runs}))
    (tmp_path / "intro.md").write_text("# Results\n")
    expert = {
        "gate": 0.25,
        "usage": 0.5,
        "mean_words": 3.2,
        "beginning": ["In the", 0.125],
        "examples": ["In the pub."],
    }
    information = {"right texts": 1.25, "drawn texts": 0.5}
    experts = {"rows": 7, "information": information, "prompts": ["pub"], "experts": [expert] * 9}
    (tmp_path / "t" / "experts.json").write_text(json.dumps(experts))
    script.main([str(path), "--intro", str(tmp_path / "intro.md"), "--output", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "| arm | seeds | BLEU, no step | BLEU, 3 steps | nats |" in page
    assert "| YAN, one expert, graph | 2 |  | 21.0 ± 12.7 | 2.100 ± 1.271 |" in page
    assert "| one pass | 2 | 14.5 ± 6.4 |  | 2.550 ± 0.635 |" in page
    assert "| YAN, one expert, graph, minus one pass | +6.5 | 0.055 | -0.450 | 0.092 |" in page
    assert "| YAN, one expert, graph, less, minus YAN, one expert, graph | +0.0 | 1.000 | +0.000 | 1.000 |" in page
    assert script.of_seeds([1.0], 1, 3) == "1.0 (of 1)"
    assert script.of_seeds([], 1, 3) == ""
    assert "less, minus one pass" not in page  # what lacks a part is compared with the whole alone
    assert page.count("| 25 | 50 | 3 | In the (12%) | In the pub. |") == 4
    assert "A drawn text and its expert have 0.50 nats of mutual information, of at most 2.20." in page


def test_a_page_leaves_out_shares_that_are_all_zero_and_ends_with_the_routes(load_script, tmp_path):
    pytest.importorskip("scipy")
    script = load_script("results_page")
    for unknown, expected in ((0.0, False), (0.25, True)):
        runs = {"YAN": {"0": {"parameters": 1e6, "best": {"3": {"exact": 0.5, "unknown": unknown}}}}}
        assert any("no row" in line for line in script.quality_tables(runs, "exact")) == expected
    (tmp_path / "intro.md").write_text("# Results\n")
    assert script.make_page([], tmp_path / "intro.md") == "# Results\n"
    (tmp_path / "routes.md").write_text("## Routes\n")
    assert script.make_page([], tmp_path / "intro.md") == "# Results\n\n## Routes\n"


def test_the_source_itself_needs_no_model(load_script, task_recipe, words, tmp_path):
    recipe = yaml.safe_load(task_recipe.read_text())
    recipe["arms"] = {"the source itself": {"kind": "copy"}}
    task_recipe.write_text(yaml.safe_dump(recipe))
    load_script("tasks").main([*words, "--arms", "the source itself", "--seeds", "0"])
    figures = json.loads((tmp_path / "out" / "table.json").read_text())["runs"]["the source itself"]["0"]
    assert figures["best"]["0"]["exact"] == 0
    assert 0 < figures["best"]["0"]["chrf"] < 100


def test_the_most_frequent_answer_needs_no_model(load_script, task_recipe, words, tmp_path):
    load_script("tasks").main([*words, "--arms", "most frequent answer", "--seeds", "0"])
    figures = json.loads((tmp_path / "out" / "table.json").read_text())["runs"]["most frequent answer"]["0"]
    targets = Counter(row["target"] for row in read_rows(tmp_path / "several_answers-train.jsonl.gz"))
    test = read_rows(tmp_path / "several_answers-test.jsonl.gz")
    answered = {row["source"] for row in test if row["target"] == targets.most_common(1)[0][0]}
    assert figures["best"]["class"]["exact"] == len(answered) / len({row["source"] for row in test}) > 0
    assert figures["parameters"] == 0


def test_the_tasks_of_the_paper_share_a_table(load_script, tmp_path):
    pytest.importorskip("scipy")
    script = load_script("results_page")
    recipe = {"updates": 5, "batch_size": 2}
    about = {"rows": 7, "hardware": "h", "torch": "2", "date": "d"}

    def run(step: str, value: float, parameters: float = 1e6) -> dict:
        return {"parameters": parameters, "best": {step: {"exact": value, "f1": value / 2}}}

    found = {
        "squad": {"YAN on MiniLM": {"0": run("3", 0.25)}, "constant": {"0": run("class", 0.75, 0)}},
        "sst2": {"YAN on MiniLM": {"0": run("3", 0.5), "1": run("3", 0.6)}},
    }
    for name, runs in found.items():
        (tmp_path / name).mkdir()
        own = {"recipe": {**recipe, "metric": "f1" if name == "squad" else "exact"}, "task": name, "runs": runs}
        (tmp_path / name / "table.json").write_text(json.dumps({**about, **own}))
    (tmp_path / "intro.md").write_text("# Results\n")
    (tmp_path / "paper_tasks.md").write_text("Names.\n")
    page = script.make_page([tmp_path / name / "table.json" for name in found], tmp_path / "intro.md")
    assert "## sst2" not in page
    assert page.count("## The paper's tasks") == 1
    assert "Names." in page
    assert page.count("Every arm: 1.00 to 1.00 million parameters") == 2
    assert "| arm | SST-2 | SQuAD, F1 |" in page
    assert "| YAN on MiniLM | 55.0 ± 63.5 (2) | 12.5 (1) |" in page
    assert "| constant |  | 37.5 (1) |" in page


def test_the_page_of_results_is_that_of_its_tables(load_script, monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.chdir(ROOT)
    tables = sorted(Path("docs/results").glob("*/table.json"))
    script = load_script("results_page")
    page = script.make_page(tables, Path("docs/results/intro.md"))
    assert Path("docs/results.md").read_text() == page
    assert len(page.splitlines()) <= 300
    readme = Path("README.md").read_text()
    assert script.put_into_readme(readme, tables) == readme
