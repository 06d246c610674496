"""Make docs/results.md, and the table in README.md, from the tables of `tasks.py`.

    python examples/experiments/results_page.py docs/results/*/table.json --output docs/results.md --readme README.md

Every figure of the page is a mean over training seeds of figures in a table. Its interval is that of the mean, from
Student's t at 95%, and it is there where there are at least two seeds. The page begins with `docs/results/intro.md`
and ends with `routes.md` beside it. `notes.md` beside a table says what it shows, and `experts.json` of
`expert_texts.py` what its experts do. The paper's tasks share one table, and `paper_tasks.md`.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

TITLES = {
    "multi30k_en_de": "Multi30k: English to German",
    "several_answers": "Three right answers for every prompt",
    "e2e": "E2E: restaurant descriptions",
    "continuation": "Stories: the next sentence",
    "disflqa": "Disfl-QA: questions without slips of the tongue",
    "scan": "SCAN: commands to actions",
}
PAPER_TASKS = {
    "sst2": "SST-2",
    "agnews": "AG News",
    "dbpedia": "DBpedia",
    "babi": "bAbI",
    "lastword": "last words",
    "maskedword": "masked words",
    "squad": "SQuAD, F1",
    "fairytaleqa": "FairytaleQA, F1",
}
ONE, SIXTEEN, GRAPH = "YAN, one expert, graph", "YAN, sixteen experts, graph", "one pass with a graph"
ONE_CRF, SIXTEEN_CRF, PASSES = "YAN, one expert, CRF", "YAN, sixteen experts, CRF", ("one pass", "one pass with a CRF")
RIVALS = {  # of each arm; one that is an arm of these without a part has that as its rival
    ONE: ("one pass", GRAPH, "AR encoder-decoder"),
    SIXTEEN: (ONE, GRAPH, "AR encoder-decoder"),
    ONE_CRF: PASSES,
    SIXTEEN_CRF: (ONE_CRF, "one pass with a CRF"),
    "YAN, one expert, no graph": (ONE,),
    "AR decoder": (ONE, ONE_CRF),
    "YAN on MiniLM": ("one pass with a CRF on MiniLM", "classification head on MiniLM"),
}
METRICS = {  # name, scale, digits
    "bleu": ("BLEU", 1, 1),
    "chrf": ("chrF", 1, 1),
    "exact": ("exact match, %", 100, 1),
    "f1": ("F1, %", 100, 1),
    "unknown": ("share of texts that are the answer of no row, %", 100, 1),
}
README_TASKS = {
    "multi30k": "translation (Multi30k)",
    "e2e": "restaurants (E2E)",
    "disflqa": "questions (Disfl-QA)",
    "sst2": "sentiment (SST-2)",
    "agnews": "news (AG News)",
    "dbpedia": "things (DBpedia)",
    "babi": "stories (bAbI)",
}
README_ARMS = (
    *(ONE, ONE_CRF, SIXTEEN_CRF, *PASSES, GRAPH, "AR decoder", "the source itself"),
    *("YAN on MiniLM", "classification head on MiniLM"),
)
README_METRICS = {"bleu": ("bleu", "chrf"), "exact": ("exact",)}
MARKS = ("<!-- results -->", "<!-- end of results -->")
NUM_EXPERTS = 4  # that are shown


def mean_with_interval(values: list[float], digits: int) -> str:
    """The mean, and with two values or more the half width of its 95% interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def of_seeds(values: list[float], digits: int, number: int) -> str:
    """A cell of an arm with this number of seeds: how many seeds it has itself, if fewer, and nothing without any."""
    if not values:
        return ""
    return mean_with_interval(values, digits) + f" (of {len(values)})" * (len(values) < number)


def columns_of(runs: dict, *path: str) -> list[str]:
    """Names of the figures that any run has under a path, in the order in which they come."""
    found = {}
    for arm in runs.values():
        for run in arm.values():
            part = run
            for name in path:
                part = part.get(name, {})
            found |= dict.fromkeys(part)
    return list(found)


