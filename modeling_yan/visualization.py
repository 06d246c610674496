"""How a text comes about: its path, experts, drafts and straightness, as numbers, a picture and a page of HTML."""

import base64
import html
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from .canvas_yan import OnDraft
from .evaluation.speed import num_new_tokens
from .modeling_yan import YanForFlowGeneration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
<h2>Text decoded after each step</h2>{drafts}
<h2>Tokens</h2>{tokens}
<p>Straightness is the distance from a token's noise to its latent, over the length of its path: 1 is a line.</p>
</body></html>
"""


@dataclass
class Path2D:
    """How the tokens of a text came about.

    T: tokens; N: steps; K: experts. points: (T, N + 1, 2) latents on two principal axes, which have the `shares` of
    the variance. experts: (T,) their numbers, None for a mixture. gate: (T, K). straightness: (T,). drafts: N texts,
    and draft_tokens the tokens of each.
    """

    tokens: list[str]
    text: str
    drafts: list[str]
    draft_tokens: list[list[str]]
    points: Any
    shares: tuple[float, float]
    experts: list[int] | None
    gate: Any
    straightness: Any


class DraftTokens(list[torch.Tensor]):
    """A streamer that keeps the tokens (B, L) after every step, and hands them on at once."""

    def __init__(self, hand_on: OnDraft | None = None) -> None:
        super().__init__()
        self.hand_on = hand_on

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, or a finished canvas: nothing to keep."""

    def put_draft(self, tokens: torch.Tensor) -> None:
        """Keep a draft."""
        self.append(tokens.cpu())
        if self.hand_on is not None:
            self.hand_on(self[-1])

    def end(self) -> None:
        """The end of the text: nothing to do."""


def follow(
    model: "YanForFlowGeneration", tokenizer: "PreTrainedTokenizerBase", prompt: str, num_flow_steps: int | None = None
) -> Path2D:
    """Write the first canvas for a prompt, without sampling, and keep how it came about."""
    return follow_all(model, tokenizer, prompt, num_flow_steps=num_flow_steps, do_sample=False)[0]


def follow_all(
    model: "YanForFlowGeneration",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    on_draft: OnDraft | None = None,
    **options: Any,
) -> list[Path2D]:
    """Write the first canvas of every text for a prompt, with options of `generate`, and keep how they came about.

    `on_draft` gets the token ids (B, L) after every step, while the next one is still to come.
    """
    drafts = DraftTokens(on_draft)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    settings = {**options, "return_prompt": False, "return_dict_in_generate": True}
    output: Any = model.generate(**inputs, **settings, streamer=drafts)
    trajectories, gates = output.trajectory[0].transpose(1, 2).float().cpu(), output.gate[0].float().cpu()
    experts = [None] * len(gates) if output.experts is None else output.experts[0].tolist()
    sequences = output.sequences.cpu()[:, : gates.shape[1]]
    if model.graph is not None:  # what the tokens' vertices have
        latents = output.trajectory[0][:, -1]
        vertices = model.vertices_of(model.decode(latents), latents, output.sequences[:, : model.config.canvas_length])
        vertices, rows = vertices.cpu(), torch.arange(len(gates)).unsqueeze(1)
        trajectories, gates = trajectories[rows, vertices], gates[rows, vertices]
        chosen = output.experts
        experts = experts if chosen is None else chosen[0].cpu()[rows, vertices].tolist()
        sequences = sequences[:, : vertices.shape[1]]
    return [
        _path_of(model, tokenizer, tokens, [draft[row] for draft in drafts], trajectory, gate, chosen)
        for row, (tokens, trajectory, gate, chosen) in enumerate(
            zip(sequences, trajectories, gates, experts, strict=True)
        )
    ]


def words_of(model: "YanForFlowGeneration", tokenizer: "PreTrainedTokenizerBase", ids: torch.Tensor) -> list[str]:
    """The tokens (L,) of a text up to its end, each as what is read."""
    (length,) = num_new_tokens(ids[None], model.generation_config.eos_token_id)
    return [str(tokenizer.decode([token])).strip() or "␣" for token in ids[:length]]


def _path_of(
    model: "YanForFlowGeneration",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: torch.Tensor,
    drafts: list[torch.Tensor],
    trajectory: torch.Tensor,
    gate: torch.Tensor,
    experts: list[int] | None,
) -> Path2D:
    """A path from the tokens (L,), the drafts of all canvases, and the first one's trajectory (L, N + 1, D)."""

    def text_of(ids: torch.Tensor) -> str:
        return str(tokenizer.decode(ids[: len(words_of(model, tokenizer, ids))], skip_special_tokens=True))

    drafts, names = drafts[: trajectory.shape[1] - 1], words_of(model, tokenizer, tokens)
    trajectory = trajectory[: len(names)]
    points, shares = _on_two_axes(trajectory)
    distances, moves = (trajectory[:, -1] - trajectory[:, 0]).norm(dim=-1), trajectory.diff(dim=1).norm(dim=-1).sum(-1)
    return Path2D(
        tokens=names,
        text=text_of(tokens),
        drafts=[text_of(draft) for draft in drafts],
        draft_tokens=[words_of(model, tokenizer, draft) for draft in drafts],
        points=points.numpy(),
        shares=shares,
        experts=None if experts is None else experts[: len(names)],
        gate=gate[: len(names)].numpy(),
        straightness=(distances / moves.clamp(min=1e-12)).numpy(),
    )


