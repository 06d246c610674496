"""Saving and loading: by the package, by the Auto classes, and in a process that has only what was saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import modeling_yan
from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration, YanGenerationConfig, YanModel

PACKAGE = Path(modeling_yan.__file__).parent
FLAT_MODULES = {path.name for path in PACKAGE.glob("*_yan.py")}
BUNDLED = sorted((Path(__file__).parents[1] / "examples/checkpoints").iterdir())
FOLDERS = {"attention": "Übung", "mamba": "模型-2.0"}  # a user's folder becomes a part of the code's name
AUTO_CLASSES = {
    AutoModel: YanModel,
    AutoModelForMaskedLM: YanForAutoencoding,
    AutoModelForCausalLM: YanForFlowGeneration,
}

WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path

sys.modules["modeling_yan"] = None  # importable from nowhere, however it is installed

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

prompts, results = torch.load("prompts.pt"), {}


def load(auto_class, path):
    model = auto_class.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def outputs(path):
    writer = load(AutoModelForCausalLM, path)
    with torch.no_grad():
        return {
            "latents": load(AutoModel, path)(prompts).last_hidden_state,
            "restored": load(AutoModelForMaskedLM, path)(prompts).logits,
            "logits": writer(prompts).logits,
            "loss": writer(prompts, labels=prompts.flip(1)).loss,
            "text": writer.generate(prompts, max_new_tokens=20),
            "sampled": writer.generate(prompts, do_sample=True, seed=3, num_return_sequences=2),
        }


for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    first, again = outputs(folder), f"{folder}-again"
    load(AutoModelForCausalLM, folder).save_pretrained(again)
    results[folder] = {"config": config.to_dict(), "first": first, "again": outputs(again)}
for folder in Path("bundled.txt").read_text().splitlines():
    results[folder] = load(AutoModelForCausalLM, folder).generate(prompts)
assert sys.modules["modeling_yan"] is None
torch.save(results, "results.pt")
"""


@pytest.fixture
def model(make_model) -> YanForFlowGeneration:
    return make_model(initializer_range=0.3, num_flow_steps=2)


@pytest.fixture
def prompts() -> torch.LongTensor:
    return torch.randint(4, 64, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The saved model."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fields(config: dict) -> dict:
    """Without the path that it was loaded from."""
    return {name: value for name, value in config.items() if name != "_name_or_path"}


def same_weights(first, second) -> bool:
    weights, others = first.state_dict(), second.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@torch.no_grad()
def outputs(path, prompts) -> dict[str, torch.Tensor]:
    """What the script without the package computes, computed by the package."""
    writer = YanForFlowGeneration.from_pretrained(path)
    return {
        "latents": YanModel.from_pretrained(path)(prompts).last_hidden_state,
        "restored": YanForAutoencoding.from_pretrained(path)(prompts).logits,
        "logits": writer(prompts).logits,
        "loss": writer(prompts, labels=prompts.flip(1)).loss,
        "text": writer.generate(prompts, max_new_tokens=20),
        "sampled": writer.generate(prompts, do_sample=True, seed=3, num_return_sequences=2),
    }


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """Folder in which a process without the package has loaded, saved and loaded a model of each variant."""
    root = tmp_path_factory.mktemp("elsewhere")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1}
    sizes |= {"num_flow_layers": 1, "max_position_embeddings": 48, "canvas_length": 8, "initializer_range": 0.3}
    for variant, folder in FOLDERS.items():
        torch.manual_seed(0)
        config = YanConfig(**sizes, encoder_mixer=variant, flow_mixer=variant)
        YanForFlowGeneration(config).save_pretrained(root / folder)
    torch.save(torch.randint(4, 64, (3, 7)), root / "prompts.pt")
    (root / "bundled.txt").write_text("\n".join(map(str, BUNDLED)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *FOLDERS.values()]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return root


@pytest.mark.slow
def test_a_process_without_the_package_computes_the_same(elsewhere, variant):
    folder = FOLDERS[variant]
    result = torch.load(elsewhere / "results.pt")[folder]
    assert fields(result["config"]) == fields(YanConfig.from_pretrained(elsewhere / folder).to_dict())
    expected = outputs(elsewhere / folder, torch.load(elsewhere / "prompts.pt"))
    for loaded in ("first", "again"):
        assert result[loaded].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result[loaded][name], value, rtol=0, atol=1e-6, msg=f"{loaded} {name}")


def test_what_remote_code_saves_is_a_checkpoint_of_the_package(elsewhere, variant):
    first, again = elsewhere / FOLDERS[variant], elsewhere / f"{FOLDERS[variant]}-again"
    assert {path.name for path in again.glob("*.py")} == FLAT_MODULES
    assert same_weights(*(YanForFlowGeneration.from_pretrained(path) for path in (first, again)))


