"""`yan visualize`: how a text comes about, as a picture and as one page of HTML."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from .loading import load_model, load_tokenizer, prepare_library
from .parsing import add_command, add_device, add_model, whole_number

EXAMPLES = """  yan visualize MODEL "Where is the apple? Mary took the apple." --output pictures
  yan visualize MODEL "You are lucky in having <mask> a master. Fill in." --steps 8 --output pictures"""
PICTURE, PAGE = "path.png", "path.html"
MAX_DRAFTS = 8  # the last ones, in the picture; the page has all
PAGE_FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>YAN: {prompt}</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }}
img {{ width: 100%; }} table {{ border-collapse: collapse; }} td, th {{ padding: .2em .8em; text-align: left; }}
tr:nth-child(even) {{ background: #f2f2f2; }}
</style></head><body>
<h1>How a text comes about</h1>
<p><b>Prompt</b> {prompt}</p><p><b>Text</b> {text}</p>
<img alt="Path of the latents, experts, and straightness" src="data:image/png;base64,{picture}">
<h2>What would be written after each step</h2>{drafts}
<h2>Tokens</h2>{tokens}
<p>Straightness is the distance from a token's noise to its latent, over the length of its path: 1 is a line.</p>
</body></html>
"""


@dataclass
class Path2D:
    """How the tokens of a text were written.

    T: tokens; N: steps; K: experts. points: (T, N + 1, 2) latents on two principal axes, which have the `shares` of
    the variance. experts: (T,) their numbers, None for a mixture. gate: (T, K). straightness: (T,). drafts: N texts.
    """

    tokens: list[str]
    text: str
    drafts: list[str]
    points: Any
    shares: tuple[float, float]
    experts: list[int] | None
    gate: Any
    straightness: Any


class DraftTexts(list):
    """A streamer that keeps the text after every step."""

    def __init__(self, decode):
        self.decode = decode

    def put(self, tokens):
        """The prompt, or a finished canvas: nothing to keep."""

    def put_draft(self, tokens):
        """Keep the first row of drafts (B, L)."""
        self.append(self.decode(tokens[0]))

    def end(self):
        """The end of the text: nothing to do."""


def add_to(commands):
    """Add the command."""
    purpose = "Draw the path of the latents, the experts and the drafts of a text."
    parser = add_command(commands, "visualize", visualize, purpose, EXAMPLES)
    add_model(parser)
    parser.add_argument("text", nargs="*", help="one prompt")
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {PICTURE} and {PAGE}")
    parser.add_argument("--steps", type=whole_number(1), help="solver steps; the model's if not given")
    add_device(parser)


