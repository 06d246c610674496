"""What a stage of training is: whose model it trains, on which tasks, and with batches of which layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..baselines import INPUT_ADAPTERS
from ..data import TEXT_TASKS
from .streams import PAIRS, TEXT

Batch = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One of YAN's two stages, or the only one of a baseline.

    Args:
        name: As in `PretrainingArguments.stage`.
        text_tasks: What is made of rows with text; rows with source and target are always pairs.
        adapt: From a batch of the flow stage and the pad token's id to what a baseline takes; None for YAN itself.
    """

    name: str
    text_tasks: tuple[str, ...]
    adapt: Callable[[Batch, int], Batch] | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether it trains a model that is no YAN."""
        return self.adapt is not None

    @property
    def has_flow(self) -> bool:
        """Whether its batches are solved for by YAN's flow."""
        return self.name == "flow"

    @property
    def corrupts(self) -> bool:
        """Whether it learns to restore what its collator hides."""
        return self.name == "autoencoder"

    def tasks(self, kind: str) -> tuple[str, ...]:
        """The tasks of rows of one kind."""
        return (PAIRS,) if kind == PAIRS else self.text_tasks

    def inputs(self, batch: Batch, pad_token_id: int) -> Batch:
        """A batch in the layout that the stage's model takes."""
        return batch if self.adapt is None else self.adapt(batch, pad_token_id)


STAGES = {
    "autoencoder": Stage("autoencoder", (TEXT,)),
    "flow": Stage("flow", tuple(TEXT_TASKS)),
    **{name: Stage(name, tuple(TEXT_TASKS), adapt) for name, adapt in INPUT_ADAPTERS.items()},
}


def find_stage(name: str) -> Stage:
    """The stage of a name. Raises ValueError where there is none."""
    if name not in STAGES:
        raise ValueError(f"stage={name!r}: must be one of {', '.join(STAGES)}")
    return STAGES[name]
