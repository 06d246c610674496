"""No network that nobody asked for, no code out of data: what SECURITY.md promises."""

import ast
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("modeling_yan", "examples") for path in (ROOT / folder).rglob("*.py"))
SOURCES = [path for path in SOURCES if "checkpoints" not in path.parts]  # links to the package
PLAIN_USE = """
import sys
asked = []
sys.addaudithook(lambda event, details: asked.append((event, details)) if event in (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") else None)
import modeling_yan
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from modeling_yan.data import FlowCollator
folder, output = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
model.generate(**tokenizer("Where is the hat?", return_tensors="pt"))
rows = [{"source": "Where is the hat?", "target": "The hat is here."}] * 2
settings = TrainingArguments(output, max_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False)
Trainer(model, settings, FlowCollator(tokenizer, model=model), rows).train()
model.save_pretrained(output)
tokenizer.save_pretrained(output)
pipeline("text-generation", model=output)("Where is the hat?")
print(asked)
"""


@pytest.mark.slow
def test_plain_use_asks_nothing_of_the_network(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-c", PLAIN_USE, ROOT / "examples/checkpoints/yan-transformer-tiny", tmp_path / "out"]
    result = subprocess.run(map(str, words), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == "[]"


def calls(path: Path):
    """Every call of a file: its line, the name it goes by, and its keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}


def test_no_code_comes_out_of_data():
    found = [(path, *call) for path in SOURCES for call in calls(path)]
    assert len(found) > 1000
    for path, line, name, keywords in found:
        where = f"{path.relative_to(ROOT)}, line {line}"
        assert name not in ("eval", "exec", "os.system", "yaml.load", "pickle.load", "pickle.loads"), where
        assert name != "torch.load" or keywords.get("weights_only") == "True", where
        assert keywords.get("trust_remote_code") != "True", where
        assert keywords.get("shell") != "True", where


@pytest.mark.parametrize("extra", [None, "dev", "examples", "demo"])
def test_what_ci_installs_is_pinned_within_the_declared_ranges(extra):
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    wanted = settings["options.extras_require"][extra] if extra else settings["options"]["install_requires"]
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = {}
    for pin in map(Requirement, (line for line in lines if not line.startswith("#"))):
        pins.setdefault(canonicalize_name(pin.name), []).append(next(iter(pin.specifier)).version)
    for line in filter(None, wanted.splitlines()):
        requirement = Requirement(line)
        versions = pins.get(canonicalize_name(requirement.name), [])
        assert any(map(requirement.specifier.contains, versions)), f"{line}: {versions or 'no pin'}"
