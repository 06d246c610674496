"""`yan train` and `yan finetune`: the options are those of the settings and trainers that they stand for."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .loading import prepare_library
from .parsing import Commands, ExampleFormatter, OneLineErrors, add_command

if TYPE_CHECKING:
    from transformers import HfArgumentParser


TRAIN_EXAMPLES = """  yan train --recipe configuration/recipes/tiny-autoencoder.yaml --tokenizer tokenizer \\
      --train_file my.jsonl.gz --validation_file held-out.jsonl.gz --output_dir stage-one
  yan train --recipe configuration/recipes/tiny-flow.yaml --config stage-one --tokenizer tokenizer \\
      --train_file my.jsonl.gz --validation_file held-out.jsonl.gz --output_dir stage-two
  accelerate launch --module modeling_yan train ...   on several devices; the same with --resume True goes on"""
FINETUNE_EXAMPLES = """  yan finetune --encoder distilbert-base-uncased --train_file pairs.csv \\
      --source_column question --target_column answer --output_dir new
  yan finetune --encoder sentence-transformers/all-MiniLM-L6-v2 --dataset SetFit/sst2 --source_column text \\
      --target_column label_text --output_dir sentiment
  yan finetune --model MODEL --train_file pairs.jsonl --validation_file held-out.jsonl \\
      --output_dir adapter --lora"""


def add_to(commands: Commands) -> None:
    """Add the commands of this module."""
    purpose = "Train a model from scratch, in two stages."
    parser = add_command(commands, "train", train, purpose, TRAIN_EXAMPLES, add_help=False)
    parser.set_defaults(reads_words=True)
    purpose = "Fine-tune a checkpoint, or make a new model on a pretrained encoder, out of a file or data set."
    parser = add_command(commands, "finetune", finetune, purpose, FINETUNE_EXAMPLES, add_help=False)
    parser.set_defaults(reads_words=True)


def train(options: argparse.Namespace, words: list[str]) -> None:
    """Pre-train with the settings of the words."""
    prepare_library()
    from ..training import parse_arguments, pretrain

    pretrain(parse_arguments(words, _parser_maker(options)))


def finetune(options: argparse.Namespace, words: list[str]) -> None:
    """Fine-tune with the settings of the words."""
    prepare_library()
    from ..training.finetuning import finetune, parse_finetuning

    finetune(*parse_finetuning(words, _parser_maker(options)))


def _parser_maker(options: argparse.Namespace) -> "Callable[..., HfArgumentParser]":
    """Function from dataclasses to a parser of their fields, with the examples of a command and errors of one line."""
    from transformers import HfArgumentParser

    class Reader(OneLineErrors, HfArgumentParser):
        """The parser."""

    texts = {name: getattr(options.parser, name) for name in ("prog", "description", "epilog")}
    return partial(Reader, formatter_class=ExampleFormatter, **texts)
