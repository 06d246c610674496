"""Train several YANs that differ in one thing, and evaluate them side by side.

    python examples/experiments/arms.py configuration/recipes/experiments/experts.yaml \
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
from modeling_yan.evaluation import RunOptions, evaluate_models, format_table
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
    config = YanConfig.from_pretrained(folder)
    YanConfig(**{**config.to_dict(), **fields}).save_pretrained(output)


def train_arm(name: str, fields: dict, recipe: dict, data: dict, output_dir: Path) -> Path:
    """Both stages of one arm; the folder of its model."""
    arm, shared = output_dir / name, recipe["share_autoencoder"]
    home = output_dir if shared else arm  # of the preset and of the first stage
    config = YanConfig.from_pretrained(recipe["config"])
    (config if shared else match_size(config, **fields)).save_pretrained(home / "preset")
    train("autoencoder", home / "preset", home / "autoencoder", {**data, **recipe["autoencoder"]})
    start = arm / "start"
    apply_fields(home / "autoencoder", fields, start)
    train("flow", start, arm / name, {**data, **recipe["flow"]})
    return arm / name


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--train_file", nargs="+", required=True)
    parser.add_argument(
        "--validation_file", nargs="+", required=True, help="pairs; the table is measured on the first"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--baseline", help="name of an arm")
    parser.add_argument("--num_rows", type=int, default=1000, help="held-out rows of the table")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--num_flow_steps", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max_steps", type=int, help="updates of both stages, for a trial")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(arguments)
    recipe = read_recipe(options.recipe)
    data = {name: getattr(options, name) for name in ("tokenizer", "train_file", "validation_file", "use_cpu")}
    data["report_to"] = ["none"]
    for stage in ("autoencoder", "flow"):
        recipe[stage] |= {"max_steps": options.max_steps} if options.max_steps else {}
    folders = {
        name: str(train_arm(name, fields or {}, recipe, data, options.output_dir))
        for name, fields in recipe["arms"].items()
    }
    rows = read_rows(options.validation_file[0])[: options.num_rows]
    settings = RunOptions(
        max_new_tokens=options.max_new_tokens, num_flow_steps=options.num_flow_steps, num_seeds=options.seeds
    )
    baseline = folders[options.baseline or next(iter(folders))]
    print(format_table(evaluate_models(list(folders.values()), rows, options.output_dir, settings, baseline)))


if __name__ == "__main__":
    main()
