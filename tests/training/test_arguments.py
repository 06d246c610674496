"""Settings from the command line, from recipes, and what is refused."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from modeling_yan.training import PretrainingArguments, expand_recipe, parse_arguments
from modeling_yan.training.models import load_config

READY = sorted((Path(__file__).parents[2] / "configuration" / "recipes").glob("*.yaml"))
REQUIRED = ["--stage", "flow", "--config", "c", "--tokenizer", "t", "--output_dir", "o"]


def make(**overrides):
    return PretrainingArguments(**{"stage": "flow", "config": "c", "tokenizer": "t", "output_dir": "o", **overrides})


@pytest.fixture
def recipe(tmp_path):
    """Function from the text of a recipe to its path."""

    def write(text):
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


class TestRecipes:
    def test_a_recipe_gives_what_the_command_line_leaves_out(self, recipe):
        path = recipe("learning_rate: 0.5\nmax_steps: 7\nresume: true\ntasks: [pairs=1, infilling=2]\n")
        arguments = parse_arguments([*REQUIRED, "--recipe", path, "--max_steps", "9"])
        assert arguments == make(learning_rate=0.5, max_steps=9, resume=True, tasks=["pairs=1", "infilling=2"])

    def test_switches_need_no_value(self):
        assert parse_arguments([*REQUIRED, "--resume", "--use_cpu"]) == make(resume=True, use_cpu=True)

    def test_the_required_settings_may_come_from_a_recipe(self, recipe):
        path = recipe("stage: flow\nconfig: c\ntokenizer: t\noutput_dir: o\n")
        assert parse_arguments(["--recipe", path]) == make()

    @pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
    def test_the_ready_recipes_are_whole_but_for_files_and_folders(self, path):
        arguments = parse_arguments(["--recipe", str(path), "--tokenizer", "t", "--output_dir", "o"])
        assert arguments.stage == path.stem.split("-")[1]
        assert arguments.config == "stage-one" or (READY[0].parents[2] / arguments.config / "config.json").exists()

    @pytest.mark.parametrize("second", ["tiny-flow", "tiny-flow-paper"])
    def test_stage_two_goes_on_with_the_config_of_stage_one(self, tmp_path, second):
        paths = {path.stem: path for path in READY}
        stages = [
            parse_arguments(["--recipe", str(paths[name]), "--tokenizer", "t", "--output_dir", "o"])
            for name in ("tiny-autoencoder", second)
        ]
        load_config(str(READY[0].parents[2] / stages[0].config), stages[0].config_overrides).save_pretrained(tmp_path)
        config = load_config(str(tmp_path), stages[1].config_overrides)
        assert (config.num_answer_slots, config.copy_prompt_to_slots) == (32, True)
        assert config.refine_draft == (second == "tiny-flow")
        assert (config.num_experts, config.share_expert_head) == ((16, True) if second == "tiny-flow" else (4, False))
        assert config.crf_rank == (64 if second == "tiny-flow" else 0)

    def test_fields_on_the_command_line_come_on_top_of_a_recipes(self, recipe):
        path = recipe("config_overrides: mask_ratio=0.4,canvas_length=8\n")
        for words in (["--config_overrides", "canvas_length=16"], ["--config_overrides=canvas_length=16"]):
            arguments = parse_arguments([*REQUIRED, "--recipe", path, *words])
            config = load_config(str(READY[0].parents[1] / "yan-transformer-tiny"), arguments.config_overrides)
            assert (config.objective.mask_ratio, config.canvas_length) == (0.4, 16)
        assert parse_arguments([*REQUIRED, "--recipe", path, "--config_overrides", ""]).config_overrides == ""
        assert parse_arguments([*REQUIRED, "--recipe", path]).config_overrides == "mask_ratio=0.4,canvas_length=8"

    def test_an_equals_sign_may_stand_before_the_file(self, recipe):
        assert parse_arguments([*REQUIRED, f"--recipe={recipe('max_steps: 7')}"]) == make(max_steps=7)

    def test_an_abbreviation_is_refused_and_not_passed_over(self, recipe, capsys):
        for word in ("--rec", "--max_st"):
            with pytest.raises((SystemExit, ValueError)):
                parse_arguments([*REQUIRED, word, recipe("max_steps: 7") if word == "--rec" else "7"])

    def test_any_parser_takes_a_recipe(self, recipe):
        parser = ArgumentParser()
        parser.add_argument("name")
        parser.add_argument("--steps", type=int, nargs="+")
        parser.add_argument("--rate", type=float)
        for switch in ("--fast", "--slow"):
            parser.add_argument(switch, action="store_true")
        path = recipe("steps: [1, 2]\nrate: 1e-3\nfast: true\nslow: false\n")
        options = parser.parse_args(expand_recipe(parser, ["x", "--recipe", path, "--steps", "3"]))
        expected = {"name": "x", "steps": [3], "rate": 1e-3, "fast": True, "slow": False}
        assert vars(options) == {**expected, "recipe": path}

    def test_a_setting_that_does_not_exist(self, recipe):
        with pytest.raises(ValueError, match=r"recipe\.yaml: no such setting as learning_rat; there are stage"):
            parse_arguments([*REQUIRED, "--recipe", recipe("learning_rat: 1\n")])

    def test_a_recipe_that_is_no_mapping(self, recipe):
        with pytest.raises(ValueError, match="maps names to values, this one holds list"):
            parse_arguments([*REQUIRED, "--recipe", recipe("- 1\n")])

    def test_a_recipe_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
            parse_arguments([*REQUIRED, "--recipe", str(tmp_path / "none.yaml")])


class TestValues:
    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("max_steps", 0, "at least 1"),
            ("save_total_limit", 0, "at least 1"),
            ("learning_rate", -1.0, "at least 0"),
            ("learning_rate", float("nan"), "at least 0"),
            ("ema_decay", 1.0, "below 1"),
            ("stage", "both", "autoencoder, flow"),
            ("lr_scheduler_type", "linear", "constant_with_warmup, cosine"),
            ("mixed_precision", "fp8", "None, no, bf16, fp16"),
        ],
    )
    def test_values_that_are_not_allowed(self, name, value, allowed):
        with pytest.raises(ValueError, match=f"{name}={value!r}.*{allowed}"):
            make(**{name: value})

    @pytest.mark.parametrize("tasks", [["pairs"], ["pairs=much"], ["pairs=1=2"]])
    def test_a_task_without_weight(self, tasks):
        with pytest.raises(ValueError, match="every entry must be TASK=WEIGHT"):
            make(tasks=tasks).task_weights()


@pytest.mark.parametrize(("decay_steps", "schedule"), [(14, "constant_with_warmup"), (15, "cosine")])
def test_a_run_that_reaches_its_learning_rate_is_quiet(warnings_of_transformers, decay_steps, schedule):
    make(max_steps=20, warmup_steps=6, decay_steps=decay_steps, lr_scheduler_type=schedule)
    assert warnings_of_transformers.text == ""


def test_a_run_that_never_reaches_its_learning_rate_is_told_so(warnings_of_transformers):
    make(max_steps=20, warmup_steps=6, decay_steps=15)
    told = "max_steps=20 with warmup_steps=6 and decay_steps=15: the learning rate never reaches 0.0001"
    assert told in warnings_of_transformers.text


@pytest.mark.parametrize(
    "again", [["--train_file", "b.jsonl"], ["--train_file=b.jsonl"], ["--seed", "1", "--seed", "2"]]
)
def test_an_option_that_is_given_twice(again):
    with pytest.raises(ValueError, match=f"{again[-2 if len(again) > 1 else 0].split('=')[0]}: must be given once"):
        parse_arguments([*REQUIRED, "--train_file", "a.jsonl", *again])
