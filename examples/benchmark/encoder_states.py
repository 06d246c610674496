"""An update of a model on a frozen encoder, with the encoder's states read from the disk and computed again.

    python examples/benchmark/encoder_states.py --encoder sentence-transformers/all-MiniLM-L6-v2

Rows are random token ids. Both ways take turns on one thread, from the rows to the optimizer's step; the figures are
medians, of processor time so that other work on the machine counts less.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from timing import machine_description, write_json
from transformers import AutoTokenizer

from modeling_yan import YanForFlowGeneration
from modeling_yan.data import FlowCollator, prepare_tokenizer
from modeling_yan.training.encoder_states import RowsWithStates, StatesCollator


def draw_rows(number, length, target_length, vocab_size):
    """Rows of token ids, sources of half to the whole of a length."""
    rng = random.Random(0)

    def draw(size):
        return [rng.randrange(1000, vocab_size) for _ in range(size)]

    return [{"source": draw(rng.randint(length // 2, length)), "target": draw(target_length)} for _ in range(number)]


def update(model, optimizer, collator, rows, indices):
    """One update, and the processor time that it took."""
    start = time.process_time()
    batch = rows.__getitems__(indices) if isinstance(rows, RowsWithStates) else [rows[index] for index in indices]
    model(**collator(batch), num_flow_steps=2).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def measure(options, length, folder) -> dict:
    """Median seconds of an update in both ways, those of the file, and its size."""
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    prepare_tokenizer(tokenizer)
    fields = {"freeze_encoder": True, "canvas_length": options.target_length + 1}
    model = YanForFlowGeneration.from_encoder_pretrained(options.encoder, tokenizer=tokenizer, **fields).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
    rows = draw_rows(options.batch_size * 4, length, options.target_length, len(tokenizer))
    collator = StatesCollator(FlowCollator(tokenizer, model=model))
    start = time.process_time()
    kept = RowsWithStates(rows, model, collator.collator, folder)
    file_seconds = time.process_time() - start
    seconds = {"computed": [], "read": []}
    for number in range(options.repeats + 1):
        indices = [(number * options.batch_size + place) % len(rows) for place in range(options.batch_size)]
        for name, given in (("computed", rows), ("read", kept)):
            seconds[name].append(update(model, optimizer, collator, given, indices))
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
    return {**medians, "file": file_seconds, "rows": len(rows), "bytes": size}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or hub name")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="of the longest sources, in tokens")
    parser.add_argument("--target_length", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/encoder-states.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = {name: value for name, value in vars(options).items() if name != "output"}
    about["encoder"] = Path(options.encoder).name
    content = {"machine": machine_description(torch.device("cpu")), "settings": about, "seconds": {}}
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            result = content["seconds"][str(length)] = measure(options, length, folder)
        write_json(options.output, content)
        print(
            f"{length:>4} tokens: {result['computed']:.2f} s computed, {result['read']:.2f} s read, "
            f"{result['computed'] / result['read']:.2f} times as fast; file {result['file']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