def _on_two_axes(trajectory: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """Points (T, N + 1, D) on their first two principal axes, and the axes' shares of the variance."""
    points = trajectory.flatten(0, 1)
    points = points - points.mean(0)
    _, sizes, axes = torch.linalg.svd(points, full_matrices=False)
    variances = sizes.square()
    shares = (variances[:2] / variances.sum()).tolist()
    return (points @ axes[:2].T).unflatten(0, trajectory.shape[:2]), tuple(shares)


@contextmanager
def saved_figure(path: str | PathLike[str], width: float, height: float, **options: Any) -> Iterator["Figure"]:
    """A figure of matplotlib to draw on, of this many inches, which is written to `path` at the end.

    It needs no window and no state of pyplot. `options` are those of `savefig`, such as `dpi`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **{"dpi": 110, **options})


def draw(path: Path2D) -> "Figure":
    """A path as a figure of matplotlib."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 11), layout="constrained")
    rows = [["path", "gate"], ["path", "usage"], ["straightness", "straightness"], ["drafts", "drafts"]]
    panels = figure.subplot_mosaic(rows, height_ratios=[3, 3, 2, 2])  # type: ignore[arg-type]
    num_experts = path.gate.shape[1]
    palette = [colormaps["tab10"](index % 10) for index in range(num_experts)]
    experts = path.gate.argmax(1).tolist() if path.experts is None else path.experts
    colors = [palette[expert] for expert in experts]
    _draw_path(panels["path"], path, colors)
    _draw_gate(panels["gate"], path)
    counts = [experts.count(index) for index in range(num_experts)]
    panels["usage"].bar(range(num_experts), counts, color=palette)
    panels["usage"].set(title="Tokens of each expert", xlabel="expert", xticks=range(num_experts))
    panels["straightness"].bar(range(len(path.tokens)), path.straightness, color=colors)
    panels["straightness"].set(title="Straightness of each path (1 is a line)", ylim=(0, 1.02))
    _name_tokens(panels["straightness"], path)
    _write_drafts(panels["drafts"], path)
    return figure


def _draw_path(axes: "Axes", path: Path2D, colors: list[Any]) -> None:
    for token, points, color in zip(path.tokens, path.points, colors, strict=True):
        axes.plot(*points.T, "-o", color=color, markersize=3, linewidth=1)
        axes.annotate(token, points[-1], xytext=(4, 4), textcoords="offset points", parse_math=False)
    axes.plot(*path.points[:, 0].T, "x", color="grey", label="noise")
    axes.plot(*path.points[:, -1].T, "o", color="black", markersize=4, label="latents")
    names = [f"principal axis {number} ({share:.0%} of the variance)" for number, share in enumerate(path.shares, 1)]
    axes.set(title=f"Path of each token, {len(path.drafts)} steps", xlabel=names[0], ylabel=names[1])
    axes.legend()


def _draw_gate(axes: "Axes", path: Path2D) -> None:
    image = axes.imshow(path.gate.T, aspect="auto", vmin=0, vmax=1, cmap="Greys")
    axes.set(title="The gate's probability of each expert", ylabel="expert", yticks=range(path.gate.shape[1]))
    _name_tokens(axes, path)
    axes.figure.colorbar(image, ax=axes)


def _name_tokens(axes: "Axes", path: Path2D) -> None:
    axes.set_xticks(range(len(path.tokens)), path.tokens, rotation=60, ha="right", parse_math=False)


def _write_drafts(axes: "Axes", path: Path2D) -> None:
    first = max(0, len(path.drafts) - MAX_DRAFTS)
    lines = [f"step {step}   {shorten(path.drafts[step - 1], 140)}" for step in range(first + 1, len(path.drafts) + 1)]
    axes.text(0, 1, "\n".join(lines), va="top", transform=axes.transAxes, parse_math=False)
    axes.set_title("Text decoded after each step")
    axes.axis("off")


def page_of(path: Path2D, prompt: str, picture: bytes) -> str:
    """A path as one page of HTML, with its picture, a PNG, inside."""
    drafts = [(f"step {step}", draft) for step, draft in enumerate(path.drafts, start=1)]
    experts = ["mixture"] * len(path.tokens) if path.experts is None else path.experts
    chances = [f"{row.max():.2f}" for row in path.gate]
    rows = zip(path.tokens, experts, chances, (f"{value:.2f}" for value in path.straightness), strict=True)
    return PAGE_FORM.format(
        prompt=html.escape(prompt),
        text=html.escape(path.text),
        picture=base64.b64encode(picture).decode(),
        drafts=_table(("", "text"), drafts),
        tokens=_table(("token", "expert", "highest probability of the gate", "straightness"), rows),
    )


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table of HTML."""
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in row) for kind, row in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
