"""What the experts of a model specialise in.

    python examples/experiments/expert_texts.py --model results/e2e/MODEL --data e2e-test.jsonl.gz \
        --output docs/results/e2e/experts.json

The model has one expert for a text (`expert_scope="sequence"`), and its objective is the text's likelihood.

- Usage of the right texts is that of the experts' posterior with a flattened gate, as in training.
- Usage of the prompts is that of the gate.
- Information is what a text says of its expert, in nats, of the right texts and of drawn ones. The second is the
  mutual information of expert and text, given the prompt. It is at most the logarithm of the number of experts.
- Each expert has its text for every prompt: mean number of words, the most frequent beginning, and examples.

`results_page.py` puts the file, if it lies beside a table, into the page.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_yan import YanForFlowGeneration
from modeling_yan.data import FlowCollator, read_rows
from modeling_yan.data.rows import write_whole
from modeling_yan.evaluation import generate_answers

NUM_WORDS = 2  # of a beginning


def read_prompts(path: Path, number: int | None) -> list[dict]:
    """One row of each source, at most `number` of them."""
    rows = list({row["source"]: row for row in read_rows(path)}.values())
    return rows[:number]


def write_with_each(model, tokenizer, sources: list[str], max_source_length: int | None) -> list[list[str]]:
    """For each expert its texts for the sources."""
    experts = range(model.config.num_experts)
    texts: list[list[str]] = [[] for _ in experts]
    for source in sources:
        inputs = tokenizer([source], return_tensors="pt", truncation=True, max_length=max_source_length)
        output = model.generate(
            **inputs,
            expert_choice="ranked",
            num_return_sequences=len(experts),
            return_prompt=False,
            return_dict_in_generate=True,
        )
        written = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        for expert, text in zip(output.experts[0][:, 0].tolist(), written, strict=True):
            texts[expert].append(text.strip())
    return texts


@torch.no_grad()
def measure_texts(model, tokenizer, rows: list[dict], max_source_length: int | None) -> tuple[torch.Tensor, float]:
    """Usage (K,) of the experts by their posterior, and the information about them, as means over rows."""
    lengths = {"max_source_length": max_source_length} if max_source_length else {}
    collate = FlowCollator(tokenizer, model=model, **lengths)
    outputs = [model(**collate([row])) for row in rows]
    usage = torch.stack([output.expert_usage for output in outputs]).mean(0)
    return usage, sum(float(output.expert_information) for output in outputs) / len(outputs)


@torch.no_grad()
def gate_shares(model, tokenizer, sources: list[str], max_source_length: int | None) -> torch.Tensor:
    """The gate's mean probability (K,) of each expert."""
    shares = []
    for source in sources:
        inputs = tokenizer([source], return_tensors="pt", truncation=True, max_length=max_source_length)
        shares.append(model.generate(**inputs, return_dict_in_generate=True).gate[0][0, 0])
    return torch.stack(shares).mean(0)


def describe_expert(texts: list[str], num_examples: int) -> dict:
    """How the texts of one expert are."""
    beginnings = Counter(" ".join(text.split()[:NUM_WORDS]) for text in texts)
    words, count = beginnings.most_common(1)[0]
    return {
        "mean_words": sum(len(text.split()) for text in texts) / len(texts),
        "beginning": [words, count / len(texts)],
        "examples": texts[:num_examples],
    }


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows of source and target")
    parser.add_argument("--num_rows", type=int, help="sources to use, all if left out")
    parser.add_argument("--max_source_length", type=int, help="tokens of a source, as in training")
    parser.add_argument("--num_examples", type=int, default=2, help="texts of each expert to keep")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    model = YanForFlowGeneration.from_pretrained(options.model).eval()
    config = model.config
    if config.num_experts < 2 or config.expert_scope != "sequence" or config.train_expert_choice != "posterior":
        found = f"num_experts={config.num_experts}, expert_scope={config.expert_scope!r}"
        parser.error(f"--model {options.model} ({found}): must have experts of whole texts, trained by the posterior")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.truncation_side = "left"  # as the collator cuts
    rows, length = read_prompts(options.data, options.num_rows), options.max_source_length
    sources = [row["source"] for row in rows]
    drawn = generate_answers(
        model, tokenizer, sources, 100, seed=0, max_source_length=length, do_sample=True, expert_choice="sample"
    )
    usage, information = measure_texts(model, tokenizer, rows, length)
    drawn_rows = [{**row, "target": text} for row, text in zip(rows, drawn, strict=True) if text.strip()]
    _, own_information = measure_texts(model, tokenizer, drawn_rows, length)
    gate = gate_shares(model, tokenizer, sources, length)
    texts = write_with_each(model, tokenizer, sources, length)
    experts = [
        {"usage": float(usage[index]), "gate": float(gate[index]), **describe_expert(own, options.num_examples)}
        for index, own in enumerate(texts)
    ]
    result = {
        "rows": len(rows),
        "information": {"right texts": information, "drawn texts": own_information},
        "prompts": sources[: options.num_examples],
        "experts": sorted(experts, key=lambda expert: -expert["gate"]),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"a drawn text says {own_information:.2f} nats of its expert; the gate's favourite has {max(gate):.2f}")


if __name__ == "__main__":
    main()
