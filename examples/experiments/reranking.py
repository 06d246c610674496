"""Whether a model can tell which of its own candidates is right: ways to choose one of several texts for a prompt.

    python examples/experiments/reranking.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl.gz \
        --num_candidates 8 --output results/reranking

Every candidate is written from a start noise of its own, deterministically, on one canvas. One is chosen without any
other model:

    first       the one that generation writes anyway
    own         the most probable under the latents that it was decoded from
    mean        the most probable under the latents of all candidates, their probabilities averaged
    agreement   the one that agrees with the others in most places (minimum Bayes risk)
    velocity    the one whose latents the flow finds most probable, over a few times and noises that all share, as in
                classification by diffusion models (arXiv 2303.16203)
    best        the one nearest to the reference: an upper bound, no choice

Writes reranking.json, with exact match, ROUGE-L, their 95% bootstrap intervals and a paired permutation test against
the first candidate for each way and file, and reranking.png.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.data import read_rows
from modeling_yan.evaluation import (
    exact_match_scores,
    mean_with_interval,
    paired_bootstrap,
    paired_permutation_test,
    rouge_scores,
)
from modeling_yan.flow_matching_yan import as_one_token, interpolate, token_nll
from modeling_yan.training import expand_recipe
from modeling_yan.visualization import saved_figure

FIGURES = ("exact_match", "rougeL")


def write_candidates(model, batch, num_candidates: int):
    """Canvases (B, C, L) of token ids, and the log-probabilities of all tokens in them, C times (B, L, V)."""
    length = model.config.canvas_length
    canvases, log_probabilities = [], []
    for seed in range(num_candidates):
        options = {"do_sample": False, "seed": seed, "max_new_tokens": length, "return_dict_in_generate": True}
        latents = model.generate(**batch, **options).trajectory[0][:, -1]
        logits = model.decode(latents)
        canvases.append(model.most_likely(logits, latents))
        log_probabilities.append(logits.log_softmax(-1))
    return torch.stack(canvases, 1), log_probabilities


def velocity_likelihood(model, batch, canvases: torch.LongTensor, num_times: int) -> torch.Tensor:
    """Log-likelihood (B, C) of the velocities towards the candidates' latents."""
    if model.config.train_expert_choice == "posterior":
        raise ValueError("train_expert_choice='posterior': reranks models that know the likelihood of a velocity")
    batch_size, num_candidates, length = canvases.shape
    mask = batch["attention_mask"]
    prompt = model.encode_prompt(batch["input_ids"], mask)
    condition = model.condition(prompt.latents, prompt.attention_mask, length)
    positions = model.model.embeddings.position_embeddings.weight[:length]
    scores = torch.zeros(batch_size, num_candidates)
    for index in range(num_candidates):
        x_1 = model.model(canvases[:, index]).last_hidden_state
        for step in range(num_times):
            x_0 = model.start_noise((1, length), x_1, seed=1 + step)
            time = torch.full((batch_size,), (step + 0.5) / num_times)
            x_t, modulation = interpolate(x_0, x_1, time), model.flow.modulation(time)
            states = model.flow.trunk(x_t, positions, modulation, condition)
            gate_log_probs = model.flow.gate_log_probs(states, modulation, condition)
            mixture = x_1 - x_0, model.flow.velocities(states, x_t), gate_log_probs
            mixture = as_one_token(*mixture) if model.config.expert_scope == "sequence" else mixture
            scores[:, index] -= token_nll(*mixture, model.config.objective.flow_sigma).sum(-1)
    return scores


def text_likelihoods(log_probabilities: torch.Tensor, canvases: torch.LongTensor) -> torch.Tensor:
    """Log-likelihood (B, C) of canvases (B, C, L) where the tokens' are (B, L, V)."""
    of_tokens = log_probabilities.unsqueeze(1).expand(-1, canvases.shape[1], -1, -1)
    return of_tokens.gather(-1, canvases.unsqueeze(-1)).sum((-1, -2))


def rank(model, batch, canvases, log_probabilities, num_times: int) -> dict[str, torch.Tensor]:
    """For each way the number (B,) of the candidate that it chooses."""
    likelihoods = torch.stack([text_likelihoods(each, canvases) for each in log_probabilities], dim=-1)  # (B, C, C)
    agreement = (canvases.unsqueeze(1) == canvases.unsqueeze(2)).float().mean((-1, -2))
    return {
        "first": torch.zeros(len(canvases), dtype=torch.long),
        "own": likelihoods.diagonal(dim1=1, dim2=2).argmax(-1),
        "mean": likelihoods.logsumexp(-1).argmax(-1),
        "agreement": agreement.argmax(-1),
        "velocity": velocity_likelihood(model, batch, canvases, num_times).argmax(-1),
    }


