"""How a model is served, whatever the engine, and what every engine needs of it."""

from dataclasses import dataclass

from .requests import Limits, RequestReader
from .writing import BatchWriter


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Args:
        model: Folder or hub name. name: What clients call it; the same if None.
        device, threads: Of a replica; threads of torch on a CPU, torch's choice if None.
        replicas: Processes with a model each; on GPUs for each of them.
        batch_size: Most requests that are answered together. batch_wait_s: How long the first waits for others.
        max_queue: Requests that may be open before others get the status 429.
        max_body: Bytes of a request. timeout_s: Seconds until a request gets the status 504.
        api_key: Bearer token that every request needs, except to /health and /load_model; none if None.
    """

    model: str
    name: str | None = None
    device: str = "auto"
    threads: int | None = None
    replicas: int = 1
    batch_size: int = 32
    batch_wait_s: float = 0.005
    max_queue: int = 256
    max_body: int = 2**20
    timeout_s: float = 60.0
    api_key: str | None = None
    max_new_tokens: int = 1024
    max_prompt_tokens: int | None = None


def make_reader(settings: Settings) -> RequestReader:
    """What reads requests for the model.

    Raises:
        ValueError: No such model, or one without weights or a tokenizer.
    """
    from transformers import GenerationConfig

    from ..commands.loading import load_any_config, load_tokenizer, prepare_library
    from ..training.models import has_weights

    prepare_library(is_quiet=True)
    config, tokenizer = load_any_config(settings.model), load_tokenizer(settings.model)
    if not has_weights(config.name_or_path):
        raise ValueError(f"MODEL={settings.model!r}: must hold weights, and there are none")
    is_yan = config.model_type == "yan"
    longest = config.max_prompt_length if is_yan else config.max_position_embeddings - settings.max_new_tokens
    try:
        new_tokens = GenerationConfig.from_pretrained(config.name_or_path).max_new_tokens  # an adapter has its base's
    except OSError:  # a folder without generation_config.json has the model's defaults
        new_tokens = None
    limits = Limits(min(settings.max_prompt_tokens or longest, longest), settings.max_new_tokens)
    return RequestReader(tokenizer, limits, new_tokens or (config.canvas_length if is_yan else 20), is_yan)


def make_writer(settings: Settings, device: str) -> BatchWriter:
    """What answers batches: the model, loaded in the process of a replica.

    Raises:
        ValueError: No such model, or one that lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..commands.loading import load_any_config, load_model, load_tokenizer, prepare_library

    prepare_library(is_quiet=True)
    torch.seed()  # replicas draw different numbers
    if load_any_config(settings.model).model_type == "yan":
        model = load_model(settings.model, device)  # refuses a folder without the flow's weights
    else:  # such as an autoregressive one to compare with
        model = AutoModelForCausalLM.from_pretrained(settings.model).to(device).eval()  # type: ignore[arg-type]
    return BatchWriter(model, load_tokenizer(settings.model), settings.threads)
