"""examples/serving: texts for a file of prompts, whatever happens to its processes; the figures of the load."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from serving import MODEL, ROOT

psutil = pytest.importorskip("psutil")

TIMEOUT_S = 300  # of a machine that does other things, too


def start(folder: Path, num_rows: int, *words) -> tuple[subprocess.Popen, list[str]]:
    """The job in a process of its own, and its prompts."""
    places = ("kitchen", "garden", "office")
    prompts = [
        f"Where is the apple? Mary went to the {places[row % 3]}. Mary took the apple." for row in range(num_rows)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, str(ROOT / "examples" / "serving" / "offline.py"), "--model", MODEL]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--output_dir", str(folder / "texts"), *words]
    return subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True), prompts


def finish(process: subprocess.Popen) -> str:
    try:
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0
    return printed


def check_texts(folder: Path, prompts: list[str], write):
    """All texts are there, in order, and those that `generate` writes for a prompt alone."""
    rows = [json.loads(line) for line in (folder / "texts" / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows[:3]:
        assert {other["text"] for other in rows if other["prompt"] == row["prompt"]} == {write(row["prompt"])}


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path, write):
    process, prompts = start(tmp_path, 200, "--part_size", "5", "--batch_size", "5")
    end, parts = time.monotonic() + TIMEOUT_S, tmp_path / "texts"
    while len(list(parts.glob("part-*.jsonl"))) < 4 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    workers = [p for child in psutil.Process(process.pid).children() for p in child.children()]
    workers[0].kill()
    assert "1 times a process died" in finish(process)
    check_texts(tmp_path, prompts, write)


@pytest.mark.slow
def test_a_job_that_was_stopped_goes_on_with_what_is_missing(tmp_path, write):
    process, prompts = start(tmp_path, 12, "--part_size", "4", "--processes", "1", "--machine", "1/2")
    finish(process)
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == ["part-000000004.jsonl", "settings.json"]
    written = (tmp_path / "texts" / "part-000000004.jsonl").stat().st_mtime_ns
    finish(start(tmp_path, 12, "--part_size", "4", "--processes", "1")[0])
    assert (tmp_path / "texts" / "part-000000004.jsonl").stat().st_mtime_ns == written
    check_texts(tmp_path, prompts, write)


def test_texts_of_another_job_are_not_taken_for_its_own(tmp_path):
    spec = importlib.util.spec_from_file_location("offline", ROOT / "examples" / "serving" / "offline.py")
    offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline)
    words = ["--model", MODEL, "--prompts", "x", "--output_dir", str(tmp_path)]
    rows = Dataset.from_dict({"prompt": ["Where?", "Who?"]})
    for _ in range(2):
        offline.check_settings(rows, offline.parse_arguments(words))
    for others, name in ((["--part_size", "4"], "part_size"), (["--steps", "1"], "steps")):
        with pytest.raises(ValueError, match=f"holds texts of other {name}: give another --output_dir"):
            offline.check_settings(rows, offline.parse_arguments([*words, *others]))
    with pytest.raises(ValueError, match="holds texts of other prompts"):
        offline.check_settings(rows.select([0]), offline.parse_arguments(words))


@pytest.fixture(scope="module")
def load():
    """The script that loads the server."""
    spec = importlib.util.spec_from_file_location("serving_load", ROOT / "examples" / "serving" / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_figures_that_were_measured(load):
    figures = json.loads((ROOT / "docs" / "benchmarks" / "serving.json").read_text())
    assert load.section(figures) in (ROOT / "docs" / "guides" / "serve.md").read_text()


def test_a_soak_tells_right_from_wrong_and_lost(load):
    soak = load.Soak(0, {"prompt": "right"}, 0)
    found = [
        soak._judge(status, "prompt", lambda text=text: text)
        for status, text in ((200, "right"), (200, ""), (0, ""), (429, ""))
    ]
    assert found == ["right", "wrong", "lost", "status 429"]
    events = (
        b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b", "draft": "x"}]}\n\ndata: [DONE]\n\n'
    )
    assert load._text_of_events(events) == "ab"


def test_a_load_sums_up_what_was_measured(load):
    found = load.Load(latencies=[0.1] * 98 + [0.2, 0.3], failed=1, seconds=10.0).summary()
    assert found == {"requests": 100, "failed": 1, "requests_per_s": 10.0, "p50_s": 0.1, "p99_s": 0.201}
