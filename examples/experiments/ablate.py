"""Train several YANs that differ in one thing, and evaluate them side by side.

    python examples/experiments/ablate.py configuration/recipes/experiments/experts.yaml \
        --tokenizer TOKENIZER --train_file pairs.jsonl.gz --validation_file held-out.jsonl.gz --output_dir experts

A recipe has `config`, a preset; `autoencoder` and `flow`, settings of the two stages; and `arms`, from a name to the
fields of the config that this arm changes. All arms have the size of the preset: where a change adds or takes away
parameters, the feed-forward layers become narrower or wider. Arms whose encoder is the same share their first stage
(`share_autoencoder: true`). Every arm sees the same rows in the same order. A run that was killed goes on when the
command is given again, and `table.md` in the output folder holds the result; `--baseline` names the arm that the
others are tested against, the first one if not given.
"""

import argparse
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState

from modeling_yan import YanConfig
from modeling_yan.baselines import match_size
from modeling_yan.data import read_rows
from modeling_yan.evaluation import DEFAULT_METRICS, METRIC_NAMES, RunOptions, check_metrics, evaluate_files
from modeling_yan.training import PretrainingArguments, pretrain

NAMES = ("config", "share_autoencoder", "autoencoder", "flow", "arms")


def read_recipe(path: Path) -> dict:
    """The recipe of a file. Raises ValueError for a name that does not exist or one that is missing."""
    recipe = {"share_autoencoder": False, **yaml.safe_load(path.read_text())}
    if set(recipe) != set(NAMES):
        raise ValueError(f"{path} has {', '.join(recipe)}: must have {', '.join(NAMES)}")
    return recipe


def train(stage: str, config: Path, output_dir: Path, settings: dict):
    """One stage into a folder of its own, or what is left of it."""
    if (output_dir / "model.safetensors").exists():
        return
    AcceleratorState._reset_state(True)  # or it would keep the settings of the run before
    pretrain(PretrainingArguments(stage, str(config), output_dir=str(output_dir), resume=True, **settings))


def apply_fields(folder: Path, fields: dict, output: Path):
    """A copy of a checkpoint's folder whose config has the values of an arm, where none of them shapes a weight."""
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and not (output / path.name).exists():
            (output / path.name).write_bytes(path.read_bytes())
    YanConfig.from_pretrained(folder).with_fields(**fields).save_pretrained(output)


def train_first_stage(name: str, fields: dict, recipe: dict, data: dict, output_dir: Path) -> Path:
    """The first stage of an arm, which it may have in common with all others; its folder."""
    config, shared = YanConfig.from_pretrained(recipe["config"]), recipe["share_autoencoder"]
    home = output_dir if shared else output_dir / name
    (config if shared else match_size(config, **fields)).save_pretrained(home / "preset")
    train("autoencoder", home / "preset", home / "autoencoder", {**data, **recipe["autoencoder"]})
    return home / "autoencoder"


def train_arm(name: str, fields: dict, autoencoder: Path, recipe: dict, data: dict, output_dir: Path) -> Path:
    """The second stage of an arm; the folder of its model."""
    start = output_dir / name / "start"
    apply_fields(autoencoder, fields, start)
    train("flow", start, output_dir / name / name, {**data, **recipe["flow"]})
    return output_dir / name / name


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--train_file", nargs="+", required=True)
    parser.add_argument("--validation_file", nargs="+", required=True, help="pairs that the training is watched on")
    parser.add_argument("--test_file", nargs="+", required=True, help="pairs; each file gives a table")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, help="finished first stage, where all share it")
    parser.add_argument("--baseline", help="name of an arm")
    parser.add_argument("--num_rows", type=int, default=1000, help="rows of a table")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT_METRICS, choices=METRIC_NAMES, metavar="NAME")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--num_flow_steps", type=int, default=3)
    parser.add_argument("--eval_batch_size", type=int, default=32, help="of the tables")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--max_steps", type=int, help="updates of both stages, for a trial")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(arguments)
    recipe = read_recipe(options.recipe)
    if options.autoencoder and not recipe["share_autoencoder"]:
        parser.error(f"autoencoder={options.autoencoder}: the arms of {options.recipe} have one each")
    if options.baseline not in (None, *recipe["arms"]):
        parser.error(f"baseline={options.baseline}: must be one of {', '.join(recipe['arms'])}")
    return options, recipe


def main(arguments: list[str] | None = None):
    options, recipe = parse_options(arguments)
    rows = {file: read_rows(file)[: options.num_rows] for file in options.test_file}
    check_metrics(options.metrics)
    data = {name: getattr(options, name) for name in ("tokenizer", "train_file", "validation_file", "use_cpu", "seed")}
    data["report_to"] = ["none"]
    for stage in ("autoencoder", "flow"):
        recipe[stage] |= {"max_steps": options.max_steps} if options.max_steps else {}
    folders = {}
    for name, fields in recipe["arms"].items():
        run = (recipe, data, options.output_dir)
        autoencoder = options.autoencoder or train_first_stage(name, fields, *run)
        folders[name] = str(train_arm(name, fields, autoencoder, *run))
    settings = RunOptions(
        max_new_tokens=options.max_new_tokens,
        num_flow_steps=options.num_flow_steps,
        num_seeds=options.seeds,
        batch_size=options.eval_batch_size,
    )
    where = options.output_dir, settings, folders[options.baseline or next(iter(folders))]
    for table in evaluate_files(list(folders.values()), rows, *where, metrics=options.metrics):
        print(table)


if __name__ == "__main__":
    main()
