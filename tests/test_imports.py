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
SCRIPT = """
import json, sys
{before}
stock = set(sys.modules)
{code}
print(json.dumps([sorted(stock), sorted(sys.modules)]))
"""


def loaded_by(code, before=STOCK) -> tuple[set[str], set[str]]:
    """Names of the modules that a fresh process has before the code runs, and after."""
    script = SCRIPT.format(before=before, code=code)
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    before, after = json.loads(output.splitlines()[-1])
    return set(before), set(after)


@pytest.mark.parametrize(
    "code",
    [
        IMPORT,
        f"{IMPORT}; " + LOAD.format(folder=str(CHECKPOINT), options=""),
        LOAD.format(folder=str(CHECKPOINT), options=", trust_remote_code=True"),
    ],
    ids=["import", "loaded", "loaded as remote code"],
)
def test_the_models_need_no_trainer_and_no_data_sets(code):
    before, after = loaded_by(code)
    assert not after & TRAINING
    assert not (after - before) & OWN


def test_a_trainer_of_a_yan_model_logs_its_terms_and_an_import_does_not_touch_trainers(tmp_path):
    code = f"""
from transformers import AutoModelForCausalLM
from transformers.trainer import DEFAULT_CALLBACKS, Trainer, TrainingArguments
import modeling_yan
model = AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r})
assert "modeling_yan.trainer_yan" not in sys.modules and len(DEFAULT_CALLBACKS) == 1
for _ in range(2):
    trainer = Trainer(model, TrainingArguments({str(tmp_path)!r}, use_cpu=True, report_to="none"))
    callbacks = [type(each).__name__ for each in trainer.callback_handler.callbacks]
    assert callbacks.count("YanTrainerCallback") == 1
"""
    _, after = loaded_by(code)
    assert "modeling_yan.trainer_yan" in after


def test_every_public_name_is_there():
    import modeling_yan

    assert all(getattr(modeling_yan, name).__name__ == name for name in modeling_yan.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'YanTrainer'"):
        modeling_yan.YanTrainer  # noqa: B018