def look_up(run: dict, path: tuple[str, ...]) -> float | None:
    """The figure of a run under a path, if there is one."""
    for name in path:
        run = run.get(name) if isinstance(run, dict) else None
    return run


def make_rows(runs: dict, paths: list[tuple[str, ...]], digits: int, scale: float = 1) -> list[str]:
    """A line for each arm: its name, its seeds, and a figure for each path, times a scale."""
    lines = []
    for arm, seeds in runs.items():
        cells = []
        for path in paths:
            values = [look_up(run, path) for run in seeds.values()]
            values = [scale * value for value in values if value is not None and not math.isnan(value)]
            cells.append(of_seeds(values, digits, len(seeds)))
        if any(cells):
            lines.append(f"| {arm} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def make_table(runs: dict, heads: list[str], paths: list[tuple[str, ...]], digits: int, scale: float = 1) -> list[str]:
    rows = make_rows(runs, paths, digits, scale)
    return ["| arm | seeds | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|", *rows, ""] if rows else []


def describe(table: dict, name: str) -> str:
    """One paragraph: what was trained for how long, and where."""
    recipe, runs = table["recipe"], [run for arm in table["runs"].values() for run in arm.values()]
    sizes = [run["parameters"] for run in runs if run["parameters"]]  # none: a constant answer
    low, high = min(sizes) / 1e6, max(sizes) / 1e6
    return (
        f"`TASK` is `{name}`. Every arm: {low:.2f} to {high:.2f} million parameters, {recipe['updates']} updates of "
        f"{recipe['batch_size']} rows. {table['rows']} sources are measured. {table['hardware']}, "
        f"torch {table['torch']}, {table['date']}."
    )


def make_section(path: Path) -> list[str]:
    """The section of one table."""
    table = json.loads(path.read_text())
    runs, task = table["runs"], table["task"]
    lines = [f"## {TITLES.get(task, task)}", ""]
    notes = path.with_name("notes.md")
    lines += [notes.read_text().strip(), ""] if notes.exists() else []
    lines += [describe(table, path.parent.name), ""]
    if columns_of(runs, "distribution"):
        lines += distribution_tables(runs)
    else:
        lines += quality_tables(runs, table["recipe"].get("metric", "bleu"))
    experts = path.with_name("experts.json")
    return lines + (experts_table(json.loads(experts.read_text())) if experts.exists() else [])


def paper_section(paths: dict[str, Path], notes: Path) -> list[str]:
    """One table of the paper's tasks: the metric of each at three steps, or as the arm generates without steps."""
    tables = {name: json.loads(path.read_text()) for name, path in paths.items()}
    lines = ["## The paper's tasks, on a pretrained encoder and from scratch", "", notes.read_text().strip(), ""]
    lines += [f"- {PAPER_TASKS[name]}: {describe(table, name)}" for name, table in tables.items()]
    lines += [
        "",
        "Exact match or F1, %, of the best text at three steps, or as the arm generates. In brackets: seeds.",
    ]
    lines += [
        "",
        "| arm | " + " | ".join(PAPER_TASKS[name] for name in tables) + " |",
        "|---" * (len(tables) + 1) + "|",
    ]
    for arm in dict.fromkeys(arm for table in tables.values() for arm in table["runs"]):
        cells = []
        for table in tables.values():
            metric = table["recipe"]["metric"]
            _, scale, digits = METRICS[metric]
            values = final_figures(table["runs"], arm, "best", metric, scale=scale)
            cells.append(f"{mean_with_interval(values, digits)} ({len(values)})" if values else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def experts_table(found: dict) -> list[str]:
    """The experts that the gate likes best, each with the beginning of its texts and one of them."""
    experts, (right, drawn) = found["experts"], found["information"].values()
    lines = [
        f"The {NUM_EXPERTS} experts of {len(experts)} that the gate prefers, over {found['rows']} prompts. A drawn "
        f"text and its expert have {drawn:.2f} nats of mutual information, of at most {math.log(len(experts)):.2f}. "
        f'For right texts the KL divergence of the experts\' posterior from the gate is {right:.2f} nats. "Gate" is '
        'the mean probability before the text is known, "right texts" the mean posterior given right texts. "Words" '
        f"is the mean length. Texts for `{found['prompts'][0]}`:",
        "",
        "| gate, % | right texts, % | words | most frequent beginning | text |",
        "|---|---|---|---|---|",
    ]
    for expert in experts[:NUM_EXPERTS]:
        words, share = expert["beginning"]
        shares = f"{100 * expert['gate']:.0f} | {100 * expert['usage']:.0f}"
        beginning = f"{words} ({100 * share:.0f}%)"
        lines.append(f"| {shares} | {expert['mean_words']:.0f} | {beginning} | {expert['examples'][0]} |")
    return [*lines, ""]


def distribution_tables(runs: dict) -> list[str]:
    kinds = {"right": "right", "total_variation": "variation"}
    steps = columns_of(runs, "distribution")
    heads = [f"{kind}, {step_name(step)}" for kind in kinds.values() for step in steps]
    paths = [("distribution", step, name) for name in kinds for step in steps]
    title = "Share of drawn texts that are right, and their total variation from the right shares:"
    return [title, "", *make_table(runs, heads, paths, 3)]


def title_of(metric: str) -> str:
    """The name of a metric as the first word of a sentence."""
    name = METRICS[metric][0]
    return name if name == "chrF" else name[0].upper() + name[1:]


def step_name(step: str) -> str:
    """The head of a column."""
    if not step.isdigit():
        return step
    return "no step" if step == "0" else f"{step} step" + "s" * (step != "1")


def final_figures(runs: dict, arm: str, *path: str, scale: float = 1) -> list[float]:
    """An arm's figures under a path, `best` or `nats`, by seed: at three steps, or as the arm writes without steps."""
    found = []
    for run in runs.get(arm, {}).values():
        group, *names = path
        steps = [step for step in ("3", "greedy", "class", "0", "1") if step in run.get(group, {})]
        found += [scale * look_up(run, (group, steps[0], *names))] if steps else []
    return found


def rivals_of(arm: str) -> tuple[str, ...]:
    """The arms that an arm is compared with."""
    wholes = [whole for whole in RIVALS if arm.startswith(f"{whole}, ")]
    return RIVALS[arm] if arm in RIVALS else (max(wholes, key=len),) if wholes else ()


def comparison_table(runs: dict, columns: dict[str, tuple]) -> list[str]:
    """Arms against their rivals: the differences, and p of Welch's t-test over training seeds; columns as below."""
    lines = []
    pairs = [(arm, rival) for arm in runs for rival in rivals_of(arm)]
    for arm, rival in pairs:
        cells = []
        for digits, scale, *path in columns.values():
            own, others = (final_figures(runs, name, *path, scale=scale) for name in (arm, rival))
            if min(len(own), len(others)) < 2:
                cells += ["", ""]
            else:
                p = stats.ttest_ind(own, others, equal_var=False).pvalue
                difference = np.mean(own) - np.mean(others)
                cells += [f"{difference:+.{digits}f}", f"{p:.3f}" if p >= 0.001 else "< 0.001"]
        if any(cells):
            lines.append(f"| {arm}, minus {rival} | " + " | ".join(cells) + " |")
    if not lines:
        return []
    heads = " | ".join(f"{name} | p" for name in columns)
    title = "Differences at three steps, and p of Welch's t-test over training seeds:"
    return [title, "", f"| arm and rival | {heads} |", "|---" * (2 * len(columns) + 1) + "|", *lines, ""]


def main_table(runs: dict, metric: str, columns: dict[str, tuple]) -> list[str]:
    """A line for each arm: its best texts by number of steps in one of the METRICS, then more columns.

    Those have digits, scale and path, as `final_figures` takes it.
    """
    name, scale, digits = METRICS[metric]
    steps = sorted(columns_of(runs, "best"), key=lambda step: (not step.isdigit(), int(step) if step.isdigit() else 0))
    heads = [*(f"{name}, {step_name(step)}" for step in steps), *columns]
    lines = ["| arm | seeds | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for arm, seeds in runs.items():
        cells = []
        for step in steps:
            values = [look_up(run, ("best", step, metric)) for run in seeds.values()]
            values = [scale * value for value in values if value is not None]
            cells.append(of_seeds(values, digits, len(seeds)))
        for more_digits, more_scale, *path in columns.values():
            values = final_figures(runs, arm, *path, scale=more_scale)
            cells.append(of_seeds(values, more_digits, len(seeds)))
        lines.append(f"| {arm} | {len(seeds)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def quality_tables(runs: dict, metric: str = "bleu") -> list[str]:
    name, scale, digits = METRICS[metric]
    compared, columns, meaning = {name: (digits, scale, "best", metric)}, {}, []
    other = {"bleu": "chrf", "exact": "unknown", "f1": "exact"}.get(metric)
    best = [figures for arm in runs.values() for run in arm.values() for figures in run["best"].values()]
    if any(look_up(figures, (other,)) for figures in best):  # a share of 0 everywhere is one sentence of the notes
        name, scale, digits = METRICS[other]
        columns[name], meaning = (digits, scale, "best", other), [f"{name} of the same texts"]
    if columns_of(runs, "nats"):
        columns["nats"] = 3, 1, "nats"
        meaning += ["nats a token of right texts"]
    lines = [f"{title_of(metric)} of the best text, by number of steps."]
    if columns:
        lines[0] += f" At three steps, or as the arm generates: {', and '.join(meaning)}."
    lines += ["", *main_table(runs, metric, columns), *comparison_table(runs, compared | columns)]
    drawn = sorted(columns_of(runs, "drawn"), key=float)
    if drawn:
        lines += ["BLEU of one drawn text, and self-BLEU of four, by temperature:", ""]
        heads = [f"{name}, T = {temperature}" for temperature in drawn for name in ("BLEU", "self-BLEU")]
        paths = [("drawn", temperature, name) for temperature in drawn for name in ("bleu", "self_bleu")]
        lines += make_table(runs, heads, paths, 1)
    return lines


def readme_table(paths: dict[str, Path]) -> list[str]:
    """The mean of the arms that most tasks have, with a column a task: at three steps, or as the arm generates."""
    tables = {name: json.loads(path.read_text()) for name, path in paths.items()}
    metrics = {name: README_METRICS[table["recipe"].get("metric", "bleu")] for name, table in tables.items()}
    heads = [f"{README_TASKS[name]}, {' / '.join(METRICS[each][0] for each in metrics[name])}" for name in tables]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm in README_ARMS:
        cells = []
        for name, table in tables.items():
            own = [final_figures(table["runs"], arm, "best", each, scale=METRICS[each][1]) for each in metrics[name]]
            cells.append(" / ".join(f"{np.mean(values):.1f}" for values in own if values))
        lines += [f"| {arm} | " + " | ".join(cells) + " |"] if any(cells) else []
    return lines


def put_into_readme(text: str, paths: list[Path]) -> str:
    """The text with the table of its tasks, of the figures in these files, between its two marks."""
    found = {path.parent.name: path for path in paths}
    table = readme_table({name: found[name] for name in README_TASKS if name in found})
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{chr(10).join(table)}\n{MARKS[1]}{after}"


def make_page(paths: list[Path], intro: Path) -> str:
    """The whole page."""
    lines = [intro.read_text().strip(), ""]
    named = {path.parent.name: path for path in paths}
    for name, path in named.items():
        lines += make_section(path) if name not in PAPER_TASKS else []
    shared = {name: named[name] for name in PAPER_TASKS if name in named}
    if shared:
        lines += paper_section(shared, intro.with_name("paper_tasks.md"))
    routes = intro.with_name("routes.md")
    lines += [routes.read_text()] if routes.exists() else []
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--intro", type=Path, default=Path("docs/results/intro.md"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--readme", type=Path, help="gets a table of the main arms, too")
    options = parser.parse_args(arguments)
    options.output.write_text(make_page(sorted(options.tables), options.intro))
    if options.readme:
        options.readme.write_text(put_into_readme(options.readme.read_text(), options.tables))


if __name__ == "__main__":
    main()
