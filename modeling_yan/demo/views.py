"""What the page shows, as HTML and figures; nothing here knows gradio."""

import html
import queue
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_yan import YanConfig
from ..evaluation.timing import time_generation
from ..modeling_yan import YanForFlowGeneration
from ..visualization import Path2D, follow, follow_all, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MAX_TEXTS, MAX_STEPS = 8, 16
# pale, so that dark letters can be read on all of them
PALETTE = "#a6cee3 #fdbf6f #b2df8a #fb9a99 #cab2d6 #ffff99 #d9d9d9 #ccebc5 #fccde5 #e5c494".split()
PLAIN = "#eeeeee"
PALE = "Pale with a dotted line: changes in a later step."
CHANGED = "Pale with a dotted line: new in this step."
LENGTHS = (16, 32, 64)  # tokens of the texts that are timed
TIMED_STEPS = (1, 3)
STYLE = """
.yan { font-size: 1.05rem; line-height: 2; } .yan table { border-collapse: collapse; width: 100%; }
.yan td, .yan th { padding: .2em .7em; text-align: left; vertical-align: top; }
.yan :is(table, tr, td, th) { border: 0 !important; }
.yan th { white-space: nowrap; width: 1%; font-weight: 600; }
.yan span.token { color: #111; padding: .15em .35em; border-radius: .3em; white-space: nowrap; }
.yan span.unsettled { opacity: .55; border-bottom: 2px dotted #b00; }
.yan .columns { display: flex; flex-wrap: wrap; gap: 1em; } .yan .columns > div { flex: 1 1 12em; }
.yan small { opacity: .8; } .yan p.legend { margin-top: 1.2em; }
"""


def draw_options(config: "YanConfig", steps: int, seed: int, num: int) -> dict[str, Any]:
    """Options of `generate` for a number of texts: one is generated without sampling, several are drawn.

    Raises:
        ValueError: A field of the page is empty.
    """
    for name, value in {"steps": steps, "seed": seed, "texts": num}.items():
        if value is None:
            raise ValueError(f"{name}: must be a number")
    options = {"num_flow_steps": int(steps), "seed": int(seed), "num_return_sequences": int(num)}
    return {**options, "do_sample": num > 1}


def write_live(
    model: "YanForFlowGeneration", tokenizer: "PreTrainedTokenizerBase", prompt: str, steps: int, seed: int, num: int
) -> Iterator[str]:
    """Views of the drafts, each as soon as its step is done, and last one of the texts and how they came about."""
    _check_prompt(prompt)
    events: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
    options = draw_options(model.config, steps, seed, num)

    def follow_timed() -> tuple[list[Path2D], float]:
        start = time.perf_counter()
        paths = follow_all(model, tokenizer, prompt, on_draft=events.put, **options)
        return paths, time.perf_counter() - start

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(follow_timed)
        call.add_done_callback(lambda _: events.put(None))
        before: list[list[str]] = [[]] * options["num_return_sequences"]
        for step in range(1, options["num_flow_steps"] + 1):
            if (drafts := events.get()) is None:
                break
            words = [words_of(model, tokenizer, draft) for draft in drafts]
            yield settling(step, options["num_flow_steps"], words, before)
            before = words
        paths, seconds = call.result()
    yield finished(paths, seconds, has_colors(model))


def path_of(model: "YanForFlowGeneration", tokenizer: "PreTrainedTokenizerBase", prompt: str, steps: int) -> Path2D:
    """How the most probable text for a prompt comes about."""
    _check_prompt(prompt)
    return follow(model, tokenizer, prompt, int(steps))


def write_by_expert(
    model: "YanForFlowGeneration", tokenizer: "PreTrainedTokenizerBase", prompt: str, steps: int
) -> dict[str, Path2D]:
    """A text for each rank of expert, by title: all tokens by their most probable one, all by the next one and so on.

    Raises:
        ValueError: An empty prompt, or a model whose experts can't be ranked.
    """
    _check_prompt(prompt)
    num, scope = model.config.num_experts, model.config.expert_scope
    if num < 2:
        raise ValueError("this model has one expert: draw several texts on the first tab instead")
    options: dict[str, Any] = {"num_flow_steps": int(steps), "do_sample": False, "expert_choice": "ranked"}
    paths = follow_all(model, tokenizer, prompt, num_return_sequences=num, **options)
    titles = [f"{_ordinal(rank)} expert of every {scope}" for rank in range(1, num + 1)]
    return dict(zip(titles, paths, strict=True))


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise ValueError("prompt: must not be empty")


