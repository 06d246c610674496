"""Checkpoints that exist whole or not at all: written aside, flushed to the disk, and renamed.

`output_dir/checkpoint-N/` holds the model and tokenizer after N updates, ready for `from_pretrained`, the arguments,
and in `state/` what Accelerate needs to go on: weights, optimizer, schedule, gradient scaler and random states.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from ..data.readers import find_files
from ..data.rows import UNFINISHED, remove
from .arguments import PretrainingArguments

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"checkpoint-(\d+)")
LOCK = ".lock"
SETTINGS_FILE = "training_arguments.json"
# A resumed run with another value of these would see other batches, or train another model, from its first update on.
FIXED = (
    *("stage", "seed", "train_file", "dataset", "streaming", "shuffle_buffer", "bucket_batches", "tasks"),
    *("per_device_train_batch_size", "max_words", "max_source_length", "num_microbatches", "config_overrides"),
    *("dataset_rows", "ema_decay", "resize_embeddings"),
)
HASHED_BYTES = 2**20  # of a file's beginning and of its end


@contextlib.contextmanager
def claim(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Make the folder, and have this process alone train into it. The system lets go when the process dies.

    Raises:
        OSError: It can't be written to, or another process is training into it.
    """
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "output_dir must be a folder, and is a file", str(output_dir))
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


def count_microbatches(accelerator: Accelerator) -> int:
    """Micro-batches of one update, over all processes."""
    return accelerator.num_processes * accelerator.gradient_accumulation_steps


def find_checkpoint(arguments: PretrainingArguments, accelerator: Accelerator) -> Path | None:
    """The newest whole checkpoint if this run resumes. Clears away what a killed run left half written.

    Raises:
        FileExistsError: There are checkpoints, and `resume` is off.
        ValueError: The checkpoint saw other batches than this run would.
    """
    output_dir = Path(arguments.output_dir)
    if accelerator.is_main_process:
        remove_unfinished(output_dir)
    accelerator.wait_for_everyone()
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return None
    if not arguments.resume:
        raise FileExistsError(
            f"{output_dir} holds {checkpoints[-1].name}: go on with --resume, or choose another folder"
        )
    before = json.loads((checkpoints[-1] / SETTINGS_FILE).read_text())
    before.setdefault("num_microbatches", before.get("num_places"))  # its name in 0.2
    now = asdict(arguments) | {"num_microbatches": count_microbatches(accelerator)}
    known = [name for name in FIXED if name in before]
    changed = [f"{name}={now[name]} (was {before[name]})" for name in known if now[name] != before[name]]
    if "train_file_hash" in before and before["train_file_hash"] != hash_files(arguments.train_file):
        changed.append(f"other contents of train_file={arguments.train_file}")
    if changed:
        found = f"cannot go on from {checkpoints[-1]} with {', '.join(changed)}"
        raise ValueError(f"{found}: the batches or the model would be others")
    return checkpoints[-1]


def hash_files(paths: Sequence[str]) -> str:
    """A hash of what files hold: of their sizes, and of the first and the last mebibyte of each."""
    digest = hashlib.blake2b(digest_size=16)
    for path in find_files(paths):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} ".encode())
            for start in (0, max(0, size - HASHED_BYTES)):
                file.seek(start)
                digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()


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
