"""Train YAN and its rivals on one task with several seeds, and measure them side by side.

    python examples/experiments/tasks.py configuration/recipes/tasks/multi30k.yaml --data_dir DATA \
        --output_dir results/multi30k --table docs/results/multi30k/table.json

DATA holds `NAME-train.jsonl.gz`, `NAME-validation.jsonl.gz` and `NAME-test.jsonl.gz`: rows of `source` and `target`,
of which those with one source give its references; a row may have a `task` to be counted by. A recipe says the task's
name, the preset with changed fields, the updates and the arms. All arms see the same rows, as often, and have as many
parameters; those on the recipe's pretrained encoder have that besides. Each arm is trained once for each seed. A run
that was killed goes on when the command is given again; one that stands in the table, or whose figures lie in the
output folder, is not repeated. The table is written again after every run.
"""

import argparse
import gzip
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import encoder_arms
import likelihood
import sacrebleu
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration
from modeling_yan.baselines import INPUT_ADAPTERS, count_parameters
from modeling_yan.baselines.sizes import fit_width
from modeling_yan.data import read_rows, train_tokenizer, write_rows
from modeling_yan.data.rows import replacing, write_whole
from modeling_yan.evaluation import load_for_generation, self_bleu
from modeling_yan.evaluation.metrics import token_f1_scores
from modeling_yan.evaluation.runs import generate_answers
from modeling_yan.training import PretrainingArguments, pretrain

NAMES = "task config fields vocab_size updates autoencoder_share batch_size steps temperatures arms".split()
OPTIONAL = (
    "training",
    "flow_training",
    "draws",
    "metric",
    "num_rows",
    "encoder",
    "encoder_fields",
    "encoder_training",
)
TRAINING_NAMES = [*NAMES[:7], "training", "flow_training", "encoder", "encoder_fields", "encoder_training"]
ROOT = Path(__file__).parents[2]
NUM_TEXTS = 4  # of one source, for self-BLEU
MOST_FREQUENT, COPY = "most frequent", "copy"  # without any model: the most frequent target, or the source itself
ONE_PASS, ONE_PASS_JOINT = "one pass", "one pass, joint"  # without a flow; tokens alone, or decoded together
# the usual non-autoregressive decoder: the flow's layers, with hardly any noise
ONE_PASS_CROSS = "one pass, cross-attention"
NO_STEPS = {"num_flow_steps": 0, "min_train_flow_steps": 0, "max_train_flow_steps": 0}
ONE_STEP = {"num_flow_steps": 1, "min_train_flow_steps": 1, "max_train_flow_steps": 1, "init_noise": 1e-6}
ONE_STEP |= {"num_answer_slots": 0, "copy_prompt_to_slots": False, "refine_draft": False}


def read_recipe(path: Path) -> dict:
    """The recipe of a file. Raises ValueError for a name that does not exist or one that is missing."""
    recipe = yaml.safe_load(path.read_text())
    missing, unknown = set(NAMES) - set(recipe), set(recipe) - {*NAMES, *OPTIONAL}
    if missing or unknown:
        allowed = f"{', '.join(NAMES)}, and may have {', '.join(OPTIONAL)}"
        raise ValueError(f"{path} has {', '.join(recipe)}: must have {allowed}")
    return recipe