def _ordinal(rank: int) -> str:
    return {1: "Likeliest", 2: "Second", 3: "Third", 4: "Fourth"}.get(rank, f"{rank}th")


def has_colors(model: "YanForFlowGeneration") -> bool:
    """Whether tokens are coloured by their expert: where there are several."""
    return model.config.num_experts > 1


def settling(step: int, steps: int, texts: list[list[str]], before: list[list[str]]) -> str:
    """The tokens of the texts after a step; those that the step has changed are pale."""
    rows = []
    for number, (words, old) in enumerate(zip(texts, before, strict=True), start=1):
        is_same = [place < len(old) and old[place] == word for place, word in enumerate(words)]
        tokens = (_token(word, PLAIN, settled) for word, settled in zip(words, is_same, strict=True))
        rows.append((f"Text {number}", " ".join(tokens)))
    return _wrap(f"<p>Step {step} of {steps}</p>{_table(rows)}<p><small>{CHANGED}</small></p>")


def finished(paths: list[Path2D], seconds: float, is_colored: bool) -> str:
    """The texts, the time they took, and all drafts of the first one."""
    texts = [(f"Text {number}", html.escape(path.text)) for number, path in enumerate(paths, start=1)]
    steps = range(1, len(paths[0].drafts) + 1)
    drafts = [(f"Step {step}", tokens_html(paths[0], step, is_colored)) for step in steps]
    took = f"<p>Written in {1000 * seconds:.0f} ms, drafts included; shown more slowly.</p>"
    legend = _legend(paths[0] if is_colored else None, PALE)
    return _wrap(f"{took}{_table(texts)}<h3>Drafts of text 1</h3>{_table(drafts)}{legend}")


def side_by_side(paths: dict[str, Path2D]) -> str:
    """Texts beside one another, their tokens coloured by expert."""
    columns = [
        f"<div><h3>{html.escape(title)}</h3><p>{html.escape(path.text)}</p>"
        f"<p>{tokens_html(path, len(path.drafts), True)}</p></div>"
        for title, path in paths.items()
    ]
    num_texts = len({path.text for path in paths.values()})
    told = "All experts write the same text." if num_texts == 1 else f"{num_texts} different texts."
    legend = _legend(next(iter(paths.values())))
    return _wrap(f'<p>{told}</p><div class="columns">{"".join(columns)}</div>{legend}')


def tokens_html(path: Path2D, step: int, is_colored: bool) -> str:
    """The tokens after a step, on the colour of their expert; one that is not yet the final one is pale."""
    cells, experts = [], (path.experts or []) if is_colored else []
    for place, token in enumerate(path.draft_tokens[step - 1]):
        is_settled = place < len(path.tokens) and all(
            place < len(later) and later[place] == path.tokens[place] for later in path.draft_tokens[step - 1 :]
        )
        color = PALETTE[experts[place] % len(PALETTE)] if place < len(experts) else PLAIN
        cells.append(_token(token, color, is_settled))
    return " ".join(cells)  # lines break between tokens


def _token(word: str, color: str, is_settled: bool) -> str:
    kind = "token" if is_settled else "token unsettled"
    return f'<span class="{kind}" style="background:{color}">{html.escape(word)}</span>'


def _legend(path: Path2D | None, words: str = "") -> str:
    """The colour of each expert of a path, and further words."""
    experts = range(path.gate.shape[1]) if path is not None and path.experts is not None else ()
    names = [f'<span class="token" style="background:{PALETTE[n % len(PALETTE)]}">expert {n}</span>' for n in experts]
    return f'<p class="legend">{" ".join(names)} <small>{words}</small></p>'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><th>{name}</th><td>{cell}</td></tr>' for name, cell in rows)}</table>"


def _wrap(inside: str) -> str:
    return f'<div class="yan">{inside}</div>'


def measure(model: "YanForFlowGeneration", steps: int, repeats: int = 3) -> list[dict[str, Any]]:
    """Times of one text of several lengths, beside an AR model of equal size."""
    all_steps = sorted({*TIMED_STEPS, int(steps)})
    return time_generation(model, LENGTHS, (1,), all_steps, beside_ar=True, prompt_length=16, repeats=repeats)


def timing_figure(results: list[dict[str, Any]]) -> "Figure":
    """Milliseconds by length, one line a model, as a figure of matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["model"] for row in results):
        rows = [row for row in results if row["model"] == name]
        times = [1000 * row["seconds"]["median"] for row in rows]
        axes.plot([row["length"] for row in rows], times, "-o", label=name)
    axes.set(xlabel="tokens of the text", ylabel="milliseconds (median)", xticks=LENGTHS, yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
