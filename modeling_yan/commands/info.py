"""`yan info`: what a checkpoint is."""

import argparse
import json
import platform
from typing import TYPE_CHECKING, Any

from .loading import load_config, prepare_library
from .parsing import Commands, add_command, add_model

if TYPE_CHECKING:
    from ..configuration_yan import YanConfig


EXAMPLES = """  yan info MODEL
  yan info MODEL --json"""
PROMPT_LINE = "Prompts:"  # begins the paragraph of a model card that is about them


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(commands, "info", info, "Show sizes, prompt form, licence and versions.", EXAMPLES)
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def info(options: argparse.Namespace) -> None:
    """Print what is known of a checkpoint; its weights are not read."""
    prepare_library(is_quiet=not options.debug)
    facts = {"model": options.model, **_facts(load_config(options.model)), **_words(options.model)}
    if options.json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for name, value in facts.items():
        lines = [f"{key} {entry}" for key, entry in value.items()] if isinstance(value, dict) else [str(value)]
        print(f"{name:16} {', '.join(lines)}")


def _facts(config: "YanConfig") -> dict[str, Any]:
    """Sizes and versions."""
    import torch
    import transformers

    from .. import __version__, registration

    with torch.device("meta"):  # shapes alone
        model = registration.YanForFlowGeneration(config)
    parts = {
        "embeddings": model.model.embeddings,
        "encoder": model.model,
        "flow": model.flow,
        "decoder": model.decoder,
    }
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    counts["encoder"] -= counts["embeddings"]
    number = config.num_vertices(config.canvas_length)
    vertices = f", {number} vertices" if config.vertices_per_token > 1 else ""
    return {
        "architecture": ", ".join(config.architectures or ["unknown"]),
        "parameters": {"all": model.num_parameters(), **counts},
        "mixers": {"encoder": config.encoder_mixer, "flow": config.flow_mixer},
        "layers": {name: getattr(config, f"num_{name}_layers") for name in ("encoder", "flow", "decoder")},
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "experts": config.num_experts,
        "longest prompt": f"{config.max_prompt_length} tokens",
        "canvas": f"{config.canvas_length} tokens in {config.num_flow_steps} steps{vertices}",
        "answer slots": config.num_answer_slots,
        "versions": {
            "modeling-yan": __version__,
            "transformers": f"{transformers.__version__} (written by {config.transformers_version})",
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
    }


def _words(name: str) -> dict[str, Any]:
    """What the model card says of prompts and licence."""
    from huggingface_hub import ModelCard
    from transformers.utils import cached_file

    path = cached_file(name, "README.md", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {"licence": "unknown, there is no model card"}
    card = ModelCard.load(path)
    prompts = [part for part in card.text.split("\n\n") if part.startswith(PROMPT_LINE)]
    form = {"prompt form": " ".join(prompts[0].removeprefix(PROMPT_LINE).split())} if prompts else {}
    return {**form, "licence": card.data.license or "not named in the model card"}
