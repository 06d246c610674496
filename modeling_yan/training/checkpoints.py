"""Checkpoints that exist whole or not at all: written aside, flushed to the disk, and renamed.

`output_dir/checkpoint-N/` holds the model and tokenizer after N updates, ready for `from_pretrained`, the arguments,
and in `state/` what Accelerate needs to go on: weights, optimizer, schedule, gradient scaler and random states.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator

from ..data.rows import UNFINISHED, remove

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"checkpoint-(\d+)")
LOCK = ".lock"


@contextlib.contextmanager
def claim(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Make the folder, and have this process alone train into it. The system lets go when the process dies.

    Raises:
        OSError: It can't be written to, or another process is training into it.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / LOCK).open("a") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{output_dir}: another process is training into this folder; wait for it, or choose another"
            raise BlockingIOError(error.errno, message) from error
        yield


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    matches = [(NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def remove_unfinished(output_dir: str | os.PathLike[str]) -> None:
    """Clear away what killed runs left half written."""
    for path in Path(output_dir).glob(UNFINISHED + "*"):
        remove(path)


def write_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let every process `write` into a folder aside and rename that to `checkpoint-{step}`.

    Raises:
        OSError: It could not be written; nothing of it is left, and the checkpoints before it are as they were.
    """
    aside, checkpoint = output_dir / f"{UNFINISHED}{step}", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        write(aside)
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, by who writes
        shutil.rmtree(aside, ignore_errors=True)
        last = list_checkpoints(output_dir)[-1:]
        kept = f"{last[0]} is the last good one" if last else "there is none before it"
        raise OSError(f"{checkpoint} could not be written ({error}); {kept}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _flush(aside)
        os.replace(aside, checkpoint)
        _flush_folder(output_dir)
    accelerator.wait_for_everyone()
    return checkpoint


def remove_old(output_dir: Path, num_kept: int) -> None:
    """Remove all but the newest checkpoints; a removal that is killed leaves no half of one."""
    for checkpoint in list_checkpoints(output_dir)[:-num_kept]:
        aside = output_dir / f"{UNFINISHED}{checkpoint.name}"
        os.replace(checkpoint, aside)
        shutil.rmtree(aside)


def _flush(folder: Path) -> None:
    """Have everything below `folder` on the disk, so that no power cut leaves a renamed folder of empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
