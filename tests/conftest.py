"""Shared fixtures: tiny models of both variants, the same in every run."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from modeling_yan import YanConfig, YanForFlowGeneration

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file

BUNDLED = Path(__file__).parents[1] / "examples" / "checkpoints" / "yan-transformer-tiny"
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_encoder_layers": 2,
    "num_flow_layers": 2,
    "num_decoder_layers": 1,
    "max_position_embeddings": 48,
    "canvas_length": 8,
    "state_size": 4,
    "freeze_encoder": False,
    "freeze_decoder": False,
    "freeze_embeddings": False,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n 2` each process takes half of the files, and then from the other: servers and models start once."""
    if config.getvalue("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)
    return None


@pytest.fixture(autouse=True)
def verbosity():
    """Commands and the server quieten transformers: no test after them may miss its warnings."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(params=["attention", "mamba"])
def variant(request) -> str:
    """Self-mixer of encoder and flow. Where mixers hardly matter, "both" has one in each, and the tests run once."""
    return request.param


@pytest.fixture
def make_config(variant):
    """Function from overrides to a tiny config of the variant."""
    encoder, flow = ("attention", "mamba") if variant == "both" else (variant, variant)
    return lambda **overrides: YanConfig(**{**TINY, "encoder_mixer": encoder, "flow_mixer": flow, **overrides})


@pytest.fixture
def make_model(make_config):
    """Function from overrides, and a model class, to a seeded tiny model in evaluation mode."""

    def make(model_class=YanForFlowGeneration, **overrides):
        torch.manual_seed(0)
        return model_class(make_config(**overrides)).eval()

    return make


@pytest.fixture
def make_lively_model(make_model):
    """Function from overrides to a model whose tokens depend on prompt, noise and time, and that generates no EOS."""

    def make(**overrides):
        model = make_model(**{"initializer_range": 0.3, **overrides})
        nn.init.normal_(model.flow.modulation.proj.weight, std=0.1)
        if model.config.refine_draft:  # it starts at zero
            nn.init.normal_(model.flow.experts.heads.down_proj, std=0.3)
        model.lm_head.bias.data[[model.config.pad_token_id, model.config.eos_token_id]] = -1e4
        return model

    return make


@pytest.fixture
def lively_model(make_model):
    """Like `make_model`, with weights so large that every part of the network matters."""

    def make(model_class=YanForFlowGeneration, **overrides):
        model = make_model(model_class, initializer_range=0.2, **overrides)
        for name, parameter in model.named_parameters():
            if "flow.modulation.proj" in name or (name.endswith("bias") and "dt_proj" not in name):
                nn.init.normal_(parameter, std=0.1)
            if "flow.gate" in name and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.5)
        return model

    return make


@pytest.fixture
def prompts() -> torch.LongTensor:
    """Six prompts of seven tokens, without special ones."""
    return torch.randint(4, TINY["vocab_size"], (6, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_config(make_config) -> YanConfig:
    """A tiny config of the variant."""
    return make_config()


@pytest.fixture
def tiny_model(make_model) -> YanForFlowGeneration:
    """A seeded tiny model of the variant, in evaluation mode."""
    return make_model()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bundled_tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def bundled_model() -> YanForFlowGeneration:
    """The bundled Transformer, which no test may change for longer than itself."""
    return YanForFlowGeneration.from_pretrained(BUNDLED).eval()


@pytest.fixture(scope="session")
def write(bundled_model, bundled_tokenizer):
    """Function from a prompt and options to what `generate` of the bundled model writes for it alone."""

    def run(prompt, **options):
        inputs = bundled_tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        sequences = bundled_model.generate(**inputs, return_prompt=False, **options)
        return bundled_tokenizer.decode(sequences[0], skip_special_tokens=True)

    return run


@pytest.fixture
def drawings(monkeypatch) -> dict[str, list]:
    """What the pictures show that a test saves, by the name of the file: numbers of lines and bars in each panel."""
    figure, shown = pytest.importorskip("matplotlib.figure").Figure, {}
    save = figure.savefig

    def keep(self, path, **options):
        save(self, path, **options)
        shown[Path(path).name] = [_numbers_of(axis) for axis in self.axes]

    monkeypatch.setattr(figure, "savefig", keep)
    return shown


def _numbers_of(axis) -> list[list[float]]:
    lines = [line.get_ydata() for line in axis.lines if line.get_linestyle() != "None"]  # other ones end an interval
    bars = [bars.datavalues for bars in axis.containers if hasattr(bars, "datavalues")]
    return [[float(number) for number in numbers] for numbers in [*lines, *bars]]


@pytest.fixture
def load_script(monkeypatch):
    """Function from the name of an experiment to its module."""
    loaded = []

    def load(name):
        folder = Path(__file__).parents[1] / "examples" / "experiments"
        monkeypatch.syspath_prepend(folder)  # as for a script that is run there
        spec = importlib.util.spec_from_file_location(f"experiment_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


@pytest.fixture
def warnings_of_transformers(caplog, monkeypatch):
    """What the package warns of, through the library's own logger."""
    for name in ("transformers", "modeling_yan"):
        monkeypatch.setattr(logging.get_logger(name), "propagate", True)
    return caplog
