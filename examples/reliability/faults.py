"""Do to a small training what happens to trainings, again and again, and count what is lost: nothing may be.

    nice -n 10 python examples/reliability/faults.py --minutes 15 --output docs/reliability/faults.json

Every life of the training is a forked process. It is killed at random moments, of training, validation and saving, and
started again until it ends; then its weights must be those of a run that nothing happened to, bit for bit.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from modeling_yan.data import train_tokenizer, write_rows
from modeling_yan.data.rows import UNFINISHED
from modeling_yan.training import PretrainingArguments, pretrain
from modeling_yan.training.checkpoints import list_checkpoints

PRESET = Path(__file__).parents[2] / "configuration" / "yan-transformer-tiny"
FIELDS = (
    "hidden_size=32,intermediate_size=64,num_attention_heads=4,num_encoder_layers=1,num_flow_layers=1,"
    "num_decoder_layers=1,canvas_length=8,max_position_embeddings=48,num_answer_slots=0,decoder_dropout=0.0"
)
NOBODY = 65534
PATIENCE = 300.0  # seconds for anything to happen
ROOM_WORDS = ("could not be written", "too large", "No space")
LONGEST_NAP = 0.03  # of a kill within a save, which is short


def make_settings(folder: Path) -> PretrainingArguments:
    """A handful of rows and a tokenizer in a folder, and a training of stage one on them."""
    texts = [f"{name} went to the {place}." for name in ("Mary", "John", "Ann") for place in ("park", "house")]
    write_rows(folder / "rows.jsonl", [{"text": text} for text in texts])
    train_tokenizer(texts, vocab_size=300).save_pretrained(folder / "tokenizer")
    rows = [str(folder / "rows.jsonl")]
    return PretrainingArguments(
        stage="autoencoder",
        config=str(PRESET),
        config_overrides=FIELDS,
        tokenizer=str(folder / "tokenizer"),
        train_file=rows,
        validation_file=rows,
        output_dir=str(folder / "undisturbed"),
        max_steps=30,
        save_steps=3,
        logging_steps=3,
        warmup_steps=1,
        per_device_train_batch_size=2,
        validation_batches=1,
        num_samples=0,
        ema_decay=0.9,
        use_cpu=True,
        report_to=["none"],
        peak_tflops=0.1,
    )


def live(settings: PretrainingArguments, prepare=lambda: None) -> int:
    """Fork a process that trains; returns its number. What it dies of goes into a file beside its folder."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for the rest of this life
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        pretrain(settings)
        os._exit(0)
    except BaseException as error:
        error_file(settings).write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def error_file(settings) -> Path:
    """Where a life says what it died of; it can be written to whatever happens to the folder of the run."""
    return Path(f"{settings.output_dir}-error.txt")


