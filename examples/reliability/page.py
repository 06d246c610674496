"""Make docs/reliability.md from the figures beside it.

    python examples/reliability/page.py --count --output docs/reliability.md

With `--count`, the generated cases of bad input are counted again, by the ids of their tests.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "reliability"
TESTS = ("tests/test_bad_calls.py", "tests/test_bad_files.py", "tests/test_bad_input.py")
KINDS = {
    "config": "fields of the config: types, ranges, choices, ids",
    "forward": "forward: types, shapes, dtypes, devices, ids, empty, huge",
    "generate": "generate: options and helpers",
    "weights": "generate with weights that are NaN",
    "pipeline": "pipeline: inputs and options",
    "collators": "collators: rows, texts, ids, sizes",
    "files": "data files: broken JSON, other encodings, cut, flipped bits",
    "paths": "paths: missing, folders, NUL bytes, too long",
    "checkpoints": "checkpoints: cut, flipped bits, NaN, wrong configs",
    "commands": "commands: arguments and words",
}
OTHERS = "written by hand: tests/test_bad_input.py"


def count_cases() -> dict[str, int]:
    """How many tests of bad input there are of each kind."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", *TESTS]
    listing = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ids = [line for line in listing.splitlines() if "::" in line]
    kinds = [kind_of(name) for name in ids]
    return dict(Counter(kind for kind in kinds if kind))


def kind_of(name: str) -> str | None:
    """The kind of a test by its id; None for a test that is no case."""
    if "test_bad_input.py" in name:
        return OTHERS
    found = re.search(r"\[(.*)\]", name)
    parts = found[1].split("-") if found else []
    return next((part for part in parts if part in KINDS), None)


def table(heads: list[str], rows: list[list]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def bad_input_section(counts: dict) -> list[str]:
    rows = [[text, counts["cases"].get(kind, 0)] for kind, text in {**KINDS, OTHERS: OTHERS}.items()]
    generated = sum(number for kind, number in counts["cases"].items() if kind != OTHERS)
    return [
        "## Bad input",
        "",
        f"{generated} generated cases. Each ends in `ValueError`, `TypeError` or `OSError` with a message, in "
        "`FloatingPointError` where numbers are not finite, in transformers' `RuntimeError` for other shapes, "
        "or in the right result.",
        "",
        "```bash",
        f"python -m pytest {' '.join(TESTS)}",
        "```",
        "",
        *table(["kind", "cases"], rows),
    ]


def fault_section(figures: dict) -> list[str]:
    names = {"faults": "times", "with_a_clear_error": "clear error", "second_refused": "second refused"}
    names |= {"last_checkpoint_kept": "last checkpoint kept", "within_a_save": "within a save"}
    names |= {
        "runs_to_their_end": "runs to their end",
        "with_the_undisturbed_weights": "undisturbed weights",
    }
    rows = []
    for fault, found in figures["faults"].items():
        notes = [f"{text}: {found[name]}" for name, text in names.items() if name in found and name != "faults"]
        rows.append([fault, found["faults"], "; ".join(notes)])
    return [
        "## Faults",
        "",
        f"A training of {figures['run']['updates']} updates with a checkpoint after every "
        f"{figures['run']['updates_between_checkpoints']}, broken off and started again until it ends. Its weights "
        "are compared bit for bit with those of a run that nothing happened to. A fault ends the process, and the "
        "next start goes on from the last checkpoint.",
        "",
        '"Within a save" counts the faults that hit while a checkpoint was being written. "Runs to their end" counts '
        "the trainings that finished, after as many starts as they needed. "
        '"Undisturbed weights" counts those with the weights of an unbroken run, bit for bit.',
        "",
        *about(figures),
        *table(["fault", "times", "what was left"], rows),
    ]


def long_section(figures: dict) -> list[str]:
    rows = []
    for mixer, runs in figures["runs"].items():
        for name, found in runs.items():
            if "growth_mib" in found:
                memory = f"{found['mib_after_warm_up']} MiB after warm-up, {found['mib_at_the_end']} at the end"
                rows.append([mixer, name, found["times"], memory])
            else:
                same = f"{found['threads']} threads; {found['equal_to_alone']} equal to those written alone"
                rows.append([mixer, name, found["times"], same])
    return [
        "## Long runs",
        "",
        "Tiny models in one process. The shape of every generation and training step is drawn.",
        "",
        *about(figures),
        *table(["mixer", "what", "times", "found"], rows),
    ]


def about(figures: dict) -> list[str]:
    """The command and what it ran on."""
    versions = f"Python {figures['python']}, torch {figures['torch']}, transformers {figures['transformers']}"
    return ["```bash", figures["command"], "```", "", f"{figures['machine']}; {versions}; {figures['date']}.", ""]


def make_page(folder: Path) -> str:
    """The whole page."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("bad-input", "faults", "long-run")}
    lines = [(folder / "intro.md").read_text().strip(), "", *bad_input_section(read["bad-input"])]
    lines += [*fault_section(read["faults"]), *long_section(read["long-run"])]
    return "\n".join([*lines, (folder / "checks.md").read_text(), (folder / "limits.md").read_text().strip(), ""])


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count the cases of bad input anew")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.count:
        (FIGURES / "bad-input.json").write_text(json.dumps({"cases": count_cases()}, indent=1) + "\n")
    options.output.write_text(make_page(FIGURES))


if __name__ == "__main__":
    main()