def read_text(tokenizer, canvas: torch.LongTensor) -> str:
    """The text of a canvas (L,) up to its first EOS."""
    ids = canvas.tolist()
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


@torch.no_grad()
def choose_texts(model, tokenizer, rows, options) -> dict[str, list[str]]:
    """The text that each way chooses for every row."""
    chosen: dict[str, list[str]] = {}
    for start in range(0, len(rows), options.batch_size):
        part = rows[start : start + options.batch_size]
        batch = tokenizer([row["source"] for row in part], padding=True, return_tensors="pt")
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        canvases, log_probabilities = write_candidates(model, batch, options.num_candidates)
        ways = rank(model, batch, canvases, log_probabilities, options.num_times)
        texts = [[read_text(tokenizer, canvas) for canvas in candidates] for candidates in canvases]
        for name, indices in ways.items():
            chosen.setdefault(name, []).extend(own[index] for own, index in zip(texts, indices.tolist()))
        for own, row in zip(texts, part):
            scores = rouge_scores(own, [row["target"]] * len(own))["rougeL"]
            exact = exact_match_scores(own, [row["target"]] * len(own))
            best = max(range(len(own)), key=lambda index: (exact[index], scores[index]))
            chosen.setdefault("best", []).append(own[best])
    return chosen


def summarize(chosen: dict[str, list[str]], targets: list[str]) -> list[dict]:
    """A row for each way: its figures with intervals, and what it differs from the first candidate by."""
    scores = {
        name: {"exact_match": exact_match_scores(texts, targets), "rougeL": rouge_scores(texts, targets)["rougeL"]}
        for name, texts in chosen.items()
    }
    table = []
    for name, own in scores.items():
        row = {"choice": name}
        for figure in FIGURES:
            first = scores["first"][figure]
            mean, low, high = mean_with_interval(own[figure])
            difference, *interval = paired_bootstrap(own[figure], first)[:3]
            row[figure] = {"mean": mean, "low": low, "high": high, "difference": difference, "interval": interval}
            row[figure]["p"] = paired_permutation_test(own[figure], first)
        table.append(row)
    return table


def draw(tables: dict[str, list[dict]], path: Path):
    """Exact match of every way, a panel a file."""
    with saved_figure(path, 3.4 * len(tables), 3.4) as figure:
        axes = figure.subplots(1, len(tables), squeeze=False)
        for axis, (name, table) in zip(axes[0], tables.items()):
            cells = [row["exact_match"] for row in table]
            means = [cell["mean"] for cell in cells]
            lows, highs = ([abs(cell[end] - cell["mean"]) for cell in cells] for end in ("low", "high"))
            colors = ["tab:blue"] * (len(table) - 1) + ["lightgrey"]
            axis.bar([row["choice"] for row in table], means, yerr=[lows, highs], capsize=3, color=colors)
            axis.tick_params(axis="x", rotation=60)
            axis.set(title=name, ylabel="exact match")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a YAN")
    parser.add_argument("--data", required=True, nargs="+", help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument("--num_candidates", type=int, default=8)
    parser.add_argument("--num_times", type=int, default=6, help="at which the flow is asked for its likelihood")
    parser.add_argument("--num_rows", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for reranking.json and reranking.png")
    options = parser.parse_args(expand_recipe(parser, arguments))
    if options.num_candidates < 2:
        parser.error(f"num_candidates={options.num_candidates}: must be at least 2")
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer, tables = AutoTokenizer.from_pretrained(options.model), {}
    for file in options.data:
        rows = read_rows(file)[: options.num_rows]
        table = summarize(choose_texts(model, tokenizer, rows, options), [row["target"] for row in rows])
        tables[Path(file).name.split(".")[0]] = table
        for row in table:
            parts = (f"{name} {row[name]['mean']:.3f} (p {row[name]['p']:.3f})" for name in FIGURES)
            print(f"{file}, {row['choice']}:", ", ".join(parts), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"model": options.model, "num_candidates": options.num_candidates, "tables": tables}
    (options.output / "reranking.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(tables, options.output / "reranking.png")


if __name__ == "__main__":
    main()