class Task:
    """The rows of a task, and its tokenizer, which is trained on them.

    Args:
        recipe: As of `read_recipe`. data_dir: Where the rows are. output_dir: Where the tokenizer goes.
        num_rows: At most so many rows of the test file are measured.
    """

    def __init__(self, recipe: dict, data_dir: Path, output_dir: Path, num_rows: int | None = None):
        self.files = {part: str(data_dir / f"{recipe['task']}-{part}.jsonl.gz") for part in ("train", "validation")}
        self.references, self.kinds = {}, {}
        for row in read_rows(data_dir / f"{recipe['task']}-test.jsonl.gz")[:num_rows]:
            targets = [target.strip() for target in row.get("answers") or [row["target"]]]
            self.references.setdefault(row["source"], []).extend(targets)
            self.kinds[row["source"]] = row.get("task")
        self.sources = list(self.references)
        paths = (*self.files.values(), data_dir / f"{recipe['task']}-test.jsonl.gz")
        self.rows_hash = hashlib.sha1(b"".join(map(read_bytes, paths)), usedforsecurity=False).hexdigest()[:10]
        self.tokenizer = output_dir / "tokenizer"
        if not (self.tokenizer / "tokenizer.json").exists():
            rows = read_rows(self.files["train"])
            texts = [text for row in rows for text in (row["source"], row["target"])]
            train_tokenizer(texts, recipe["vocab_size"]).save_pretrained(self.tokenizer)

    def scores(self, texts: list[str]) -> dict[str, float]:
        """BLEU and chrF of sacrebleu in [0, 100] against all references; exact match and F1 of one of them, and the
        share of texts that are a target of no row, in [0, 1]; and the exact match of every `task` of the rows."""
        wanted = [self.references[source] for source in self.sources]
        most = max(map(len, wanted))
        columns = [[each[index] if index < len(each) else None for each in wanted] for index in range(most)]
        right = [text.strip() in each for text, each in zip(texts, wanted, strict=True)]
        f1 = sum(max(token_f1_scores([text] * len(each), each)) for text, each in zip(texts, wanted)) / len(texts)
        bleu, chrf = sacrebleu.corpus_bleu(texts, columns), sacrebleu.corpus_chrf(texts, columns)
        known = {target for each in wanted for target in each}
        scores = {"bleu": bleu.score, "brevity_penalty": bleu.bp, "chrf": chrf.score, "f1": f1}
        scores |= {
            "exact": sum(right) / len(right),
            "unknown": sum(text.strip() not in known for text in texts) / len(texts),
        }
        kinds = [self.kinds[source] for source in self.sources]
        return {**scores, "by_task": encoder_arms.mean_by(kinds, right)} if all(kinds) else scores

    def distribution(self, drawn: list[list[str]]) -> dict[str, float]:
        """How the texts drawn for each source are distributed, against its references."""
        right, variation = 0.0, 0.0
        for source, texts in zip(self.sources, drawn, strict=True):
            wanted, found = Counter(self.references[source]), Counter(text.strip() for text in texts)
            right += sum(found[text] for text in wanted) / len(texts)
            variation += sum(max(0.0, n / wanted.total() - found[text] / len(texts)) for text, n in wanted.items())
        return {"right": right / len(self.sources), "total_variation": variation / len(self.sources)}


def preset(recipe: dict, tokenizer, fields: dict) -> YanConfig:
    """The YAN of an arm. Raises ValueError if it is not as large as that of the recipe, within 3%."""
    shared = {"vocab_size": len(tokenizer), **recipe["fields"]}
    base = YanConfig.from_pretrained(recipe["config"]).with_fields(**shared)
    config = base.with_fields(**fields)
    own, wanted = count_parameters(config), count_parameters(base)
    if abs(own - wanted) > 0.03 * wanted:
        raise ValueError(f"an arm with {fields} has {own} parameters: must have {wanted}, as the others, within 3%")
    return config


def widen_encoder(config: YanConfig) -> YanConfig:
    """The config whose encoder and decoder have all the parameters, for one pass without a flow."""
    layers = config.num_encoder_layers + config.num_flow_layers

    def changed(width: int) -> YanConfig:
        return config.with_fields(num_encoder_layers=layers, intermediate_size=width)

    return changed(fit_width(lambda width: YanForAutoencoding(changed(width)), count_parameters(config), "one pass"))


