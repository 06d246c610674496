"""The latents of a checkpoint and its experts: anisotropy, multimodality, and which expert moves which kind of token.

    python examples/experiments/geometry.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl \
        --output results/geometry

Latents are those of the targets' own tokens, without the fill after them. Mean cosine of different latents, variance
explained by principal components, and the held-out likelihood of Gaussian mixtures with 1 to 16 components say how far
the end point of the flow is from one Gaussian; the same numbers of as many normal random vectors stand beside them.
The experts are those that the gate takes when the answers are generated. Writes geometry.json and geometry.png.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.data import FlowCollator, read_rows
from modeling_yan.evaluation import (
    effective_dimension,
    explained_variance,
    mean_cosine,
    mixture_likelihoods,
    usage_by_class,
    usage_information,
)
from modeling_yan.training import expand_recipe
from modeling_yan.visualization import saved_figure

COMPONENTS = (1, 2, 4, 8, 16)


def batches(tokenizer, config, rows, batch_size):
    """Collated batches of the rows, in order."""
    collator = FlowCollator(tokenizer, config.max_prompt_length, config.canvas_length)
    for start in range(0, len(rows), batch_size):
        yield collator(rows[start : start + batch_size])


@torch.no_grad()
def target_latents(model, tokenizer, rows, batch_size) -> torch.Tensor:
    """Latents (N, D) of all tokens of the targets."""
    latents = []
    for batch in batches(tokenizer, model.config, rows, batch_size):
        canvas = model.labels_to_canvas(batch["labels"], model.config.canvas_length)
        is_text = torch.nn.functional.pad(batch["labels"] >= 0, (0, canvas.shape[1] - batch["labels"].shape[1]))
        is_text &= canvas != model.config.eos_token_id
        latents.append(model.model(canvas).last_hidden_state[is_text])
    return torch.cat(latents)


def describe(latents: torch.Tensor) -> dict:
    """Anisotropy and multimodality of latents (N, D)."""
    shares = explained_variance(latents)
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count <= len(shares)]
    return {
        "num_latents": len(latents),
        "standard_deviation": float(latents.std()),
        "mean_cosine": mean_cosine(latents),
        "effective_dimension": effective_dimension(latents),
        "explained_variance": {count: float(shares[count - 1]) for count in counts},
        "mixture_likelihood": mixture_likelihoods(latents, COMPONENTS),
    }


def token_class(token: int, tokenizer) -> str:
    """What kind of token an id is."""
    if token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        return "fill"
    text = tokenizer.decode([token]).strip()
    if not any(letter.isalnum() for letter in text):
        return "punctuation"
    if text[0].isupper():
        return "capitalised"
    return "short word" if len(text) <= 3 else "longer word"


@torch.no_grad()
def used_experts(model, tokenizer, rows, batch_size) -> tuple[list[int], list[str]]:
    """Expert and class of every token of the first canvas of each answer; the fill is what stands after the text."""
    experts, classes = [], []
    for batch in batches(tokenizer, model.config, rows, batch_size):
        options = {"return_dict_in_generate": True, "return_prompt": False, "do_sample": False}
        output = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        length = output.experts[0].shape[1]
        for written, chosen in zip(output.sequences.tolist(), output.experts[0].tolist(), strict=True):
            tokens = (written + [tokenizer.pad_token_id] * length)[:length]
            experts += chosen
            classes += [token_class(token, tokenizer) for token in tokens]
    return experts, classes


def draw(latents: dict, usage: dict[str, list[float]], title: str, path: Path):
    """Explained variance, likelihood of mixtures, and expert shares by class of token."""
    with saved_figure(path, 14, 4) as figure:
        axes = figure.subplots(1, 3)
        for name, found in latents.items():
            shares, likelihoods = found["explained_variance"], found["mixture_likelihood"]
            axes[0].plot(list(shares), list(shares.values()), marker="o", label=name)
            gains = [value - likelihoods[1] for value in likelihoods.values()]
            axes[1].plot(list(likelihoods), gains, marker="o", label=name)
        axes[0].set(xlabel="principal components", ylim=(0, 1.02), title="share of variance explained")
        axes[1].set(xlabel="Gaussians in the mixture", title="log-likelihood gained over one Gaussian")
        axes[1].set_ylabel("held out, nats a dimension")
        for axis in axes[:2]:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.grid(alpha=0.3)
            axis.legend()
        lefts = [0.0] * len(usage)
        for expert in range(len(next(iter(usage.values())))):
            shares = [row[expert] for row in usage.values()]
            axes[2].barh(list(usage), shares, left=lefts, label=f"expert {expert}")
            lefts = [left + share for left, share in zip(lefts, shares)]
        axes[2].set(xlim=(0, 1), title="expert by kind of token")
        axes[2].legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08))
        figure.suptitle(title)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a YAN")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, rows with source and target")
    parser.add_argument("--num_rows", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for geometry.json and geometry.png")
    options = parser.parse_args(expand_recipe(parser, arguments))
    torch.set_num_threads(options.threads)
    rows = read_rows(options.data)[: options.num_rows]
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = target_latents(model, tokenizer, rows, options.batch_size)
    normal = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    latents = {"latents of the targets": describe(found), "normal vectors": describe(normal)}
    used, num_experts = used_experts(model, tokenizer, rows, options.batch_size), model.config.num_experts
    usage, information = usage_by_class(*used, num_experts), usage_information(*used, num_experts)
    record = {"model": options.model, "num_rows": len(rows), "latents": latents}
    record |= {"expert_usage": usage, "information_nats": information}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "geometry.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    draw(latents, usage, f"{Path(options.model).name}, {len(rows)} targets", options.output / "geometry.png")


if __name__ == "__main__":
    main()
