"""Write the texts for a file of prompts, in several processes.

The prompts are cut into parts, and each finished part is a file of its own: the same command goes on after a crash,
and parts of a process that died are written by others. At the end the parts become texts.jsonl, in the prompts' order.

    python examples/serving/offline.py --model MODEL --prompts prompts.jsonl --output_dir texts --processes 2

Several machines share the work over a common folder: give each the same command with --machine 0/3, 1/3 and 2/3, and
then the command without it, which finds all parts there and joins them.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  the Auto classes know YAN by it
from modeling_yan.data.rows import replacing, write_whole
from modeling_yan.serving.requests import Job
from modeling_yan.serving.writing import BatchWriter

MOST_CRASHES = 10  # of a run; more have a reason that will not go away
WORKER = {}  # what a process keeps between its parts


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--prompts", required=True, help="JSON lines, also compressed, with a field of prompts")
    parser.add_argument("--field", default="prompt", help="of a row")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32, help="prompts that are written together")
    parser.add_argument("--part_size", type=int, default=1024, help="prompts of a part, what a crash costs at most")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, help="solver steps a canvas; the model's if not given")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: the processes take the cards in turn")
    parser.add_argument("--machine", default="0/1", help="which of how many machines this is, such as 0/3")
    return parser.parse_args(arguments)


def start_worker(options):
    """Load the model in a process of its own."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    number = multiprocessing.current_process()._identity[-1]
    device = f"cuda:{number % torch.cuda.device_count()}" if options.device == "cuda" else options.device
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).to(device).eval()
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "num_flow_steps": options.steps}
    WORKER.update(writer=BatchWriter(model, tokenizer), settings=tuple(settings.items()), tokenizer=tokenizer)


def write_part(prompts: list[str], batch_size: int, path: Path):
    """Write a part, which is there as a whole or not at all."""
    lines = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for prompt, text in zip(batch, write_batch(batch), strict=True):
            lines.append(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def write_batch(prompts: list[str]) -> list[str]:
    """The text for each prompt.

    Raises:
        ValueError: A prompt that is too long, or an option that the model can't honour.
    """
    jobs = [Job(tuple(ids), WORKER["settings"]) for ids in WORKER["tokenizer"](prompts)["input_ids"]]
    texts = [""] * len(jobs)
    for round_ in WORKER["writer"].write(jobs):
        for number, pieces in enumerate(round_):
            for piece in pieces:
                if "error" in piece:
                    raise ValueError(piece["error"])
                texts[number] += piece["text"]
    return texts


def part_paths(options, num_rows: int) -> list[Path]:
    return [options.output_dir / f"part-{start:09d}.jsonl" for start in range(0, num_rows, options.part_size)]


def write_missing(rows: Dataset, options) -> int:
    """Write the parts of this machine that are not there yet, and return how often a process died."""
    machine, num_machines = map(int, options.machine.split("/"))
    paths = list(enumerate(part_paths(options, len(rows))))[machine::num_machines]
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    crashes = 0
    while missing := [(number, path) for number, path in paths if not path.exists()]:
        try:
            with ProcessPoolExecutor(options.processes, context, start_worker, (options,)) as pool:
                calls = []
                for number, path in missing:
                    start = number * options.part_size
                    prompts = rows[start : start + options.part_size][options.field]
                    calls.append(pool.submit(write_part, prompts, options.batch_size, path))
                for call in calls:
                    call.result()
        except BrokenProcessPool:
            crashes += 1
            if crashes > MOST_CRASHES:
                raise
            print("a process died: its parts are written again", file=sys.stderr, flush=True)
    return crashes


def check_settings(rows: Dataset, options):
    """Raise ValueError if the folder has parts of other prompts, another model or other options."""
    names = ("model", "field", "part_size", "max_new_tokens", "steps")
    settings = {name: getattr(options, name) for name in names}
    settings["prompts"] = hashlib.sha256(json.dumps(list(rows[options.field])).encode()).hexdigest()
    path = options.output_dir / "settings.json"
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=1) + "\n")
    before = json.loads(path.read_text())
    others = [name for name in settings if settings[name] != before.get(name)]
    if others:
        raise ValueError(f"{options.output_dir} holds texts of other {', '.join(others)}: give another --output_dir")


def join_parts(options, num_rows: int) -> Path:
    """All parts as one file."""
    target = options.output_dir / "texts.jsonl"
    with replacing(target) as aside, aside.open("wb") as out:
        for path in part_paths(options, num_rows):
            out.write(path.read_bytes())
    return target


def main(arguments=None):
    options = parse_arguments(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    rows = load_dataset("json", data_files=options.prompts, split="train")
    if options.field not in rows.column_names:
        raise ValueError(f"field={options.field!r}: must be one of {', '.join(rows.column_names)}")
    check_settings(rows, options)
    crashes = write_missing(rows, options)
    if all(path.exists() for path in part_paths(options, len(rows))):
        print(f"{len(rows)} texts in {join_parts(options, len(rows))}, {crashes} times a process died")


if __name__ == "__main__":
    main()
