"""Import transformers' common tests under `fetch.PACKAGE`, with stand-ins for the modules that the sdist leaves out.

The sdist has the files tests/test_*.py but no sub-folder of tests/. Of what the mixins import from sub-folders they
need three names: two mixins (export and generation tests, which are therefore not run), and one dictionary.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from fetch import PACKAGE, suite_folder

# Values that every transformers config has to keep when they are passed to it.
COMMON_CONFIG_FIELDS = {
    "architectures": ["YanModel"],
    "chunk_size_feed_forward": 7,
    "dtype": "float16",
    "id2label": {0: "zero", 1: "one"},
    "label2id": {"zero": 0, "one": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": COMMON_CONFIG_FIELDS},
}


def load_suite() -> SimpleNamespace:
    """Return `ModelTesterMixin`, `TrainingTesterMixin` and `ConfigTester`; raise `SuiteUnavailable` without them."""
    folder = suite_folder()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    for name, members in STAND_INS.items():
        if not (folder / PACKAGE / Path(*name.split("."))).with_suffix(".py").is_file():
            _stand_in(name, members)
    return SimpleNamespace(
        ModelTesterMixin=importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin,
        TrainingTesterMixin=importlib.import_module(f"{PACKAGE}.test_training_mixin").TrainingTesterMixin,
        ConfigTester=importlib.import_module(f"{PACKAGE}.test_configuration_common").ConfigTester,
    )


def _stand_in(name: str, members: dict):
    package = name.split(".")[0]
    sys.modules.setdefault(f"{PACKAGE}.{package}", ModuleType(f"{PACKAGE}.{package}"))
    module = ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(members)
    sys.modules.setdefault(f"{PACKAGE}.{name}", module)
