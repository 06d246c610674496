"""Prompts with several right answers: do the tokens of one text fit each other, and are all the answers found?

    python examples/experiments/several_answers.py --output results/several_answers

Every prompt has three answers. Two of them (0.3 of the rows each) begin with the same token, so that the likeliest
token of the first place is theirs; the likeliest tokens of the other places are those of the third answer (0.4). A
model whose tokens know nothing of each other writes a text that is no answer. Small models of the package differ in
the number of experts, in how an expert is chosen, in whether the steps see settled tokens, and in whether a canvas is
read off as a chain. Writes several_answers.json and several_answers.png.
"""

import argparse
import json
from pathlib import Path

import torch

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.training import words_with_recipe

SHARES = (0.3, 0.3, 0.4)
FIRST_TOKEN = 4  # those before it are special
ANSWER_TOKENS = 8  # of one prompt: two first tokens, three second and three third ones
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_encoder_layers": 1,
    "num_flow_layers": 2,
    "num_decoder_layers": 1,
    "max_position_embeddings": 16,
    "canvas_length": 4,
    "initializer_range": 0.08,
    "freeze_encoder": False,
    "freeze_decoder": False,
    "freeze_embeddings": False,
}
LIKELIEST = {"num_experts": 3, "train_expert_choice": "likeliest"}
ARMS = {
    "one expert": {"num_experts": 1},
    "one expert, self-conditioning": {"num_experts": 1, "self_conditioning": True},
    "one expert, chains": {"num_experts": 1, "transition_rank": 8},
    "one expert, chains that train it": {"num_experts": 1, "transition_rank": 8, "detach_transitions": False},
    "three, drawn from the gate": {"num_experts": 3},
    "three, likeliest, per token": LIKELIEST,
    "three, likeliest, per sequence": {**LIKELIEST, "expert_scope": "sequence"},
    "the same, self-conditioning": {**LIKELIEST, "expert_scope": "sequence", "self_conditioning": True},
}


def answers_of(num_prompts: int) -> torch.LongTensor:
    """(P, 3, 3) the tokens of each prompt's three answers."""
    answers = torch.tensor([[0, 1, 2], [0, 3, 4], [5, 6, 7]])
    return FIRST_TOKEN + answers + ANSWER_TOKENS * torch.arange(num_prompts).view(-1, 1, 1)


def train(fields: dict, answers: torch.LongTensor, num_updates: int, seed: int) -> YanForFlowGeneration:
    """A model of these config fields, trained on prompts and answers drawn by the seed."""
    torch.manual_seed(seed)
    vocab_size = FIRST_TOKEN + (ANSWER_TOKENS + 1) * len(answers)
    model = YanForFlowGeneration(YanConfig(vocab_size=vocab_size, **SIZES, **fields)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates)
    for _ in range(num_updates):
        prompts = torch.randint(len(answers), (32,))
        chosen = torch.multinomial(torch.tensor(SHARES), 32, replacement=True)
        model(_as_ids(prompts, len(answers)), labels=answers[prompts, chosen]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _as_ids(prompts, num_prompts):
    return (FIRST_TOKEN + ANSWER_TOKENS * num_prompts + prompts).unsqueeze(1)


def measure(model, answers: torch.LongTensor, num_texts: int) -> dict[str, float]:
    """Share of answers among the texts, and the total variation of drawn texts from the answers' true shares."""
    prompts = torch.arange(len(answers)).repeat_interleave(num_texts)
    figures = {}
    for choice in ("argmax", "sample"):
        ids = _as_ids(prompts, len(answers))
        options = {"do_sample": True, "seed": 0, "expert_choice": choice, "return_prompt": False}
        texts = model.generate(ids, min_new_tokens=3, max_new_tokens=3, **options)
        is_answer = (texts.unsqueeze(1) == answers[prompts]).all(-1)  # (texts, 3)
        figures[f"{choice}: is an answer"] = is_answer.any(-1).float().mean().item()
    found = is_answer.float().view(len(answers), num_texts, 3).mean(1)
    excess = (torch.tensor(SHARES) - found).clamp(min=0).sum(-1)  # what is missing from the true shares
    figures["sample: total variation"] = excess.mean().item()
    return figures


def draw(table: dict[str, list[dict[str, float]]], path: Path):
    """Bars of the means over the seeds, a dot for every seed."""
    from matplotlib import pyplot

    names, keys = list(table), list(next(iter(table.values()))[0])
    figure, axes = pyplot.subplots(1, len(keys), figsize=(4 * len(keys), 3), sharey=True, layout="constrained")
    for axis, key in zip(axes, keys, strict=True):
        for place, name in enumerate(names):
            values = [figures[key] for figures in table[name]]
            axis.barh(place, sum(values) / len(values), color="tab:blue", alpha=0.5)
            axis.plot(values, [place] * len(values), "o", color="tab:blue", markersize=4)
        axis.set(title=key, xlim=(0, 1.02), yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_prompts", type=int, default=4)
    parser.add_argument("--num_updates", type=int, default=400)
    parser.add_argument("--num_seeds", type=int, default=5)
    parser.add_argument("--num_texts", type=int, default=100, help="texts written for each prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON and the figure")
    options = parser.parse_args(words_with_recipe(parser, arguments))
    torch.set_num_threads(options.threads)
    answers, table = answers_of(options.num_prompts), {}
    for name, fields in ARMS.items():
        table[name] = []
        for seed in range(options.num_seeds):
            model = train(fields, answers, options.num_updates, seed)
            table[name].append(measure(model, answers, options.num_texts))
            print(f"{name}, seed {seed}:", ", ".join(f"{k} {v:.3f}" for k, v in table[name][-1].items()), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"num_prompts": options.num_prompts, "num_updates": options.num_updates, "arms": ARMS, "table": table}
    (options.output / "several_answers.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(table, options.output / "several_answers.png")


if __name__ == "__main__":
    main()
