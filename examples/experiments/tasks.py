"""Train YAN and its rivals on one task with several seeds, and measure them side by side.

    python examples/experiments/tasks.py configuration/recipes/experiments/tasks-multi30k.yaml --data_dir DATA \
        --output_dir results/multi30k --table docs/results/multi30k/table.json

DATA holds `NAME-train.jsonl.gz`, `NAME-validation.jsonl.gz` and `NAME-test.jsonl.gz`: rows of `source` and `target`,
of which those with one source give its references. A recipe says the task's name, the preset with changed fields, the
updates and the arms. All arms see the same rows, as often, and have as many parameters. Each arm is trained once for
each seed. A run that was killed goes on when the command is given again; one that is finished is not repeated. The
table is written anew after every run.
"""

import argparse
import json
import platform
import subprocess
from datetime import date
from pathlib import Path

import sacrebleu
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration
from modeling_yan.baselines import INPUTS, count_parameters, match_size
from modeling_yan.baselines.sizes import fit_width
from modeling_yan.data import read_rows, train_tokenizer
from modeling_yan.evaluation import load_for_generation, self_bleu
from modeling_yan.evaluation.runs import generate_answers
from modeling_yan.training import PretrainingArguments, pretrain

NAMES = ("task", "config", "fields", "vocab_size", "updates", "batch_size", "steps", "temperatures", "arms")
STAGE_SETTINGS = ("learning_rate", "warmup_steps", "max_source_length")
NUM_TEXTS = 4  # of one source, for self-BLEU


def read_recipe(path: Path) -> dict:
    """The recipe of a file. Raises ValueError for a name that does not exist or one that is missing."""
    recipe = yaml.safe_load(path.read_text())
    missing, unknown = set(NAMES) - set(recipe), set(recipe) - {*NAMES, "training"}
    if missing or unknown:
        raise ValueError(f"{path} has {', '.join(recipe)}: must have {', '.join(NAMES)}, and may have training")
    return recipe


class Task:
    """The rows of a task, and its tokenizer, which is trained on them.

    Args:
        recipe: As of `read_recipe`. data_dir: Where the rows are. output_dir: Where the tokenizer goes.
        num_rows: At most so many rows of the test file are measured.
    """

    def __init__(self, recipe: dict, data_dir: Path, output_dir: Path, num_rows: int | None = None):
        self.files = {part: str(data_dir / f"{recipe['task']}-{part}.jsonl.gz") for part in ("train", "validation")}
        self.references = {}
        for row in read_rows(data_dir / f"{recipe['task']}-test.jsonl.gz")[:num_rows]:
            self.references.setdefault(row["source"], []).append(row["target"])
        self.sources = list(self.references)
        self.tokenizer = output_dir / "tokenizer"
        if not (self.tokenizer / "tokenizer.json").exists():
            rows = read_rows(self.files["train"])
            texts = [text for row in rows for text in (row["source"], row["target"])]
            train_tokenizer(texts, recipe["vocab_size"]).save_pretrained(self.tokenizer)

    def scores(self, texts: list[str]) -> dict[str, float]:
        """BLEU and chrF of sacrebleu in [0, 100] against all references, exact match of one of them in [0, 1]."""
        wanted = [self.references[source] for source in self.sources]
        most = max(map(len, wanted))
        columns = [[each[index] if index < len(each) else None for each in wanted] for index in range(most)]
        exact = sum(text.strip() in each for text, each in zip(texts, wanted, strict=True)) / len(texts)
        bleu, chrf = sacrebleu.corpus_bleu(texts, columns), sacrebleu.corpus_chrf(texts, columns)
        return {"bleu": bleu.score, "brevity_penalty": bleu.bp, "chrf": chrf.score, "exact": exact}


def preset(recipe: dict, tokenizer, fields: dict) -> YanConfig:
    """The YAN of an arm, as large as that of the recipe."""
    base = YanConfig.from_pretrained(recipe["config"]).to_dict()
    whole = YanConfig(**{**base, "vocab_size": len(tokenizer), **recipe["fields"]})
    return match_size(whole, **fields) if fields else whole


def widen_encoder(config: YanConfig) -> YanConfig:
    """The config whose encoder and decoder have all the parameters, for one pass without a flow."""
    layers = config.num_encoder_layers + config.num_flow_layers

    def changed(width: int) -> YanConfig:
        return YanConfig(**{**config.to_dict(), "num_encoder_layers": layers, "intermediate_size": width})

    return changed(fit_width(lambda width: YanForAutoencoding(changed(width)), count_parameters(config), "one pass"))


def train_stage(stage: str, config: Path, folder: Path, updates: int, task: Task, recipe: dict, options, settings):
    """One stage into a folder of its own, or what is left of it."""
    if (folder / "model.safetensors").exists():
        return
    AcceleratorState._reset_state(True)  # or it would keep the settings of the run before
    arguments = PretrainingArguments(
        stage,
        str(config),
        str(task.tokenizer),
        str(folder),
        train_file=[task.files["train"]],
        max_steps=updates,
        save_steps=updates,
        decay_steps=updates // 2,
        per_device_train_batch_size=recipe["batch_size"],
        bucket_batches=8,
        report_to=["none"],
        resume=True,
        seed=options.seed,
        use_cpu=options.use_cpu,
        **{**recipe.get("training", {}), **settings},
    )
    pretrain(arguments)


