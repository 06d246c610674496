"""Train YAN and every baseline on the same pairs, each with its best learning rate, and put them into one table.

    python examples/experiments/compare.py --config configuration/yan-transformer-tiny --tokenizer TOKENIZER \
        --train_file pairs.jsonl.gz --validation_file choose.jsonl.gz --test_file held-out.jsonl.gz \
        --output_dir results/compare --max_steps 8000

Models: yan; flow_matching, a YAN with one expert; decoder and encoder_decoder, both autoregressive; masked_diffusion.
Where `--models` names them, also decoder_conv, encoder_decoder_conv and masked_diffusion_conv: their self-attention
sees the preset's short convolution (`attention_conv_kernel`), as YAN's does.

All have the size of the preset, and `--max_steps` updates of as many rows. YAN divides its updates between its two
stages (`--autoencoder_share`) and sees the same pairs in both. Learning rates, one choice per stage, are chosen on the
validation file, and every test file gives a table, with and without the reference's length. A run that was killed
goes on when the command is given again. Writes a folder per model with learning_rates.json, and table.md and
table.json, with several test files into a folder for each.
"""

import argparse
from pathlib import Path

import torch

from modeling_yan import YanConfig
from modeling_yan.baselines import CONVOLVED, INPUT_ADAPTERS, match_size
from modeling_yan.data import read_rows
from modeling_yan.evaluation import DEFAULT_METRICS, METRIC_NAMES, RunOptions, check_metrics, evaluate_files
from modeling_yan.training import PretrainingArguments, expand_recipe, pretrain_with_best_rate

NUM_EXPERTS = {"yan": None, "flow_matching": 1}


def train_stage(stage: str, config: str | Path, output_dir: Path, max_steps: int, options):
    """One stage into a folder of its own, or what is left of it."""
    if (output_dir / "model.safetensors").exists():
        return
    shared = ("tokenizer", "train_file", "validation_file", "per_device_train_batch_size", "use_cpu", "seed")
    settings = {name: getattr(options, name) for name in (*shared, "max_source_length", "warmup_steps", "peak_tflops")}
    save_steps = max(1, max_steps // options.num_validations)
    schedule = {"max_steps": max_steps, "save_steps": save_steps, "decay_steps": max_steps // 3}
    arguments = PretrainingArguments(
        stage, str(config), output_dir=str(output_dir), report_to=["none"], bucket_batches=8, **settings, **schedule
    )
    pretrain_with_best_rate(arguments, options.learning_rates, options.trial_share)


def train_yan(name: str, options) -> Path:
    """Both stages of a YAN; the folder of its model."""
    folder, config = options.output_dir / "training" / name, YanConfig.from_pretrained(options.config)
    changes = {} if NUM_EXPERTS[name] is None else {"num_experts": NUM_EXPERTS[name]}
    match_size(config, **changes).save_pretrained(folder / "preset")
    first = round(options.autoencoder_share * options.max_steps)
    train_stage("autoencoder", folder / "preset", folder / "autoencoder", first, options)
    train_stage("flow", folder / "autoencoder", folder / name, options.max_steps - first, options)
    return folder / name


def train_model(name: str, options) -> Path:
    """A model of `--models`; its folder."""
    if name in NUM_EXPERTS:
        return train_yan(name, options)
    folder = options.output_dir / "training" / name
    train_stage(name, options.config, folder, options.max_steps, options)
    return folder


def parse_options(arguments):
    models = (*NUM_EXPERTS, *INPUT_ADAPTERS)
    default = [name for name in models if name not in CONVOLVED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="folder or hub name of a YAN preset")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--train_file", nargs="+", required=True, help="rows with source and target")
    parser.add_argument("--validation_file", nargs="+", required=True, help="pairs that the rates are chosen on")
    parser.add_argument("--test_file", nargs="+", required=True, help="pairs; each file gives a table")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=default, choices=models)
    parser.add_argument("--baseline", default="decoder", help="the model that the others are tested against")
    parser.add_argument("--max_steps", type=int, default=8000, help="updates of every model, all its stages together")
    parser.add_argument("--autoencoder_share", type=float, default=0.75, help="YAN: share of the first stage")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--trial_share", type=float, default=0.2)
    parser.add_argument("--num_validations", type=int, default=8, help="of a stage, each with a checkpoint")
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--per_device_train_batch_size", type=int, default=32)
    parser.add_argument("--max_source_length", type=int, default=64)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="of the machine; measured if 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--num_rows", type=int, default=1000, help="rows of a table")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT_METRICS, choices=METRIC_NAMES, metavar="NAME")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--num_flow_steps", type=int, default=3)
    parser.add_argument("--num_diffusion_steps", type=int, default=16)
    parser.add_argument("--eval_batch_size", type=int, default=32, help="of the tables")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(expand_recipe(parser, arguments))
    if options.baseline not in options.models:
        parser.error(f"baseline={options.baseline}: must be among the models, {', '.join(options.models)}")
    return options


def main(arguments: list[str] | None = None):
    options = parse_options(arguments)
    rows = {file: read_rows(file)[: options.num_rows] for file in options.test_file}
    check_metrics(options.metrics)
    folders = {name: str(train_model(name, options)) for name in options.models}
    settings = RunOptions(
        max_new_tokens=options.max_new_tokens,
        num_flow_steps=options.num_flow_steps,
        num_diffusion_steps=options.num_diffusion_steps,
        num_seeds=options.seeds,
        batch_size=options.eval_batch_size,
    )
    where = options.output_dir, settings, folders[options.baseline]
    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"
    about = {"max_steps": options.max_steps}
    for table in evaluate_files(
        list(folders.values()), rows, *where, device, description=about, metrics=options.metrics
    ):
        print(table)


if __name__ == "__main__":
    main()
