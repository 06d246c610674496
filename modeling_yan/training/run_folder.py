"""The folder of a fine-tuning run: what the run was made of, and the checkpoint to go on from."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ..data.rows import write_whole

logger = logging.get_logger(__name__)

RUN_FILE = "finetuned_on.json"
STATE_FILE = "trainer_state.json"  # of a checkpoint, written last
MODEL_FILES = ("adapter_config.json", "model.safetensors", "model.safetensors.index.json")


def find_checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one that is asked for, or with "True" the newest whole one, if any.

    Raises:
        ValueError: The output folder is a file.
        FileExistsError: It holds the checkpoints of another run, which is not to go on, or a finished model.
    """
    folder, asked = Path(training.output_dir or ""), str(training.resume_from_checkpoint or False)
    if folder.is_file():
        raise ValueError(f"--output_dir {str(folder)!r}: must be a folder, and is a file")
    if asked.lower() not in ("true", "false"):
        return asked
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    found = {int(number[1]): path for path, number in numbers.items() if number and (path / STATE_FILE).exists()}
    whole = [found[number] for number in sorted(found) if _is_whole(found[number])]
    if asked.lower() == "true" and whole:
        return str(whole[-1])
    if whole:
        allowed = "--resume_from_checkpoint True to go on, or another --output_dir"
        raise FileExistsError(f"--output_dir {str(folder)!r} holds the checkpoints of another run: give {allowed}")
    if any((folder / name).exists() for name in MODEL_FILES):
        raise FileExistsError(f"--output_dir {str(folder)!r} holds a finished model: give another --output_dir")
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / STATE_FILE).read_text()), dict)
    except ValueError:  # as where the disk was full
        logger.warning(f"{checkpoint} is cut off: it is passed over.")
        return False


def note_run(training: TrainingArguments, made_of: Mapping[str, Any], is_resumed: bool) -> None:
    """Note in the folder what a run is made of.

    Raises:
        ValueError: A resumed run is made of something else. Other held-out rows would be some that it was trained on.
    """
    path = Path(training.output_dir or "", RUN_FILE)
    before = json.loads(path.read_text()) if is_resumed and path.exists() else {}
    others = [name for name in made_of if before.get(name, made_of[name]) != made_of[name]]
    if others:
        raise ValueError(f"--resume_from_checkpoint: {path.parent} was trained with other {', '.join(others)}")
    if training.process_index == 0:
        write_whole(path, json.dumps(made_of) + "\n")
