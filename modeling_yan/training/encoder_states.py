"""The states of a frozen pretrained encoder for rows to train on, computed once and kept in an Arrow file."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig

from ..data import FlowCollator
from ..data.rows import Row
from ..modeling_yan import YanForFlowGeneration

BATCH = 32  # rows that are encoded together
NUM_BYTES = 4  # of a number
WRITTEN_BYTES = 2**26  # about this many at a time


class RowsWithStates(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows with the states of a frozen encoder, computed once and read from the disk by memory map.

    Each row gets `states` (num_answer_slots + S, H), float32, of its source of S tokens. The file's name has a hash of
    the encoder's weights and of all token ids, so another encoder, tokenizer, row or length makes another file. It
    appears whole or not at all.

    Args:
        rows: Rows of `source` and `target`.
        model: A model with a frozen pretrained encoder (`keeps_states`).
        collator: The collator of the training, which cuts the sources.
        folder: The folder of the file, which is made if there is none.

    Raises:
        ValueError: The encoder is not frozen, or there is none.
        OSError: There is no room for the file; the message says how much it needs.
    """

    def __init__(
        self, rows: Sequence[Row], model: YanForFlowGeneration, collator: FlowCollator, folder: str | os.PathLike[str]
    ) -> None:
        if not model.keeps_states:
            raise ValueError("freeze_encoder=False: must be True, for a pretrained encoder, to keep its states")
        self.rows, self.width = rows, model.config.encoder_hidden_size
        prompts = _token_ids(rows, collator)
        num_tokens = sum(map(len, prompts)) + len(prompts) * model.config.num_answer_slots
        size = num_tokens * self.width * NUM_BYTES
        os.makedirs(folder, exist_ok=True)
        number = max(1, len(rows) * WRITTEN_BYTES // size)
        options = {"cache_dir": str(folder), "fingerprint": _key(prompts, model), "writer_batch_size": number}
        options |= {"features": Features({"states": List(Value("float32"))})}
        try:
            # asked inside, where it is known that there is no file yet
            made = Dataset.from_generator(
                lambda: _with_room(_encode(prompts, model, collator), size, folder), **options
            )
        except (DatasetGenerationError, OSError) as error:
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            if getattr(cause, "errno", None) == errno.ENOSPC:
                raise _no_room(size, folder) from error
            raise
        self.states = made.with_format("numpy")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as a data loader asks for them."""
        states = self.states[list(indices)]["states"]
        return [
            {**self.rows[index], "states": flat.reshape(-1, self.width)}
            for index, flat in zip(indices, states, strict=True)
        ]


class StatesCollator:
    """Batches of another collator, with the rows' `states` as `encoder_outputs` (B, num_answer_slots + S, H), float32.

    Padding is 0. Rows without `states` pass through unchanged.

    Args:
        collator: A `FlowCollator`.
    """

    def __init__(self, collator: FlowCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        if "states" not in rows[0]:
            return batch
        num_valid = batch["attention_mask"].sum(1).tolist()
        slots = len(rows[0]["states"]) - num_valid[0]
        shape = len(rows), slots + batch["input_ids"].shape[1], rows[0]["states"].shape[1]
        states = torch.zeros(shape)
        for row, target in zip(rows, states, strict=True):
            target[: len(row["states"])] = torch.from_numpy(np.array(row["states"]))
        return {**batch, "encoder_outputs": states}


def _token_ids(rows: Sequence[Row], collator: FlowCollator) -> list[torch.Tensor]:
    """What the encoder reads of every row, without its padding."""
    starts = range(0, len(rows), BATCH)
    batches = (collator(rows[start : start + BATCH]) for start in starts)
    return [
        ids[mask.bool()]
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def _key(prompts: list[torch.Tensor], model: YanForFlowGeneration) -> str:
    """A hash of all that the states depend on."""
    encoder = cast(PreTrainedConfig, model.config.encoder)
    digest = hashlib.sha256(encoder.to_json_string().encode())
    fields = ("num_answer_slots", "copy_prompt_to_slots", "vertices_per_token", "mask_token_id")
    digest.update(repr(([getattr(model.config, name) for name in fields], str(model.dtype))).encode())
    for name, weight in model.base_model.encoder.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for ids in prompts:
        digest.update(ids.numpy().tobytes() + b"|")
    return digest.hexdigest()[:32]


def _encode(
    prompts: list[torch.Tensor], model: YanForFlowGeneration, collator: FlowCollator
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """The states of every prompt as one list of numbers."""
    was_training, pad = model.training, collator.tokenizer.pad_token_id
    model.eval()
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in batch], batch_first=True)
        states = model.encoder_states(ids.to(model.device), mask.to(model.device)).float().cpu().numpy()
        for each, prompt in zip(states, batch, strict=True):
            yield {"states": each[: model.config.num_answer_slots + len(prompt)].reshape(-1)}
    model.train(was_training)


def _with_room(
    rows: Iterator[dict[str, np.ndarray[Any, Any]]], size: int, folder: str | os.PathLike[str]
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    if shutil.disk_usage(folder).free < size:
        raise _no_room(size, folder)
    yield from rows


def _no_room(size: int, folder: str | os.PathLike[str]) -> OSError:
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"the encoder's states need {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room, or leave them "
        "out (--cache_latents False)",
        str(folder),
    )