def train_arm(name: str, task: Task, recipe: dict, options) -> Path:
    """All stages of an arm with one seed; the folder of its model."""
    arm, home = recipe["arms"][name], options.output_dir / f"{name}-{options.seed}".replace(" ", "_")
    tokenizer, updates = AutoTokenizer.from_pretrained(task.tokenizer), recipe["updates"]
    config, settings = preset(recipe, tokenizer, arm.get("fields", {})), arm.get("training", {})
    kind = arm.get("kind", "yan")
    if kind == "one pass":
        config = widen_encoder(config)
    config.save_pretrained(home / "preset")
    run = (task, recipe, options, settings)
    if kind in INPUTS or kind == "one pass":
        stage = kind if kind in INPUTS else "autoencoder"
        train_stage(stage, home / "preset", home / "model", updates, *run)
        return home / "model"
    first = round(arm.get("autoencoder_share", 0.5) * updates)
    if first:
        train_stage("autoencoder", home / "preset", home / "autoencoder", first, *run)
    train_stage("flow", home / ("autoencoder" if first else "preset"), home / "model", updates - first, *run)
    return home / "model"


def load(folder: Path, kind: str):
    """The model of an arm; one pass is a YAN whose flow is never asked."""
    if kind == "one pass":
        return YanForFlowGeneration.from_pretrained(folder).eval()
    return load_for_generation(str(folder))


def measure(folder: Path, name: str, task: Task, recipe: dict, options) -> dict:
    """What a trained model writes: its best text for every number of steps, and drawn texts for every temperature."""
    kind = recipe["arms"][name].get("kind", "yan")
    model, tokenizer = load(folder, kind), AutoTokenizer.from_pretrained(folder)
    config = YanConfig.from_pretrained(options.output_dir / f"{name}-{options.seed}".replace(" ", "_") / "preset")

    def write(**settings):
        length = config.canvas_length
        return generate_answers(model, tokenizer, task.sources, 50, max_new_tokens=length, **settings)

    if kind == "one pass":
        return {"best": {"0": task.scores(write(num_flow_steps=0))}}
    if kind == "masked_diffusion":
        return {"best": {str(steps): task.scores(write(num_diffusion_steps=steps)) for steps in recipe["steps"]}}
    if kind in INPUTS:
        best = {"greedy": task.scores(write(do_sample=False, num_beams=1))}
    else:
        steps = [0, *recipe["steps"]] if model.config.num_answer_slots else recipe["steps"]
        best = {str(number): task.scores(write(num_flow_steps=number, do_sample=False)) for number in steps}
    drawn = {}
    for temperature in recipe["temperatures"]:
        texts = []
        for seed in range(NUM_TEXTS):
            torch.manual_seed(seed)
            own = {"top_k": 0} if kind in INPUTS else {"num_flow_steps": 3, "seed": seed}
            texts.append(write(do_sample=True, temperature=float(temperature), **own))
        alike = [100 * sum(self_bleu(row)) / NUM_TEXTS for row in zip(*texts, strict=True)]
        drawn[str(temperature)] = {"self_bleu": sum(alike) / len(alike), **task.scores(texts[0])}
    return {"best": best, "drawn": drawn}


def write_table(path: Path, recipe: dict, runs: dict, num_rows: int):
    """All runs so far, and where they come from, whole or not at all."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    table = {
        "task": recipe["task"],
        "recipe": {name: recipe[name] for name in recipe if name != "arms"},
        "arms": recipe["arms"],
        "rows": num_rows,
        "date": str(date.today()),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "commit": commit,
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(table, indent=1) + "\n")
    aside.replace(path)


def collect(output_dir: Path, arms: dict) -> dict:
    """The figures of all finished runs: arm -> seed -> figures."""
    found = {name: {} for name in arms}
    for name in arms:
        for path in sorted(output_dir.glob(f"{name.replace(' ', '_')}-*/figures.json")):
            found[name][path.parent.name.rsplit("-", 1)[1]] = json.loads(path.read_text())
    return {name: runs for name, runs in found.items() if runs}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="for models and figures")
    parser.add_argument("--table", type=Path, help="where the table goes; into the output folder if left out")
    parser.add_argument("--arms", nargs="+", help="those of the recipe to train, all if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_rows", type=int, help="of the test file, for a trial")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(arguments)
    recipe = read_recipe(options.recipe)
    unknown = sorted(set(options.arms or ()) - set(recipe["arms"]))
    if unknown:
        parser.error(f"arms={', '.join(unknown)}: must be of {', '.join(recipe['arms'])}")
    task = Task(recipe, options.data_dir, options.output_dir, options.num_rows)
    for seed in options.seeds:
        options.seed = seed
        for name in options.arms or recipe["arms"]:
            path = options.output_dir / f"{name}-{options.seed}".replace(" ", "_") / "figures.json"
            if not path.exists():
                folder = train_arm(name, task, recipe, options)
                figures = measure(folder, name, task, recipe, options)
                model = load(folder, recipe["arms"][name].get("kind", "yan"))
                part = model.flow if recipe["arms"][name].get("kind") == "one pass" else None
                unused = 0 if part is None else sum(each.numel() for each in part.parameters())
                figures["parameters"] = model.num_parameters() - unused
                path.write_text(json.dumps(figures, indent=1) + "\n")
            runs = collect(options.output_dir, recipe["arms"])
            write_table(options.table or options.output_dir / "table.json", recipe, runs, len(task.sources))
            print(name, options.seed, runs[name][str(options.seed)]["best"], flush=True)


if __name__ == "__main__":
    main()
