"""What one fine-tuning costs, and how well its model answers rows that it has not seen.

    python examples/benchmark/finetuning.py --test_file test.jsonl.gz -- --encoder E --dataset D --output_dir OUT ...

The words after `--` are those of `yan finetune`. The figures are of one run: processor time counts the work of this
process alone, whatever else the machine does. Scores on the held-out rows choose the epoch; the test rows are new.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from timing import machine_description, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_yan.data.tables import load_file, make_pairs
from modeling_yan.evaluation import exact_match, generate_answers
from modeling_yan.training.finetuning import finetune, parse_finetuning


def measure_test(folder, rows) -> dict:
    """Share of the rows that the model in a folder answers exactly, and of answers that are no target of any row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = generate_answers(model, tokenizer, [row["source"] for row in rows])
    right = [exact_match(answer, row["target"]) for answer, row in zip(answers, rows, strict=True)]
    unknown = set(answers) - {row["target"] for row in rows}
    return {
        "rows": len(rows),
        "exact_match": sum(right) / len(rows),
        "other_answers": sum(answer in unknown for answer in answers) / len(rows),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test_file", required=True, help="with the columns of the training rows")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetuning.json"))
    parser.add_argument("words", nargs=argparse.REMAINDER, help="those of yan finetune, after --")
    options = parser.parse_args(arguments)
    words = [word for word in options.words if word != "--"]
    settings, training = parse_finetuning(words)
    start = time.perf_counter(), time.process_time()
    finetune(settings, training)
    seconds = {"wall": time.perf_counter() - start[0], "processor": time.process_time() - start[1]}
    folder = Path(training.output_dir)
    scores = json.loads((folder / "eval_results.json").read_text())
    kept = {name: scores[name] for name in ("eval_loss", "eval_exact_match", "eval_rouge_l", "epoch")}
    test = measure_test(folder, make_pairs(load_file(options.test_file), settings.columns, options.test_file))
    about = {"machine": machine_description(torch.device("cpu")), "words": [Path(word).name for word in words]}
    write_json(options.output, {**about, "seconds": seconds, "held_out": kept, "test": test})
    print(json.dumps({"seconds": seconds, "held_out": kept, "test": test}, indent=1))


if __name__ == "__main__":
    main()
