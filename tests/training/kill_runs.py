"""Start a training run, kill it with SIGKILL at many moments, resume it each time, and let it end.

    python kill_runs.py SETTINGS.json NUM_KILLS

Every life is a forked process, so that imports are paid once. Every other one ends within a save, the rest whenever it
may be. Prints one JSON object: steps of the newest checkpoint at each kill, and how many kills hit one half written.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from modeling_yan.data.rows import UNFINISHED
from modeling_yan.training import PretrainingArguments, pretrain
from modeling_yan.training.checkpoints import list_checkpoints

LONGEST_WAIT = 120.0  # seconds for a checkpoint to begin
LONGEST_NAP = 0.2  # seconds of what comes after one: of a start, or of some updates


def live(settings) -> int:
    """Fork a process that trains; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for the rest of this life
        torch.set_num_threads(1)
        pretrain(PretrainingArguments(**settings))
        os._exit(0)
    except BaseException as error:
        (Path(settings["output_dir"]) / "error.txt").write_text(repr(error))
        os._exit(1)


def is_saving(output_dir: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(path.is_dir() for path in output_dir.glob(UNFINISHED + "*"))


def newest_step(output_dir: Path) -> int:
    """Updates behind the newest checkpoint."""
    checkpoints = list_checkpoints(output_dir)
    return int(checkpoints[-1].name.split("-")[1]) if checkpoints else 0


def wait_until(condition):
    """Sleep until the condition holds or the time is over."""
    end = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < end and not condition():
        time.sleep(0.0005)


def main(settings: dict, num_kills: int):
    output_dir, rng = Path(settings["output_dir"]), random.Random(0)
    steps, num_in_save = [], 0
    for number in range(num_kills):
        child = live(settings)
        step = newest_step(output_dir) + settings["save_steps"] * rng.randint(0, 1)
        wait_until(lambda: newest_step(output_dir) >= step)  # noqa: B023
        if number % 2:
            wait_until(lambda: is_saving(output_dir))
        else:
            time.sleep(rng.uniform(0, LONGEST_NAP))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"the run ended before kill {number}: {(output_dir / 'error.txt').read_text()}")
        num_in_save += is_saving(output_dir)
        steps.append(newest_step(output_dir))
    _, status = os.waitpid(live(settings), 0)
    if status:
        raise SystemExit((output_dir / "error.txt").read_text())
    print(json.dumps({"steps": steps, "num_in_save": num_in_save}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
