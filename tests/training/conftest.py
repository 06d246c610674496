"""Shared by the tests of training: a little data, a tokenizer, and the settings of a short run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from modeling_yan.data import train_tokenizer
from modeling_yan.data.rows import write_rows
from modeling_yan.training import PretrainingArguments

ROOT = Path(__file__).parents[2]
NAMES = ("Mary", "John", "Ann", "Tom", "the dog")
PLACES = ("garden", "house", "park", "kitchen")
TEXTS = [{"text": f"{name} went to the {place}. Then it was dark."} for name in NAMES for place in PLACES]
PAIRS = [{"source": f"{name} is in the {place}. Where?", "target": place} for name in NAMES for place in PLACES]
TINY = {"num_encoder_layers": 1, "num_flow_layers": 1, "num_flow_steps": 2, "decoder_dropout": 0.0}
FROZEN = {"freeze_encoder": True, "freeze_decoder": True, "freeze_embeddings": True}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Folder with 20 texts, 20 pairs, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "texts.jsonl.gz", TEXTS)
    write_rows(folder / "pairs.jsonl", PAIRS)
    tokenizer = train_tokenizer([row["text"] for row in TEXTS], vocab_size=300)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one state for the process; every run here begins without."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def fresh():
    """Function that makes Accelerate forget the run before."""
    return lambda: AcceleratorState._reset_state(True)


@pytest.fixture
def preset(make_config, tmp_path) -> Path:
    """Folder of a config alone."""
    make_config(**TINY, **FROZEN).save_pretrained(tmp_path / "preset")
    return tmp_path / "preset"


@pytest.fixture
def arguments(data, preset, tmp_path):
    """Function from overrides to the arguments of a few steps of stage one on everything."""
    defaults = {
        "stage": "autoencoder",
        "config": str(preset),
        "tokenizer": str(data / "tokenizer"),
        "train_file": [str(data / "texts.jsonl.gz"), str(data / "pairs.jsonl")],
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "save_steps": 10,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "use_cpu": True,
        "validation_batches": 1,
        "report_to": ["none"],
        "peak_tflops": 0.1,
    }
    return lambda **overrides: PretrainingArguments(**{**defaults, **overrides})


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def read_weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal_weights(weights, others, part="") -> bool:
    """Whether two state dicts agree bit for bit in the weights whose name begins with `part`."""
    names = [name for name in weights if name.startswith(part)]
    return bool(names) and all(torch.equal(weights[name], others[name]) for name in names)


@pytest.fixture
def runs():
    """The helpers above, for tests that look into what a run left."""

    class Runs:
        log = staticmethod(read_log)
        weights = staticmethod(read_weights)
        equal = staticmethod(equal_weights)
        command = staticmethod(run_command)
        start = staticmethod(start_command)

    return Runs


@pytest.fixture
def command_line():
    """Function from arguments to the words that one would type."""

    def words_of(arguments):
        entries = [(name, value if isinstance(value, list) else [value]) for name, value in vars(arguments).items()]
        entries = [(name, values) for name, values in entries if values != [None]]
        return [word for name, values in entries if values for word in (f"--{name}", *map(str, values))]

    return words_of


def run_command(*words, home, check=True):
    """A command of Python, in a process of its own that finds this package."""
    with start_command(*words, home=home) as process:
        output, errors = process.communicate()
    assert not check or process.returncode == 0, errors
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def start_command(*words, home) -> subprocess.Popen:
    """The same, running."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, **pipes)
