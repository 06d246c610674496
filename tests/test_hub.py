"""Pushed to a hub, a model and its tokenizer come back by the name of their repository, in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.data import train_tokenizer

SERVER = Path(__file__).with_name("hub_server.py")
PROMPTS = ["The cat sat on", "Where is"]
VARIANTS = ("attention", "mamba")

PUSH = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from modeling_yan import YanForFlowGeneration

for folder in map(Path, sys.argv[1:]):
    YanForFlowGeneration.from_pretrained(folder).push_to_hub(f"somebody/{folder.name}")
    AutoTokenizer.from_pretrained(folder).push_to_hub(f"somebody/{folder.name}")
"""

PUSH_VERSIONS = """
import json, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi
from transformers import AutoTokenizer
from modeling_yan import YanForFlowGeneration

folder, root = map(Path, sys.argv[1:])
name, model = "somebody/versions", YanForFlowGeneration.from_pretrained(folder)
model.model_card.license = "mit"
first = model.push_to_hub(name).oid
with torch.no_grad():
    model.lm_head.bias += 1
(root / "break").touch()
try:
    model.push_to_hub(name, max_shard_size="20KB")
except Exception as error:
    broken = type(error).__name__
(root / "break").unlink()
after = HfApi().model_info(name).sha
second = model.push_to_hub(name, max_shard_size="20KB", tags=["sharded"]).oid
third = model.push_to_hub(name).oid
files = [HfApi().list_repo_files(name, revision=commit) for commit in (first, second, third)]
Path("pushed.json").write_text(json.dumps([first, broken, after, second, files]))
"""

WITHOUT_PACKAGE = """
import sys

sys.modules["modeling_yan"] = None  # importable from nowhere, however it is installed
"""

LOAD_VERSIONS = f"""{WITHOUT_PACKAGE}
import torch
from transformers import AutoModelForCausalLM

load = AutoModelForCausalLM.from_pretrained
models = [load("somebody/versions", revision=revision, trust_remote_code=True) for revision in sys.argv[1:]]
torch.save([model.state_dict() for model in models], "versions.pt")
"""

LOAD = f"""{WITHOUT_PACKAGE}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

results, prompts = {{}}, sys.argv[1:]
for name in ("somebody/attention", "somebody/mamba"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(name)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    write = pipeline("text-generation", model=name, trust_remote_code=True)
    texts = [answers[0]["generated_text"] for answers in write(prompts, batch_size=2)]
    results[name] = {{"tokens": model.generate(**batch), "texts": texts, "weights": model.state_dict()}}
torch.save(results, "results.pt")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A tiny model of each variant, beside its tokenizer."""
    tokenizer = train_tokenizer([*PROMPTS, "The dog ran to the cat."] * 4, vocab_size=280)
    folders = [tmp_path_factory.mktemp("local") / variant for variant in VARIANTS]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
    sizes |= {"num_decoder_layers": 1, "canvas_length": 8, "max_position_embeddings": 32, "initializer_range": 0.3}
    for folder in folders:
        torch.manual_seed(0)
        mixers = {"encoder_mixer": folder.name, "flow_mixer": folder.name}
        YanForFlowGeneration(YanConfig(vocab_size=len(tokenizer), **sizes, **mixers)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Address of a running hub, and the folder behind it."""
    root = tmp_path_factory.mktemp("hub")
    command = [sys.executable, SERVER, root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip(), root
        server.stdin.close()


def run(script, address, home, *arguments, **environment):
    """Run a script that knows only the hub at `address`."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0", **environment}
    environment |= {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_MODULES_CACHE": str(home / "modules")}
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_what_is_pushed_comes_back_in_a_fresh_process(hub, folders, tmp_path):
    address, root = hub
    publisher, user = tmp_path / "publisher", tmp_path / "user"
    publisher.mkdir()
    user.mkdir()
    run(PUSH, address, publisher, *folders, PYTHONPATH=str(SERVER.parents[1]))
    for folder in folders:
        pushed = {path.name: path.read_bytes() for path in last_commit(root, folder.name).glob("*")}
        local = {path.name: path.read_bytes() for path in folder.glob("*")}
        assert pushed.keys() == local.keys()
        assert pushed["model.safetensors"] == local["model.safetensors"]

        card = ModelCard(pushed["README.md"].decode())
        assert (card.data.get("library_name"), card.data.pipeline_tag) == ("transformers", "text-generation")
        assert f'from_pretrained("somebody/{folder.name}", trust_remote_code=True' in card.text

    run(LOAD, address, user, *PROMPTS, PYTHONPATH="")
    results = torch.load(user / "results.pt")
    for folder in folders:
        compare(results[f"somebody/{folder.name}"], folder)


def last_commit(root, name) -> Path:
    """The files of a repository."""
    repository = root / "somebody" / name
    return repository / (repository / "main").read_text()


@pytest.mark.slow
def test_a_pinned_revision_stays_and_an_upload_that_breaks_off_changes_nothing(hub, folders, tmp_path):
    address, root = hub
    publisher, user = tmp_path / "publisher", tmp_path / "user"
    publisher.mkdir()
    user.mkdir()
    run(PUSH_VERSIONS, address, publisher, folders[0], root, PYTHONPATH=str(SERVER.parents[1]))
    first, broken, after, second, files = json.loads((publisher / "pushed.json").read_text())
    assert broken
    assert after == first != second
    single, sharded, again = ([name for name in found if name.startswith("model")] for found in files)
    assert again == single == ["model.safetensors", "modeling_yan.py"]  # weights of another form do not stay
    assert "model.safetensors" not in sharded
    assert "model.safetensors.index.json" in sharded
    assert len([name for name in sharded if name.startswith("model-")]) > 2
    card = ModelCard.load(root / "somebody" / "versions" / second / "README.md")
    assert (card.data.license, "sharded" in card.data.tags) == ("mit", True)

    run(LOAD_VERSIONS, address, user, first, second, PYTHONPATH="")
    old, new = torch.load(user / "versions.pt")
    expected = YanForFlowGeneration.from_pretrained(folders[0]).state_dict()
    assert all(torch.equal(old[name], value) for name, value in expected.items())
    assert torch.equal(new.pop("lm_head.bias"), expected.pop("lm_head.bias") + 1)
    assert all(torch.equal(new[name], value) for name, value in expected.items())


def compare(result, folder):
    """The result of the fresh process, against the folder that was pushed."""
    model, tokenizer = YanForFlowGeneration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    tokens = model.generate(**batch)
    assert torch.equal(result["tokens"], tokens)
    new = tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert result["texts"] == [prompt + text for prompt, text in zip(PROMPTS, new)]
    assert all(torch.equal(result["weights"][name], value) for name, value in model.state_dict().items())