def taught_rows(name: str, task: Task, recipe: dict, options) -> str:
    """The file of the training rows with the targets that a trained arm writes (arXiv 1606.07947).

    Of several right answers the teacher writes one for each source, which a model without an order of tokens needs.
    """
    path = options.output_dir / f"{name}-{options.seed}".replace(" ", "_") / "taught.jsonl.gz"
    if not path.exists():
        folder, kind = train_arm(name, task, recipe, options), recipe["arms"][name].get("kind", "yan")
        model, tokenizer = load(folder, kind), AutoTokenizer.from_pretrained(folder)
        rows = sorted(read_rows(task.files["train"]), key=lambda row: len(row["source"]))
        length = preset(recipe, tokenizer, {}).canvas_length
        texts = generate_answers(
            model, tokenizer, [row["source"] for row in rows], 100, max_new_tokens=length, do_sample=False
        )
        write_rows(path, [{**row, "target": text or row["target"]} for row, text in zip(rows, texts, strict=True)])
    return str(path)


def train_stage(
    stage: str,
    config: Path,
    folder: Path,
    updates: int,
    train_file: str,
    task: Task,
    recipe: dict,
    options,
    settings: dict,
    tokenizer: Path | None = None,
):
    """One stage into a folder of its own, or what is left of it."""
    if (folder / "model.safetensors").exists():
        return
    AcceleratorState._reset_state(True)  # or it would keep the settings of the run before
    arguments = PretrainingArguments(
        stage,
        str(config),
        str(tokenizer or task.tokenizer),
        str(folder),
        train_file=[train_file],
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
    if arm.get("encoder"):
        return train_on_encoder(arm, home, task, recipe, options)
    if arm.get("recipes"):
        return train_by_recipes(arm, home, task, recipe, options)
    tokenizer, updates = AutoTokenizer.from_pretrained(task.tokenizer), recipe["updates"]
    config, settings = preset(recipe, tokenizer, arm.get("fields", {})), arm.get("training", {})
    kind = arm.get("kind", "yan")
    if kind in (ONE_PASS, ONE_PASS_JOINT):
        config = widen_encoder(config)
    if kind in (ONE_PASS_JOINT, ONE_PASS_CROSS):
        config = config.with_fields(**(NO_STEPS if kind == ONE_PASS_JOINT else ONE_STEP))
    check_recipe(home, arm, recipe)
    config.save_pretrained(home / "preset")
    own = settings if kind != "yan" else {**recipe.get("flow_training", {}), **settings}
    train_file = taught_rows(arm["teacher"], task, recipe, options) if "teacher" in arm else task.files["train"]
    run = (train_file, task, recipe, options, own)
    if kind != "yan":
        stage = {ONE_PASS: "autoencoder", ONE_PASS_JOINT: "flow", ONE_PASS_CROSS: "flow"}.get(kind, kind)
        train_stage(stage, home / "preset", home / "model", updates, *run)
        return home / "model"
    first = round(arm.get("autoencoder_share", recipe["autoencoder_share"]) * updates)
    if not first:
        train_stage("flow", home / "preset", home / "model", updates, *run)
        return home / "model"
    autoencoder = options.output_dir / f"autoencoder-{shared_key(config, train_file)}-{options.seed}"
    train_stage("autoencoder", home / "preset", autoencoder, first, train_file, task, recipe, options, {})
    start = home / "start"  # the first stage with this arm's config
    if not start.exists():
        with replacing(start) as aside:
            shutil.copytree(autoencoder, aside, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
            config.save_pretrained(aside)
    train_stage("flow", start, home / "model", updates - first, *run)
    return home / "model"


def train_by_recipes(arm: dict, home: Path, task: Task, recipe: dict, options) -> Path:
    """An arm of the package's own recipes: by the command of a user, stage after stage, with the arm's settings."""
    check_recipe(home, arm, recipe)
    folder = None
    for name, settings in arm["recipes"].items():
        start, folder = folder, home / name
        settings = {"save_steps": settings["max_steps"], "use_cpu": options.use_cpu, "report_to": "none", **settings}
        settings |= {"tokenizer": task.tokenizer, "output_dir": folder, "seed": options.seed}
        settings |= {"train_file": task.files["train"], "validation_file": task.files["validation"]}
        settings |= {"config": start} if start else {}
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        command = [
            sys.executable,
            ROOT / "examples/pretrain.py",
            "--recipe",
            ROOT / f"configuration/recipes/{name}.yaml",
        ]
        if not (folder / "model.safetensors").exists():
            subprocess.run([*command, *words, "--resume"], check=True)
    YanConfig.from_pretrained(folder).save_pretrained(home / "preset")
    return folder


def train_on_encoder(arm: dict, home: Path, task: Task, recipe: dict, options) -> Path:
    """An arm on the pretrained encoder of the recipe: in one stage, by the updates of the others."""
    check_recipe(home, arm, recipe)
    kind, encoder = arm.get("kind", "yan"), options.encoder or recipe["encoder"]
    settings = {**recipe["encoder_training"], **arm.get("training", {})}
    if kind == encoder_arms.CLASSIFIER:
        settings = {**recipe.get("training", {}), **settings}
        encoder_arms.train_classifier(encoder, task.files["train"], recipe, settings, options.seed, home / "model")
        return home / "model"
    fields = {**recipe["encoder_fields"], **arm.get("fields", {})}
    encoder_arms.start_model(encoder, fields, kind, read_rows(task.files["train"]), home / "start", options.seed)
    YanConfig.from_pretrained(home / "start").save_pretrained(home / "preset")
    if "lora" in arm:
        own = recipe, settings, arm["lora"], options.seed, home / "model"
        encoder_arms.train_adapter(home / "start", task.files["train"], *own)
        return home / "model"
    stage = "flow" if kind in ("yan", ONE_PASS_JOINT) else kind
    run = (recipe["updates"], task.files["train"], task, recipe, options, settings)
    train_stage(stage, home / "start", home / "model", *run, tokenizer=home / "start")
    return home / "model"


def read_bytes(path: str | Path) -> bytes:
    """What a file of rows holds, packed or not: packing has a date."""
    return gzip.decompress(Path(path).read_bytes())


def fingerprint(*parts) -> str:
    """A short name for what a run was made of."""
    return hashlib.sha1(json.dumps(parts, sort_keys=True).encode(), usedforsecurity=False).hexdigest()[:10]


def check_recipe(home: Path, arm: dict, recipe: dict):
    """Note what a model is trained with. Raises ValueError if it was trained with something else."""
    own = fingerprint(arm, *(recipe.get(name) for name in TRAINING_NAMES))
    path = home / "trained_with.json"
    home.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != own:
        raise ValueError(f"{home} was trained with another recipe: choose another output_dir")
    path.write_text(json.dumps(own))


def shared_key(config: YanConfig, train_file: str) -> str:
    """Names the first stage that arms have in common whose encoder, decoder and rows are the same."""
    names = ["hidden_size", "intermediate_size", "num_encoder_layers", "num_decoder_layers", "num_answer_slots"]
    names += ["copy_prompt_to_slots", "vertices_per_token"]
    parts = [*(getattr(config, name) for name in names), Path(train_file).name]
    return hashlib.sha1(repr(parts).encode(), usedforsecurity=False).hexdigest()[:6]


def load(folder: Path, kind: str):
    """The model of an arm; one pass is a YAN whose flow is never asked."""
    if kind in (ONE_PASS, ONE_PASS_JOINT):
        return YanForFlowGeneration.from_pretrained(folder).eval()
    if kind == encoder_arms.CLASSIFIER:
        return encoder_arms.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return load_for_generation(str(folder))


def measure(folder: Path, name: str, task: Task, recipe: dict, options) -> dict:
    """What a trained model writes: its best text for every number of steps, and drawn texts for every temperature.

    Also how probable it finds the right texts, in nats a token (`likelihood.py`). With `draws` in the recipe, of so
    many texts drawn for each source, the share of those that are one of its references, and the total variation of
    their frequencies from the references'.
    """
    kind = recipe["arms"][name].get("kind", "yan")
    if kind == encoder_arms.CLASSIFIER:
        length = recipe["training"]["max_source_length"]
        return {"best": {"class": task.scores(encoder_arms.classify(folder, task.sources, length))}}
    model, tokenizer = load(folder, kind), AutoTokenizer.from_pretrained(folder)
    config = YanConfig.from_pretrained(options.output_dir / f"{name}-{options.seed}".replace(" ", "_") / "preset")
    nats = measure_nats(model, tokenizer, kind, task, recipe, config)

    def write(sources=task.sources, **settings):
        settings |= {"max_source_length": recipe.get("training", {}).get("max_source_length")}
        return generate_answers(model, tokenizer, sources, 100, max_new_tokens=config.canvas_length, **settings)

    only = {ONE_PASS_JOINT: 0, ONE_PASS_CROSS: 1}.get(kind)  # number of steps

    def draw(temperature: float, number: int, num_flow_steps: int = 3 if only is None else only):
        """So many texts for each source."""
        torch.manual_seed(0)
        own = {"top_k": 0}
        if kind not in INPUT_ADAPTERS:
            own = {"num_flow_steps": num_flow_steps, "seed": 0, "expert_choice": "sample"}
        repeated = [source for source in task.sources for _ in range(number)]
        texts = write(repeated, do_sample=True, temperature=float(temperature), **own)
        return [texts[start : start + number] for start in range(0, len(texts), number)]

    if kind == ONE_PASS:
        best = {"0": task.scores(write(num_flow_steps=0, crf_decoding=False))}  # it has learned none
        return {"best": best, **nats}
    if kind == "masked_diffusion":
        return {"best": {str(steps): task.scores(write(num_diffusion_steps=steps)) for steps in recipe["steps"]}}
    if kind in INPUT_ADAPTERS:
        best = {"greedy": task.scores(write(do_sample=False, num_beams=1))}
    else:
        steps = [0, *recipe["steps"]] if model.config.num_answer_slots else recipe["steps"]
        steps = steps if only is None else [only]
        best = {str(number): task.scores(write(num_flow_steps=number, do_sample=False)) for number in steps}
    figures, drawn = {"best": best, **nats}, {}
    if recipe.get("draws"):
        counts = recipe["steps"] if only is None else [only]
        steps = {"drawn": 1} if kind in INPUT_ADAPTERS else {str(number): number for number in counts}
        figures["distribution"] = {
            name: task.distribution(draw(1.0, recipe["draws"], number)) for name, number in steps.items()
        }
    for temperature in recipe["temperatures"]:
        texts = draw(temperature, NUM_TEXTS)
        alike = [100 * sum(self_bleu(row)) / NUM_TEXTS for row in texts]
        drawn[str(temperature)] = {"self_bleu": sum(alike) / len(alike), **task.scores([row[0] for row in texts])}
    return {**figures, "drawn": drawn}


def measure_nats(model, tokenizer, kind: str, task: Task, recipe: dict, config: YanConfig) -> dict:
    """Nats a token of the right texts under "nats", by number of steps, if the model has a likelihood."""
    if not likelihood.has_likelihood(model, kind):
        return {}
    steps = {"greedy": 0} if kind in INPUT_ADAPTERS else {"0": 0}
    if kind == ONE_PASS_CROSS:
        steps = {"1": 1}
    elif kind not in (*INPUT_ADAPTERS, ONE_PASS, ONE_PASS_JOINT):
        steps = {str(number): number for number in (1, 3) if number in recipe["steps"]}
    rows = [{"source": source, "target": text} for source in task.sources for text in task.references[source]]
    lengths = config.canvas_length, recipe.get("training", {}).get("max_source_length")
    found = {
        name: likelihood.nats_per_token(model, kind, tokenizer, rows, number, *lengths)
        for name, number in steps.items()
    }
    return {"nats": found}


def run_arm(name: str, task: Task, recipe: dict, options):
    """Train an arm with one seed, or what is left of it, measure it, and leave its figures in its folder."""
    home, kind = (
        options.output_dir / f"{name}-{options.seed}".replace(" ", "_"),
        recipe["arms"][name].get("kind", "yan"),
    )
    if kind in (MOST_FREQUENT, COPY):
        home.mkdir(parents=True, exist_ok=True)
        ((answer, _),) = Counter(row["target"] for row in read_rows(task.files["train"])).most_common(1)
        answers, group = (task.sources, "0") if kind == COPY else ([answer] * len(task.sources), "class")
        figures = {"best": {group: task.scores(answers)}, "parameters": 0}
    else:
        folder = train_arm(name, task, recipe, options)
        figures, model = measure(folder, name, task, recipe, options), load(folder, kind)
        is_one_pass = kind in (ONE_PASS, ONE_PASS_JOINT)
        unused = sum(each.numel() for each in model.flow.parameters()) if is_one_pass else 0
        figures["parameters"] = model.num_parameters() - unused
    figures["commit"] = current_commit()
    figures["measured_with"] = measured_with(recipe, recipe["arms"][name], len(task.sources))
    figures["rows_hash"] = task.rows_hash
    write_whole(home / "figures.json", json.dumps(figures, indent=1) + "\n")


def current_commit() -> str:
    """The commit that runs, and whether files differ from it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "modeling_yan"]).returncode
    return commit + " with changes" * bool(changed)


def write_table(path: Path, recipe: dict, runs: dict, num_rows: int):
    """All runs so far, and where they come from, whole or not at all."""
    table = {
        "task": recipe["task"],
        "recipe": {name: recipe[name] for name in recipe if name != "arms"},
        "arms": recipe["arms"],
        "rows": num_rows,
        "date": str(date.today()),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "runs": runs,
    }
    write_whole(path, json.dumps(table, indent=1) + "\n")


def collect(output_dir: Path, table: Path, recipe: dict, task: Task) -> dict:
    """The figures of all runs that were measured with this recipe, on these rows: arm -> seed -> figures.

    They lie in the folders of the runs, and in the table of an earlier call, perhaps on another machine.
    """
    earlier = json.loads(table.read_text())["runs"] if table.exists() else {}
    found = {name: dict(earlier.get(name, {})) for name in recipe["arms"]}
    for name, arm in recipe["arms"].items():
        for path in sorted(output_dir.glob(f"{name.replace(' ', '_')}-*/figures.json")):
            found[name][path.parent.name.rsplit("-", 1)[1]] = json.loads(path.read_text())
        wanted = measured_with(recipe, arm, len(task.sources))
        own = {seed: run for seed, run in found[name].items() if run.get("measured_with") == wanted}
        # the first runs have no hash of their rows
        own = {seed: run for seed, run in own.items() if run.get("rows_hash", task.rows_hash) == task.rows_hash}
        found[name] = dict(sorted(own.items(), key=lambda item: int(item[0])))
    return {name: runs for name, runs in found.items() if runs}


def measured_with(recipe: dict, arm: dict, num_rows: int) -> str:
    """What has to be equal for two figures to stand in one table."""
    return fingerprint({name: value for name, value in recipe.items() if name != "arms"}, arm, num_rows)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="for models and figures")
    parser.add_argument("--table", type=Path, help="where the table goes; into the output folder if left out")
    parser.add_argument("--arms", nargs="+", help="those of the recipe to train, all if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder", help="folder of the recipe's encoder, if it is not to be fetched from the hub")
    parser.add_argument("--num_rows", type=int, help="of the test file, instead of the recipe's")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(arguments)
    recipe = read_recipe(options.recipe)
    unknown = sorted(set(options.arms or ()) - set(recipe["arms"]))
    if unknown:
        parser.error(f"arms={', '.join(unknown)}: must be of {', '.join(recipe['arms'])}")
    task = Task(recipe, options.data_dir, options.output_dir, options.num_rows or recipe.get("num_rows"))
    table, num_rows = options.table or options.output_dir / "table.json", len(task.sources)
    for seed in options.seeds:
        options.seed = seed
        for name in options.arms or recipe["arms"]:
            if str(seed) not in collect(options.output_dir, table, recipe, task).get(name, {}):
                run_arm(name, task, recipe, options)
            runs = collect(options.output_dir, table, recipe, task)
            write_table(table, recipe, runs, num_rows)
            print(name, options.seed, runs[name][str(options.seed)]["best"], flush=True)


if __name__ == "__main__":
    main()
