"""Speed of pre-training by the number of processes that draw and tokenise its rows.

The rows are long texts of which the model sees a short window: what `dataloader_num_workers` is for.

    python examples/benchmark/workers.py --workers 0 1 2 --output docs/benchmarks/workers.json
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from timing import machine_description, summary, write_json

from modeling_yan.data import generate_stories, write_rows
from modeling_yan.training import PretrainingArguments, pretrain

ROOT = Path(__file__).parents[2]
NUM_STORIES, NUM_TEXTS = 400, 40


def write_texts(path: Path, num_words: int) -> None:
    """Texts of this many words, each of many stories."""
    stories = [row["source"] for row in generate_stories(NUM_STORIES, seed=0)]
    starts = range(0, NUM_STORIES, NUM_STORIES // NUM_TEXTS)
    texts = [" ".join(stories[start:] + stories[:start]).split()[:num_words] for start in starts]
    write_rows(path, ({"text": " ".join(words)} for words in texts))


def measure(num_workers: int, file: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Updates a second of a short run, from its first line of the log to its last, and CPU seconds of this process."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            PretrainingArguments(
                stage="autoencoder",
                config=str(ROOT / "configuration" / "yan-transformer-tiny"),
                tokenizer=str(ROOT / "examples" / "checkpoints" / "yan-transformer-tiny"),
                train_file=[str(file)],
                output_dir=folder,
                max_steps=options.num_updates + 5,
                logging_steps=5,
                save_steps=10**6,
                per_device_train_batch_size=options.batch_size,
                max_words=options.num_words,
                max_source_length=16,
                report_to=["none"],
                peak_tflops=1.0,
                use_cpu=not options.cuda,
                dataloader_num_workers=num_workers,
            )
        )
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    speed = (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["seconds"] - lines[0]["seconds"])
    return speed, time.process_time() - started


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_updates", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_words", type=int, default=4000, help="of a text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("outputs/workers.json"))
    options = parser.parse_args(arguments)
    runs: dict[int, list[tuple[float, float]]] = {number: [] for number in options.workers}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        write_texts(file, options.num_words)
        for _ in range(options.repeats):
            for number in options.workers:
                runs[number].append(measure(number, file, options))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    results = {
        str(number): {name: summary(list(values)) for name, values in zip(("updates_per_s", "cpu_s"), zip(*measured))}
        for number, measured in runs.items()
    }
    machine = machine_description(torch.device("cuda" if options.cuda else "cpu"))
    write_json(options.output, {"machine": machine, "settings": settings, "workers": results})
    for number, result in results.items():
        speed, cpu = (result[name]["median"] for name in ("updates_per_s", "cpu_s"))
        print(f"{number} workers: {speed:.2f} updates a second, {cpu:.1f} s of the training process's own time")


if __name__ == "__main__":
    main()
