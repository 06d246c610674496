"""An import of the models loads nothing that only training, data or evaluation need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[1] / "examples" / "checkpoints" / "yan-transformer-tiny"
# never for a model alone
TRAINING = {"transformers.trainer", "datasets", "evaluate", "pandas", "pyarrow"}
# transformers may load them by itself, this package does not
OWN = {"accelerate", "tqdm", "yaml", "numpy"}

STOCK = "from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel"
IMPORT = "import modeling_yan"
LOAD = "from transformers import AutoModel; AutoModel.from_pretrained({folder!r}{options})"
IN_A_FORK = """
import json, os, sys
{before}
stock = sorted(sys.modules)
for name, code in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        exec(code, {{}})
        print(json.dumps([name, stock, sorted(sys.modules)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""
TRAIN = """
from transformers import AutoModelForCausalLM
from transformers.trainer import DEFAULT_CALLBACKS, Trainer, TrainingArguments
import modeling_yan
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert "modeling_yan.trainer_yan" not in sys.modules and len(DEFAULT_CALLBACKS) == 1
for _ in range(2):
    trainer = Trainer(model, TrainingArguments({output!r}, use_cpu=True, report_to="none"))
    callbacks = [type(each).__name__ for each in trainer.callback_handler.callbacks]
    assert callbacks.count("YanTrainerCallback") == 1
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, tuple[set[str], set[str]]]:
    """Names of the modules before and after code runs, each time in a fork of one fresh process."""
    codes = {
        "import": IMPORT,
        "loaded": f"{IMPORT}; " + LOAD.format(folder=str(CHECKPOINT), options=""),
        "loaded as remote code": LOAD.format(folder=str(CHECKPOINT), options=", trust_remote_code=True"),
        "trained": "import sys" + TRAIN.format(folder=str(CHECKPOINT), output=str(tmp_path_factory.mktemp("output"))),
    }
    command = [sys.executable, "-c", IN_A_FORK.format(before=STOCK), json.dumps(codes)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    return {name: (set(before), set(after)) for name, before, after in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import", "loaded", "loaded as remote code"])
def test_the_models_need_no_trainer_and_no_data_sets(loaded, name):
    before, after = loaded[name]
    assert not after & TRAINING
    assert not (after - before) & OWN


@pytest.mark.slow
def test_a_trainer_of_a_yan_model_logs_its_terms_and_an_import_does_not_touch_trainers(loaded):
    _, after = loaded["trained"]
    assert "modeling_yan.trainer_yan" in after


def test_every_public_name_is_there():
    import modeling_yan

    assert all(getattr(modeling_yan, name).__name__ == name for name in modeling_yan.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'YanTrainer'"):
        modeling_yan.YanTrainer  # noqa: B018
