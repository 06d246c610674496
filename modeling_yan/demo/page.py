"""The page: gradio's controls around the views."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ..modeling_yan import YanForFlowGeneration

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves the machine; read when gradio is loaded

import gradio as gr

from ..evaluation.timing import format_timings
from ..visualization import draw
from . import views

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PROMPTS = [
    "Where is the apple? Mary went to the kitchen. Mary took the apple.",
    "Mary went to the garden. John took the hat. John went to the attic. Where is the hat?",
    "Last word: The king went up to the <mask>.",
    "He loosed <mask>, and forgave <mask> the debt.",
]
PAUSE_S = 0.6  # the least between two drafts: those of a small model come too fast for eyes
INTRODUCTION = """# YAN writes a whole text at once
Noise becomes the text in a few steps. Choose a prompt and press a tab's button."""
ABOUT_EXPERTS = """Every token is moved by one of the model's experts. Here each column takes another one: the
likeliest by the gate, the second and so on."""
ABOUT_PATH = "The latents of all tokens on their two principal axes, from noise to text, without sampling."
ABOUT_TIME = """One text of 16, 32 and 64 tokens on this machine, whatever the prompt. The AR decoder has as many
parameters and **random weights**: its time is right, its text would be none. Texts longer than the canvas take
several canvases."""

Models = dict[str, tuple[YanForFlowGeneration, PreTrainedTokenizerBase]]
Result = TypeVar("Result")


def build_demo(models: Models) -> gr.Blocks:
    """The page for models and their tokenizers by name."""
    if not models:
        raise ValueError("models={}: must have at least one")
    with gr.Blocks(title="YAN", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2, scale=3)
            name = gr.Dropdown(list(models), value=next(iter(models)), label="Model", scale=1)
        with gr.Row():
            steps = gr.Slider(1, views.MAX_STEPS, value=3, step=1, label="Steps")
            num = gr.Slider(1, views.MAX_TEXTS, value=3, step=1, label="Texts")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        gr.Examples(PROMPTS, prompt, label="Prompts of the bundled models")
        actions = _Actions(models)
        with gr.Tab("Write"):
            button, place = gr.Button("Write", variant="primary"), gr.HTML()
            button.click(actions.write, [name, prompt, steps, seed, num], place)
        with gr.Tab("By expert"):
            gr.Markdown(ABOUT_EXPERTS)
            button, place = gr.Button("Write with every expert", variant="primary"), gr.HTML()
            button.click(actions.write_by_expert, [name, prompt, steps], place)
        with gr.Tab("Path"):
            gr.Markdown(ABOUT_PATH)
            button, plot = gr.Button("Draw the path", variant="primary"), gr.Plot(show_label=False)
            button.click(actions.draw, [name, prompt, steps], plot)
        with gr.Tab("Time"):
            gr.Markdown(ABOUT_TIME)
            button, plot = gr.Button("Measure", variant="primary"), gr.Plot(show_label=False)
            table = gr.Markdown()
            button.click(actions.measure, [name, steps], [plot, table])
    return page.queue(max_size=32)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve the page with fonts of the reader's own machine."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return page.launch(theme=theme, css=views.STYLE, footer_links=[], **options)


class _Actions:
    """What the buttons do; bad input is a message on the page."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def write(self, name: str, prompt: str, steps: int, seed: int, num: int) -> Iterator[str]:
        """The drafts while they come, then the texts."""
        shown = -PAUSE_S
        for view in _asked_each(views.write_live(*self.models[name], prompt, steps, seed, num)):
            time.sleep(max(0, shown + PAUSE_S - time.monotonic()))
            yield view
            shown = time.monotonic()

    def write_by_expert(self, name: str, prompt: str, steps: int) -> str:
        return views.side_by_side(_asked(views.write_by_expert, *self.models[name], prompt, steps))

    def draw(self, name: str, prompt: str, steps: int) -> "Figure":
        return draw(_asked(views.path_of, *self.models[name], prompt, steps))

    def measure(self, name: str, steps: int) -> tuple["Figure", str]:
        results = _asked(views.measure, self.models[name][0], steps)
        return views.timing_figure(results), format_timings(results)


def _asked(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns, or its complaint about the input on the page."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise gr.Error(str(error)) from error


def _asked_each(found: Iterable[str]) -> Iterator[str]:
    """What comes of an iterator, or its complaint as that of `_asked`."""
    try:
        yield from found
    except ValueError as error:
        raise gr.Error(str(error)) from error
