"""lm-evaluation-harness runs a local generate_until task on a saved checkpoint; skipped where it is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modeling_yan import YanForFlowGeneration

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "examples" / "checkpoints" / "yan-transformer-tiny"


def run(*words, home):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def harness():
    """The harness around a bundled model, which it asks in its own way how large a batch may be."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    options = {"batch_size": "auto", "max_batch_size": 4, "max_length": 96, "device": "cpu"}
    return HFLM(pretrained=YanForFlowGeneration.from_pretrained(CHECKPOINT), tokenizer=tokenizer, **options)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


QUESTION = "<mask>" * 8 + " Question: Where is the apple? Mary went to the kitchen. Mary took the apple."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("loglikelihood", (QUESTION, " The apple is in the kitchen.")), ("loglikelihood_rolling", (QUESTION,))],
)
def test_what_needs_a_causal_model_is_refused(harness, kind, arguments):
    with pytest.raises(NotImplementedError, match="output_type: must be generate_until"):
        getattr(harness, kind)(requests(kind, arguments, arguments))


def test_what_generates_is_served(harness):
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    assert harness.generate_until(requests("generate_until", (QUESTION, options))) == ["The apple is in the kitchen."]


@pytest.mark.slow
def test_a_saved_checkpoint_answers_a_local_task(tmp_path):
    run("examples/lm_eval/export.py", CHECKPOINT, tmp_path / "model", home=tmp_path / "home")
    arguments = f"pretrained={tmp_path / 'model'},trust_remote_code=True,max_length=96,dtype=float32"
    task = ["--tasks", "yan_stories", "--include_path", "examples/lm_eval", "--limit", 16]
    settings = ["--device", "cpu", "--batch_size", 8, "--output_path", tmp_path / "results", "--log_samples"]
    run("-m", "lm_eval", "--model", "hf", "--model_args", arguments, *task, *settings, home=tmp_path / "home")
    (results,) = (tmp_path / "results").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["yan_stories"]
    assert 0 <= scores["exact_match,none"] <= 1
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 16
    answers = [line["filtered_resps"][0] for line in lines]
    assert all(answer and "<" not in answer and "\n" not in answer for answer in answers)
    # a bundled model knows the form of an answer, whether or not it finds it
    assert sum(answer.endswith(".") for answer in answers) >= 12
