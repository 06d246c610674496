"""One table of models that were evaluated apart, on the same rows, with paired tests.

    python examples/experiments/merge_reports.py results/yan results/decoder --baseline results/decoder \\
        --data held-out.jsonl.gz --output results/table

The folders are those that evaluate_task.py or compare.py wrote; table.json and table.md go into the output folder.
"""

import argparse

from modeling_yan.data import read_rows
from modeling_yan.evaluation import format_table, join_reports


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="each with metrics.json and predictions.jsonl")
    parser.add_argument("--baseline", required=True, help="the folder that the others are tested against")
    parser.add_argument("--data", required=True, help=".jsonl or .jsonl.gz, the rows")
    parser.add_argument("--num_rows", type=int, help="only the first rows of the data")
    parser.add_argument("--output", required=True, help="a folder for table.json and table.md")
    options = parser.parse_args(arguments)
    rows = read_rows(options.data)[: options.num_rows]
    print(format_table(join_reports(options.folders, rows, options.output, options.baseline)))


if __name__ == "__main__":
    main()