def end_of(child: int, settings) -> str:
    """Wait for a life: "ended", "killed", or what it died of."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return error_file(settings).read_text() if status else "ended"


def newest_step(settings) -> int:
    """Updates after the newest checkpoint."""
    return max([int(path.name.split("-")[1]) for path in list_checkpoints(settings.output_dir)], default=0)


def is_saving(settings) -> bool:
    """Whether a checkpoint is half written."""
    return any(path.is_dir() for path in Path(settings.output_dir).glob(UNFINISHED + "*"))


def wait_until(condition, seconds: float = PATIENCE) -> float:
    """Sleep until the condition holds or the time is over; returns the seconds that it took."""
    start = time.monotonic()
    while time.monotonic() < start + seconds and not condition():
        time.sleep(0.0005)
    return time.monotonic() - start


def same_weights(settings, others) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    one, two = (load_file(Path(run.output_dir) / "model.safetensors") for run in (settings, others))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def break_off(settings, number: int, sent: int, rng: random.Random, birth: float) -> bool:
    """Begin a life and break it off; whether that hit a save. Every second one waits for a save and hits that."""
    child, step = live(settings), newest_step(settings)
    if number % 2:
        wait_until(lambda: newest_step(settings) > step and is_saving(settings))
        time.sleep(rng.uniform(0, LONGEST_NAP))
    else:
        time.sleep(rng.uniform(0, 2 * birth))
    os.kill(child, sent)
    end_of(child, settings)
    return is_saving(settings)


def run_with_breaks(undisturbed, sent: int, until: float, most: int, birth: float) -> dict:
    """Runs that are broken off by a signal and go on, one after the other until the time is over."""
    rng, breaks, hits, equal, runs = random.Random(int(sent)), 0, 0, 0, 0
    while time.monotonic() < until and breaks < most:
        settings = replace(undisturbed, output_dir=f"{undisturbed.output_dir}-{int(sent)}-{runs}", resume=True)
        Path(settings.output_dir).mkdir()
        while newest_step(settings) < settings.max_steps and time.monotonic() < until and breaks < most:
            before = newest_step(settings)
            hits += break_off(settings, breaks, sent, rng, birth)
            breaks += 1
            if newest_step(settings) < before:
                raise SystemExit(f"break {breaks} lost a checkpoint: {newest_step(settings)} after {before}")
        end = end_of(live(settings), settings)
        if end != "ended":
            raise SystemExit(f"after {breaks} breaks the run did not go on: {end}")
        equal, runs = equal + same_weights(settings, undisturbed), runs + 1
        shutil.rmtree(settings.output_dir)
    return {"faults": breaks, "within_a_save": hits, "runs_to_their_end": runs, "with_the_undisturbed_weights": equal}


def run_without_room(undisturbed, room, cases: int) -> dict:
    """Runs that come to a checkpoint and then find a disk that is full, by `room(number, settings)`."""
    clear, kept, equal = 0, 0, 0
    for number in range(cases):
        settings = replace(undisturbed, output_dir=f"{undisturbed.output_dir}-full-{number}", resume=True)
        end_of(live(replace(settings, max_steps=6)), settings)
        message = end_of(live(settings, room(number)), settings)
        clear += "Error: " in message and any(
            words in message for words in ("could not be written", "too large", "space")
        )
        kept += newest_step(settings) >= 6
        end_of(live(settings), settings)
        equal += same_weights(settings, undisturbed)
        shutil.rmtree(settings.output_dir)
    return {
        "faults": cases,
        "with_a_clear_error": clear,
        "last_checkpoint_kept": kept,
        "with_the_undisturbed_weights": equal,
    }


def small_files(number: int):
    """No file may grow beyond so many bytes, which fails where a full disk does."""
    size = 2 ** (9 + number)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_read_only(undisturbed) -> dict:
    """A run whose folder, with a checkpoint in it, can't be written to."""
    settings = replace(undisturbed, output_dir=f"{undisturbed.output_dir}-read-only", resume=True)
    end_of(live(replace(settings, max_steps=6)), settings)
    folder, before = Path(settings.output_dir), newest_step(settings)
    error_file(settings).touch()
    error_file(settings).chmod(0o666)
    folder.chmod(0o555)
    begin = time.monotonic()
    message = end_of(live(settings, lambda: os.setuid(NOBODY) if os.getuid() == 0 else None), settings)
    seconds = time.monotonic() - begin
    folder.chmod(0o755)
    kept = newest_step(settings) == before
    end_of(live(settings), settings)
    return {
        "faults": 1,
        "with_a_clear_error": int(message.startswith("PermissionError") and str(folder) in message),
        "last_checkpoint_kept": int(kept),
        "with_the_undisturbed_weights": int(same_weights(settings, undisturbed)),
        "seconds_to_the_error": round(seconds, 1),
    }


def run_two_writers(undisturbed, cases: int) -> dict:
    """A second run is started into the folder of one that is at work."""
    refused = equal = 0
    for number in range(cases):
        settings = replace(undisturbed, output_dir=f"{undisturbed.output_dir}-two-{number}", resume=True)
        first = live(settings)
        wait_until(lambda: newest_step(settings) >= 3 * number)  # noqa: B023
        message = end_of(live(settings), settings)
        refused += "another" in message
        first_end = end_of(first, settings)
        equal += first_end == "ended" and same_weights(settings, undisturbed)
    return {"faults": cases, "second_refused": refused, "with_the_undisturbed_weights": equal}


def about(arguments: list[str]) -> dict:
    """What a file of figures says of itself."""
    return {
        "command": " ".join(["python", "examples/reliability/faults.py", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} CPU cores, shared with other work",
    }


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="for the kills; the other faults take their time")
    parser.add_argument("--kills", type=int, default=100, help="at most so many")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)  # who may not write into the run's folder still says why
    undisturbed = make_settings(folder)
    child, start = live(undisturbed), time.monotonic()
    birth = wait_until(lambda: list_checkpoints(undisturbed.output_dir))
    if (end := end_of(child, undisturbed)) != "ended":
        raise SystemExit(end)
    whole = time.monotonic() - start
    results = about(sys.argv[1:] if arguments is None else arguments)
    results["run"] = {"updates": undisturbed.max_steps, "updates_between_checkpoints": undisturbed.save_steps}
    results["faults"] = {}

    def record(name, figures):
        results["faults"][name] = figures
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(name, figures, flush=True)

    record("read-only folder", run_read_only(undisturbed))
    record("two writers on one folder", run_two_writers(undisturbed, 2))
    record("no room for a file (RLIMIT_FSIZE)", run_without_room(undisturbed, small_files, 4))
    until = time.monotonic() + 60 * options.minutes
    record("Ctrl-C (SIGINT)", run_with_breaks(undisturbed, signal.SIGINT, until - 48 * options.minutes, 10, birth))
    record("SIGKILL", run_with_breaks(undisturbed, signal.SIGKILL, until - whole, options.kills, birth))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
