"""Evaluate checkpoints on pairs of source and target: YAN, and baselines of any kind that generates.

    python examples/evaluate_task.py --model examples/checkpoints/yan-transformer-tiny --data pairs.jsonl \
        --num_flow_steps 3 --max_new_tokens 32 --seeds 5 --output results/yan
    python examples/evaluate_task.py --model my-gpt2 --data pairs.jsonl --max_new_tokens 32 \
        --output results/gpt2 --compare results/yan
    python examples/evaluate_task.py --model yan decoder encoder-decoder masked-diffusion --baseline decoder \
        --data pairs.jsonl --max_new_tokens 32 --output results/table

Every figure comes without and with the reference's length ("oracle"). YAN is measured with `do_sample=True` at
temperature 1, once per seed, and with `do_sample=False`, where every run gives the same text; masked diffusion keeps
the surest tokens first, and autoregressive models decode greedily, which no seed changes, with their cache (baselines
with convolutions have none and are slower). Files of the output folder: metrics.json, predictions.jsonl. Several
models give one such folder each, and table.json and table.md of them all, with paired tests against `--baseline`.
"""

import argparse

from modeling_yan.commands.evaluate import add_evaluation_options, evaluate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="folders or hub names")
    add_evaluation_options(parser)
    evaluate(parser.parse_args(namespace=argparse.Namespace(debug=True)))


if __name__ == "__main__":
    main()
