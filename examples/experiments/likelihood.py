"""How probable a model finds right texts: the exact likelihood of models that generate in quite different ways.

    python examples/experiments/likelihood.py --model results/e2e/MODEL --kind yan --data e2e-test.jsonl.gz --steps 1 3

An autoregressive model multiplies the probabilities of its tokens. A YAN has that of its chain of tokens, or of every
token by itself, where its solver ends; with one of several experts for a text it sums over them,

    p(y) = sum_k pi(k) p(y | x1_hat(k)),

and its noise is the fixed one of generation without sampling. A canvas model has to find the EOS behind the text in
all positions, too. So its likelihood is a lower bound of the text's.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_yan.baselines import INPUT_ADAPTERS
from modeling_yan.canvas_yan import YanPrompt
from modeling_yan.checks_yan import IGNORE_INDEX
from modeling_yan.data import FlowCollator, read_rows
from modeling_yan.evaluation import load_for_generation
from modeling_yan.experts_yan import YanExpertChoice
from modeling_yan.flow_matching_yan import solve_flow, token_log_likelihood
from modeling_yan.layers_yan import count_positions

BATCH_SIZE, MOST_ROWS = 50, 500
WITHOUT = ("masked_diffusion", "classifier")  # kinds whose likelihood of a text is not known


def has_likelihood(model, kind: str) -> bool:
    """Whether the likelihood of a text can be summed up: not over chains of experts that lead to chains of tokens."""
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
    for batch in batches_that_fit(tokenizer, rows[:MOST_ROWS], canvas_length, max_source_length):
        find = autoregressive_log_likelihood if kind in INPUT_ADAPTERS else canvas_log_likelihood
        total -= float(find(model, kind, batch, num_steps).double().sum())
        num_tokens += int((batch["labels"] != IGNORE_INDEX).sum())
    return total / num_tokens


def autoregressive_log_likelihood(model, kind: str, batch: dict, num_steps: int) -> torch.Tensor:
    """Log-likelihood (B,) of the labels of a batch."""
    inputs = INPUT_ADAPTERS[kind](batch, model.config.pad_token_id)
    logits, labels = model(**inputs).logits, inputs["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    is_target = labels != IGNORE_INDEX
    return (token_log_likelihood(logits, labels.masked_fill(~is_target, 0)) * is_target).sum(1)


def canvas_log_likelihood(model, kind: str, batch: dict, num_steps: int) -> torch.Tensor:
    """Log-likelihood (B,) of the labels of a batch, and of EOS behind them to the end of the canvas."""
    ids, mask, length = batch["input_ids"], batch["attention_mask"], model.config.canvas_length
    prompt = model.encode_prompt(ids, mask, count_positions(ids, mask))
    canvas = model.labels_to_canvas(batch["labels"], length)
    if num_steps == 0:
        return log_likelihood_of(model, model.draft(prompt.latents, length), canvas)
    joint = []
    for expert in range(model.config.num_experts):
        latents, gate_log_prob = lead_to(model, prompt, expert, length, num_steps)
        joint.append(gate_log_prob + log_likelihood_of(model, latents, canvas))
    return torch.stack(joint).logsumexp(0)


def lead_to(model, prompt: YanPrompt, expert: int, length: int, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where one expert leads, (B, L, D), and the gate's log-probability (B,) of it."""
    condition = model.condition(prompt.latents, prompt.attention_mask, length, prompt.position_ids)
    x_0 = model.start_noise((1, length), prompt.latents).expand(len(prompt.latents), -1, -1)
    choice = YanExpertChoice(judge=lambda ends, prior: torch.full(ends.shape[:2], expert, device=ends.device))
    velocity = model.velocity_field(condition, length, num_steps, choice)
    latents = solve_flow(velocity, x_0, num_steps)
    return latents, velocity.prior.gate_log_probs[:, 0, expert]


def log_likelihood_of(model, latents: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """Log-likelihood (B,) of the canvases (B, L) that latents (B, L, D) stand for."""
    logits = model.decode(latents)
    if model.transitions is None:
        return token_log_likelihood(logits, canvas).sum(1)
    return model.transitions.log_likelihood(model.get_input_embeddings(), logits, latents, canvas)


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
        parser.error(f"--model {options.model}: the likelihood of a text is not known")
    rows, lengths = read_rows(options.data), (options.canvas_length, options.max_source_length)
    for steps in options.steps if options.kind not in INPUT_ADAPTERS else options.steps[:1]:
        found = nats_per_token(model, options.kind, tokenizer, rows, steps, *lengths)
        print(f"{steps} steps: {found:.4f} nats a token", flush=True)


if __name__ == "__main__":
    main()