def visualize(options):
    """Draw the first canvas of the text for a prompt."""
    if len(options.text) != 1:
        raise ValueError(f"text={options.text}: must be one prompt")
    prepare_library(is_quiet=not options.debug)
    model, tokenizer = load_model(options.model, options.device), load_tokenizer(options.model)
    path = follow(model, tokenizer, options.text[0], options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(path, options.output / PICTURE)
    write_page(path, options.text[0], options.output)
    print(f"{options.output / PICTURE}\n{options.output / PAGE}")


def follow(model, tokenizer, prompt: str, num_flow_steps: int | None = None) -> Path2D:
    """Write the first canvas for a prompt, without sampling, and keep how it came about."""
    from ..evaluation.speed import num_new_tokens

    def text_of(tokens):
        (length,) = num_new_tokens(tokens[None], model.generation_config.eos_token_id)
        return tokenizer.decode(tokens[:length], skip_special_tokens=True)

    drafts = DraftTexts(text_of)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    settings = {"num_flow_steps": num_flow_steps, "do_sample": False, "return_prompt": False}
    output = model.generate(**inputs, **settings, streamer=drafts, return_dict_in_generate=True)
    trajectory = output.trajectory[0][0].transpose(0, 1).float().cpu()  # (L, N + 1, D)
    tokens = output.sequences[0, : len(trajectory)].cpu()
    (length,) = num_new_tokens(tokens[None], model.generation_config.eos_token_id)
    trajectory = trajectory[:length]
    points, shares = _on_two_axes(trajectory)
    distances, moves = (trajectory[:, -1] - trajectory[:, 0]).norm(dim=-1), trajectory.diff(dim=1).norm(dim=-1).sum(-1)
    return Path2D(
        tokens=[tokenizer.decode([token]).strip() or "␣" for token in tokens[:length]],
        text=text_of(tokens),
        drafts=drafts[: trajectory.shape[1] - 1],
        points=points.numpy(),
        shares=shares,
        experts=None if output.experts is None else output.experts[0][0, :length].tolist(),
        gate=output.gate[0][0, :length].float().cpu().numpy(),
        straightness=(distances / moves.clamp(min=1e-12)).numpy(),
    )


def _on_two_axes(trajectory):
    """Points (T, N + 1, D) on their first two principal axes, and the axes' shares of the variance."""
    import torch

    points = trajectory.flatten(0, 1)
    points = points - points.mean(0)
    _, sizes, axes = torch.linalg.svd(points, full_matrices=False)
    variances = sizes.square()
    shares = (variances[:2] / variances.sum()).tolist()
    return (points @ axes[:2].T).unflatten(0, trajectory.shape[:2]), tuple(shares)


def draw(path: Path2D, file: Path):
    """Draw a path as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 11), layout="constrained")
    rows = [["path", "gate"], ["path", "usage"], ["straightness", "straightness"], ["drafts", "drafts"]]
    places = figure.subplot_mosaic(rows, height_ratios=[3, 3, 2, 2])
    num_experts = path.gate.shape[1]
    palette = [colormaps["tab10"](index % 10) for index in range(num_experts)]
    experts = path.gate.argmax(1).tolist() if path.experts is None else path.experts
    colors = [palette[expert] for expert in experts]
    _draw_path(places["path"], path, colors)
    _draw_gate(places["gate"], path)
    counts = [experts.count(index) for index in range(num_experts)]
    places["usage"].bar(range(num_experts), counts, color=palette)
    places["usage"].set(title="Tokens of each expert", xlabel="expert", xticks=range(num_experts))
    places["straightness"].bar(range(len(path.tokens)), path.straightness, color=colors)
    places["straightness"].set(title="Straightness of each path (1 is a line)", ylim=(0, 1.02))
    _name_tokens(places["straightness"], path)
    _write_drafts(places["drafts"], path)
    figure.savefig(file, dpi=110)


def _draw_path(axes, path, colors):
    for token, points, color in zip(path.tokens, path.points, colors, strict=True):
        axes.plot(*points.T, "-o", color=color, markersize=3, linewidth=1)
        axes.annotate(token, points[-1], xytext=(4, 4), textcoords="offset points", parse_math=False)
    axes.plot(*path.points[:, 0].T, "x", color="grey", label="noise")
    axes.plot(*path.points[:, -1].T, "o", color="black", markersize=4, label="latents")
    names = [f"principal axis {number} ({share:.0%} of the variance)" for number, share in enumerate(path.shares, 1)]
    axes.set(title=f"Path of each token, {len(path.drafts)} steps", xlabel=names[0], ylabel=names[1])
    axes.legend()


def _draw_gate(axes, path):
    image = axes.imshow(path.gate.T, aspect="auto", vmin=0, vmax=1, cmap="Greys")
    axes.set(title="The gate's probability of each expert", ylabel="expert", yticks=range(path.gate.shape[1]))
    _name_tokens(axes, path)
    axes.figure.colorbar(image, ax=axes)


def _name_tokens(axes, path):
    axes.set_xticks(range(len(path.tokens)), path.tokens, rotation=60, ha="right", parse_math=False)


def _write_drafts(axes, path):
    first = max(0, len(path.drafts) - MAX_DRAFTS)
    lines = [f"step {step}   {shorten(path.drafts[step - 1], 140)}" for step in range(first + 1, len(path.drafts) + 1)]
    axes.text(0, 1, "\n".join(lines), va="top", transform=axes.transAxes, parse_math=False)
    axes.set_title("What would be written after each step")
    axes.axis("off")


def write_page(path: Path2D, prompt: str, folder: Path):
    """Write the page of a path, its picture inside."""
    drafts = [(f"step {step}", draft) for step, draft in enumerate(path.drafts, start=1)]
    experts = ["mixture"] * len(path.tokens) if path.experts is None else path.experts
    chances = [f"{row.max():.2f}" for row in path.gate]
    rows = zip(path.tokens, experts, chances, (f"{value:.2f}" for value in path.straightness), strict=True)
    page = PAGE_FORM.format(
        prompt=html.escape(prompt),
        text=html.escape(path.text),
        picture=base64.b64encode((folder / PICTURE).read_bytes()).decode(),
        drafts=_table(("", "text"), drafts),
        tokens=_table(("token", "expert", "highest probability of the gate", "straightness"), rows),
    )
    (folder / PAGE).write_text(page, encoding="utf-8")


def _table(head, rows):
    """A table of HTML."""
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in row) for kind, row in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
