"""The wheel built from the tree holds the whole package and nothing else, and works without the tree."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD_INPUTS = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
TINY_MODEL = """
import json, sys
import modeling_yan
from modeling_yan import YanConfig, YanForFlowGeneration

config = YanConfig(vocab_size=99, hidden_size=32, num_attention_heads=4, num_encoder_layers=1, num_flow_layers=1,
                   num_decoder_layers=1, max_position_embeddings=32, canvas_length=8, encoder_mixer=sys.argv[1])
model = YanForFlowGeneration(config)
print(json.dumps([modeling_yan.__file__, model.num_parameters()]))
"""


def run(*command, **kwargs) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **kwargs
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def copy_sources(destination: Path):
    """Copy what a build reads, so that building leaves nothing behind in the tree."""
    sources = [path for path in ROOT.glob("modeling_yan/**/*") if path.is_file() and "__pycache__" not in path.parts]
    # tests and examples are copied as well: the wheel has to leave them out by itself
    sources += [path for folder in ("tests", "examples") for path in ROOT.glob(f"{folder}/**/*.py")]
    sources += [ROOT / name for name in BUILD_INPUTS if (ROOT / name).is_file()]
    for path in sources:
        target = destination / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    copy_sources(tree)
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out, tree)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing in it but what the wheel installs."""
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    return target


def test_the_wheel_holds_every_module_and_nothing_but_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("modeling_yan/**/*.py")}
    assert modules - names == set()
    assert {name.split("/")[0] for name in names} == {"modeling_yan", "modeling_yan-0.1.0.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


def test_the_metadata_names_the_dependencies_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("modeling_yan-0.1.0.dist-info/METADATA").decode()
    core = {"torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface-hub", "safetensors"}
    core |= {"numpy", "pyyaml", "tqdm"}
    required = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert {line.split("<")[0].split(">")[0] for line in required if "extra" not in line} == core
    assert "Requires-Python: >=3.10" in metadata
    assert "Apache-2.0" in metadata


def test_the_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.read("modeling_yan-0.1.0.dist-info/entry_points.txt").decode()
    assert "yan = modeling_yan.commands:main" in entries.splitlines()


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_the_installed_wheel_works_away_from_the_tree(installed, tmp_path, mixer):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    printed = run("-c", TINY_MODEL, mixer, cwd=tmp_path, env=environment)
    file, parameters = json.loads(printed.splitlines()[-1])
    assert Path(file).is_relative_to(installed)
    assert 10_000 < parameters < 1_000_000