@pytest.mark.parametrize("checkpoint", BUNDLED, ids=lambda path: path.name)
def test_a_bundled_checkpoint_carries_the_code_of_the_package(elsewhere, checkpoint):
    """By links to it: `ln -s ../../../modeling_yan/NAME_yan.py` in the folder, for every module of the model."""
    for name in FLAT_MODULES:
        assert (checkpoint / name).read_text() == (PACKAGE / name).read_text()
    assert {path.name for path in checkpoint.glob("*.py")} == FLAT_MODULES
    prompts = torch.load(elsewhere / "prompts.pt")
    expected = YanForFlowGeneration.from_pretrained(checkpoint).generate(prompts)
    assert torch.equal(torch.load(elsewhere / "results.pt")[str(checkpoint)], expected)


def test_with_the_package_nothing_remote_is_trusted(folder, prompts):
    assert type(AutoConfig.from_pretrained(folder)) is YanConfig
    for auto_class, model_class in AUTO_CLASSES.items():
        assert type(auto_class.from_pretrained(folder)) is model_class
    writer = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(writer.generate(prompts), YanForFlowGeneration.from_pretrained(folder).generate(prompts))


@pytest.mark.parametrize("model_class", AUTO_CLASSES.values())
def test_every_class_saves_the_code_of_all(make_model, model_class, tmp_path):
    model = make_model(model_class)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == FLAT_MODULES
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
    assert same_weights(model, model_class.from_pretrained(tmp_path))


def test_a_round_trip_keeps_weights_config_and_text(model, folder, prompts):
    loaded = YanForFlowGeneration.from_pretrained(folder)
    assert same_weights(model, loaded)
    assert fields(loaded.config.to_dict()) == fields(model.config.to_dict())
    assert not loaded.training
    assert torch.equal(loaded.generate(prompts), model.generate(prompts))
    assert type(loaded.generation_config) is YanGenerationConfig


def test_tied_embeddings_are_saved_once_and_stay_tied(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in saved) + ("model.embeddings.word_embeddings.weight" in saved) == 1
    loaded = YanForFlowGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.word_embeddings.weight
    assert same_weights(model, loaded)


def test_half_precision_weights_stay_as_they_are(model, prompts, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = YanForFlowGeneration.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert same_weights(model, loaded)
    assert torch.equal(loaded.generate(prompts), model.generate(prompts))
    full = YanForFlowGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}


# in which every part takes part
WHOLE = {
    "expert_scope": "sequence",
    "train_expert_choice": "posterior",
    "crf_rank": 4,
    "crf_candidates": 64,
}
WHOLE |= {"num_answer_slots": 8, "copy_prompt_to_slots": True, "attention_conv_kernel": 3}


@pytest.mark.slow
@pytest.mark.parametrize("options", [WHOLE, {"share_expert_head": True}], ids=["all parts", "one head"])
@pytest.mark.parametrize("part", ["model", "all"])
def test_weights_on_a_disk_are_read_in_the_call_of_their_own_module(make_model, prompts, tmp_path, part, options):
    make_model(initializer_range=0.3, num_flow_steps=2, **options).save_pretrained(tmp_path)
    plain = YanForFlowGeneration.from_pretrained(tmp_path)
    places = {name: "disk" if part in (name, "all") else "cpu" for name, _ in plain.named_children()}
    model = YanForFlowGeneration.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    if part != "all":
        assert {weight.is_meta for weight in getattr(model, part).parameters()} == {True}
    for write in (
        lambda model: model.generate(prompts, max_new_tokens=20),
        lambda model: model.generate(do_sample=True, seed=1, expert_choice="mixture"),
        lambda model: model(prompts).logits,
        lambda model: model(prompts, labels=prompts.flip(1)).loss,
    ):
        torch.testing.assert_close(write(model), write(plain), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_in_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same_weights(model, YanForFlowGeneration.from_pretrained(tmp_path))


def test_stage_one_loads_into_stage_two_with_a_fresh_flow(make_model, tmp_path):
    first = make_model(YanForAutoencoding)
    first.save_pretrained(tmp_path)
    second, info = YanForFlowGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(name.startswith("flow.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    weights = second.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in first.state_dict().items())
    fresh = make_model(YanForFlowGeneration).flow.state_dict()
    for name, value in second.flow.state_dict().items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(value.norm(), fresh[name].norm(), rtol=0.3, atol=0, msg=name)


def test_stage_two_gives_its_encoder_back(model, folder):
    encoder, info = YanModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert same_weights(encoder, model.model)
