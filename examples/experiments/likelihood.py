"""How probable a model finds right texts: the exact likelihood of models that generate in quite different ways.

    python examples/experiments/likelihood.py --model results/e2e/MODEL --kind yan --data e2e-test.jsonl.gz --steps 1 3

An autoregressive model multiplies the probabilities of its tokens. A YAN's are those of `log_likelihood`: a canvas
model has to find the EOS after the text in all positions, too.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_yan.baselines import INPUT_ADAPTERS
from modeling_yan.checks_yan import IGNORE_INDEX
from modeling_yan.data import FlowCollator, read_rows
from modeling_yan.evaluation import load_for_generation
from modeling_yan.flow_matching_yan import token_log_likelihood

BATCH_SIZE, MOST_ROWS = 50, 500
WITHOUT = ("masked_diffusion", "classifier")  # kinds whose likelihood of a text is not known


def has_likelihood(model, kind: str) -> bool:
    """Whether all experts are in the likelihood: not where those of a token or of a chain are chosen."""
    if kind in WITHOUT:
        return False
    return kind in INPUT_ADAPTERS or model.config.num_experts == 1 or model.config.expert_scope == "sequence"


def batches_that_fit(tokenizer, rows: list[dict], canvas_length: int, max_source_length: int | None) -> Iterator[dict]:
    """Batches of the rows whose target and EOS fit into the canvas: what no model sees whole is measured by none."""
    longest = max_source_length or tokenizer.model_max_length
    collate = FlowCollator(tokenizer, max_source_length=longest, canvas_length=canvas_length)
    fitting = [
        row for row in rows if len(tokenizer(row["target"], add_special_tokens=False).input_ids) < canvas_length
    ]
    for start in range(0, len(fitting), BATCH_SIZE):
        yield collate(fitting[start : start + BATCH_SIZE])


@torch.no_grad()
def nats_per_token(
    model, kind: str, tokenizer, rows: list[dict], num_steps: int, canvas_length: int, max_source_length: int | None
) -> float:
    """Negative log-likelihood of the targets and their EOS over the number of their tokens."""
    total, num_tokens = 0.0, 0
    chosen = random.Random(0).sample(rows, min(MOST_ROWS, len(rows)))  # of all sources
    for batch in batches_that_fit(tokenizer, chosen, canvas_length, max_source_length):
        if kind in INPUT_ADAPTERS:
            found = autoregressive_log_likelihood(model, kind, batch)
        else:
            found = model.log_likelihood(**batch, num_flow_steps=num_steps)
        total -= float(found.double().sum())
        num_tokens += int((batch["labels"] != IGNORE_INDEX).sum())
    return total / num_tokens


def autoregressive_log_likelihood(model, kind: str, batch: dict) -> torch.Tensor:
    """Log-likelihood (B,) of the labels of a batch."""
    inputs = INPUT_ADAPTERS[kind](batch, model.config.pad_token_id)
    logits, labels = model(**inputs).logits, inputs["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    is_target = labels != IGNORE_INDEX
    return (token_log_likelihood(logits, labels.masked_fill(~is_target, 0)) * is_target).sum(1)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kind", default="yan", help="yan, decoder or encoder_decoder")
    parser.add_argument("--data", type=Path, required=True, help="rows of source and target")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3], help="of a YAN; 0 for its draft")
    parser.add_argument("--canvas_length", type=int, default=48)
    parser.add_argument("--max_source_length", type=int, default=64)
    options = parser.parse_args(arguments)
    model, tokenizer = load_for_generation(str(options.model)), AutoTokenizer.from_pretrained(options.model)
    if not has_likelihood(model, options.kind):
        parser.error(
            f"--model {options.model}: its experts are chosen and not summed over, or its kind has no likelihood"
        )
    rows, lengths = read_rows(options.data), (options.canvas_length, options.max_source_length)
    for steps in options.steps if options.kind not in INPUT_ADAPTERS else options.steps[:1]:
        found = nats_per_token(model, options.kind, tokenizer, rows, steps, *lengths)
        print(f"{steps} steps: {found:.4f} nats a token", flush=True)


if __name__ == "__main__":
    main()
