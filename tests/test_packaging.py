"""The wheel built from the tree holds the whole package and nothing else, and works without the tree."""

import configparser
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from modeling_yan import __version__

ROOT = Path(__file__).parents[1]
DIST_INFO = f"modeling_yan-{__version__}.dist-info"
BUILD_INPUTS = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
TINY_MODELS = """
import json
import modeling_yan
from modeling_yan import YanConfig, YanForFlowGeneration

sizes = dict(vocab_size=99, hidden_size=32, num_attention_heads=4, num_encoder_layers=1, num_flow_layers=1,
             num_decoder_layers=1, max_position_embeddings=32, canvas_length=8)
models = [YanForFlowGeneration(YanConfig(**sizes, encoder_mixer=mixer)) for mixer in ("attention", "mamba")]
print(json.dumps([modeling_yan.__file__, [model.num_parameters() for model in models]]))
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
    assert "modeling_yan/py.typed" in names  # so that type checkers read the types
    assert {name.split("/")[0] for name in names} == {"modeling_yan", DIST_INFO}
    assert any(name.endswith("LICENSE") for name in names)


def test_the_metadata_names_the_dependencies_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{DIST_INFO}/METADATA").decode()
    core = {"torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface-hub", "safetensors"}
    core |= {"numpy", "pyyaml", "tqdm"}
    required = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert {line.split("<")[0].split(">")[0] for line in required if "extra" not in line} == core
    assert "Requires-Python: >=3.10" in metadata
    assert "Apache-2.0" in metadata


def test_the_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert "yan = modeling_yan.commands:main" in entries.splitlines()


@pytest.mark.slow
def test_the_installed_wheel_works_away_from_the_tree(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    printed = run("-c", TINY_MODELS, cwd=tmp_path, env=environment)
    file, parameters = json.loads(printed.splitlines()[-1])
    assert Path(file).is_relative_to(installed)
    assert all(10_000 < number < 1_000_000 for number in parameters)


def test_the_version_stands_in_one_place_and_the_changelog_has_it():
    assert __version__ not in (ROOT / "setup.cfg").read_text() + (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+\.\d+\.\d+)$", changelog, re.M)[0] == __version__


def test_the_space_asks_for_what_the_package_and_its_demo_do():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    asked = settings["options"]["install_requires"] + settings["options.extras_require"]["demo"]
    requirements = (ROOT / "examples" / "space" / "requirements.txt").read_text()
    assert set(requirements.split()) == set(asked.split())


@pytest.mark.parametrize("name", ["ci", "release"])
def test_a_workflow_calls_scripts_that_exist(name):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    scripts = [word for step in steps for word in step.get("run", "").split() if word.startswith(".ci/")]
    assert scripts
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)


def test_the_workflow_runs_the_versions_of_python_that_the_metadata_names():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text())
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == named


def test_every_check_has_a_name_by_which_it_is_called():
    checks = re.findall(r"^(\w+)\(\) \{", (ROOT / ".ci" / "check").read_text(), re.M)
    callers = "".join((ROOT / name).read_text() for name in (".ci/run", ".ci/versions", ".github/workflows/ci.yml"))
    calls = re.findall(r"^(?:\S+ | +- run: )?\.ci/check ([a-z ]+)$", callers, re.M)
    assert sorted(" ".join(calls).split()) == sorted(checks)
    sessions = re.findall(r'"(\w+)"|def (\w+)\(session', (ROOT / "noxfile.py").read_text())
    assert {"lint", "types", "docs", "tests", "slow"} <= {name for pair in sessions for name in pair} & set(checks)
