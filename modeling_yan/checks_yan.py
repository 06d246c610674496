"""Checks of what a caller hands in. Every refusal names the argument, what was found, and what is allowed.

Letters of the shape comments: B batch, S prompt length, D hidden size. Values are looked at on the CPU alone, because
on an accelerator that would wait for the device; shapes and types everywhere.
"""

import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

IGNORE_INDEX = -100
ID_TYPES = (torch.int64, torch.int32)
SWITCHES = ("do_sample", "return_dict_in_generate", "return_prompt", "crf_decoding")
LENGTHS = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0}  # and the least of each
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
OPTION_IDS = ("pad_token_id", "bos_token_id")


def describe(value: Any) -> str:
    """What a value is, in a few words: shape, type and device of a tensor, else its type and itself."""
    if torch.is_tensor(value):
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"a tensor {shape} of {value.dtype} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def check_tensor(
    value: Any, name: str, allowed: str, num_dims: int, types: tuple[torch.dtype, ...] = ID_TYPES
) -> None:
    """Raise ValueError unless it is a plain tensor with these dimensions, none empty but the last of several."""
    is_plain = torch.is_tensor(value) and not value.is_nested and value.layout == torch.strided
    if not (is_plain and value.dtype in types and value.dim() == num_dims and value.shape[0] > 0):
        raise ValueError(f"{name} is {describe(value)}: must be {allowed}")


def check_device(value: torch.Tensor, name: str, model: PreTrainedModel) -> None:
    """Raise ValueError for a tensor without values where the model has some."""
    if value.is_meta and model.device.type != "meta":
        raise ValueError(f"{name} is {describe(value)}: must be on {model.device}, as the model")


def can_look_at(value: torch.Tensor) -> bool:
    """Whether the values of a tensor may be looked at here: not on an accelerator, and not where code is traced."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(low: int, high: int, size: int, name: str = "token ids", field: str = "vocab_size") -> None:
    """Raise ValueError unless the ids from `low` to `high` are in [0, size)."""
    if low < 0 or high >= size:
        raise ValueError(f"{name} from {low} to {high}: must be in [0, {field}={size})")


def check_ids(ids: Any, config: PreTrainedConfig, name: str = "input_ids") -> None:
    """Raise ValueError unless these are token ids (B, S) of the config's vocabulary."""
    check_tensor(ids, name, "a tensor of integers (B, S), int64 or int32, B at least 1", 2)
    if can_look_at(ids) and ids.numel():
        low, high = torch.stack(ids.aminmax()).tolist()
        check_range(low, high, config.vocab_size, f"{name}: token ids")


def check_mask(mask: Any, shape: Sequence[int]) -> None:
    """Raise ValueError unless it is an attention mask (B, S) of this shape, of 1 and 0 or of True and False."""
    allowed = f"a tensor {tuple(shape)} as the input, of 1 and 0"
    if not torch.is_tensor(mask) or mask.is_complex() or mask.is_nested or tuple(mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask is {describe(mask)}: must be {allowed}")
    if mask.dtype != torch.bool and can_look_at(mask):
        is_wrong = (mask != 0) & (mask != 1)
        if is_wrong.any():
            raise ValueError(f"attention_mask has the value {mask[is_wrong][0].item()}: must be {allowed}")


def check_positions(position_ids: Any, shape: Sequence[int], config: PreTrainedConfig) -> None:
    """Raise ValueError unless these are positions (B, S), or (1, S) for all rows, with embeddings in the model."""
    allowed = f"a tensor {tuple(shape)} or {(1, shape[1])} of integers"
    check_tensor(position_ids, "position_ids", allowed, 2)
    if position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
        raise ValueError(f"position_ids is {describe(position_ids)}: must be {allowed}")
    if can_look_at(position_ids):
        low, high = torch.stack(position_ids.aminmax()).tolist()
        check_range(low, high, config.max_position_embeddings, "position_ids", "max_position_embeddings")


def check_embeddings(inputs_embeds: Any, config: PreTrainedConfig) -> None:
    """Raise ValueError unless these are embeddings (B, S, D) of the config's width."""
    width, types = config.encoder_hidden_size, (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    allowed = f"a floating-point tensor (B, S, hidden_size={width}), B at least 1"
    check_tensor(inputs_embeds, "inputs_embeds", allowed, 3, types)
    if inputs_embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds is {describe(inputs_embeds)}: must be {allowed}")


def check_labels(labels: Any, model: PreTrainedModel, num_rows: int) -> torch.Tensor:
    """The labels (B, L) as int64. Raise ValueError unless they are ids of the vocabulary or -100, for each row."""
    check_tensor(labels, "labels", "a tensor of integers (B, L), int64 or int32, B at least 1", 2)
    check_device(labels, "labels", model)
    if len(labels) != num_rows:
        raise ValueError(f"labels is {describe(labels)}: must have {num_rows} rows as the input")
    if can_look_at(labels) and labels.numel():
        low, high = torch.stack(labels.masked_fill(labels == IGNORE_INDEX, 0).aminmax()).tolist()
        size = model.config.vocab_size
        if low < 0 or high >= size:
            allowed = f"[0, vocab_size={size}) or {IGNORE_INDEX}"
            raise ValueError(f"labels from {low} to {high}: must be in {allowed}")
    return labels.long()


def is_integer(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number of at least `least`, and no truth value; symbols of `torch.export` are."""
    is_whole = isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)
    return is_whole and value >= least


def check_helpers(generation_config: Any, streamer: Any, generator: Any) -> None:
    """Raise TypeError for an object that `generate` could not use, before anything is computed."""
    for name, value, is_right, allowed in (
        (
            "generation_config",
            generation_config,
            isinstance(generation_config, GenerationConfig),
            "a GenerationConfig",
        ),
        ("generator", generator, isinstance(generator, torch.Generator), "a torch.Generator"),
        ("streamer", streamer, hasattr(streamer, "put") and hasattr(streamer, "end"), "a streamer with put and end"),
    ):
        if value is not None and not is_right:
            raise TypeError(f"{name} is {describe(value)}: must be {allowed}")


def check_options(options: dict[str, Any], vocab_size: int) -> None:
    """Raise ValueError for a switch, a length or a token id of `generate` that is not allowed."""
    for name in SWITCHES:
        _require(options, name, lambda value: isinstance(value, bool), "True or False")
    for name, least in LENGTHS.items():
        _require(options, name, partial(is_integer, least=least), f"an integer of at least {least}")
    vocabulary = f"[0, vocab_size={vocab_size})"
    for name in OPTION_IDS:
        _require(options, name, lambda value: _is_id(value, vocab_size), f"an integer in {vocabulary}")
    for name in ("eos_token_id", "suppress_tokens"):
        _require(
            options, name, lambda value: _are_ids(value, vocab_size), f"one or a list of integers in {vocabulary}"
        )
    suppressed, is_long = options.get("suppress_tokens"), options.get("min_new_tokens") or options.get("min_length")
    forbidden = {*_as_list(suppressed), *(_as_list(options.get("eos_token_id")) if is_long else ())}
    if len(forbidden) == vocab_size:
        raise ValueError(f"suppress_tokens={describe(suppressed)}: must leave a token to generate")


def _require(options: dict[str, Any], name: str, is_allowed: Callable[[Any], bool], allowed: str) -> None:
    value = options.get(name)
    if value is not None and not is_allowed(value):
        raise ValueError(f"{name}={reprlib.repr(value)}: must be {allowed}")


def _is_id(value: Any, vocab_size: int) -> bool:
    value = value.tolist() if torch.is_tensor(value) else value  # transformers makes tensors of them, too
    return is_integer(value) and value < vocab_size


def _as_list(value: Any) -> list[Any]:
    value = value.tolist() if torch.is_tensor(value) else value
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _are_ids(value: Any, vocab_size: int) -> bool:
    return all(_is_id(token, vocab_size) for token in _as_list(value))


def not_finite_weights(model: torch.nn.Module) -> str:
    """Which weights hold NaN or infinity, for a message; empty if none does."""
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    weights = [(name, weight) for name, weight in weights if type(weight) is torch.nn.Parameter]  # no quantized ones
    names = [name for name, weight in weights if not weight.is_meta and not weight.isfinite().all()]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"NaN or infinity in {', '.join(names[:3])}{more}" if names else ""


def check_length(config: PreTrainedConfig, length: int, name: str, num_slots: int = 0) -> None:
    """Raise ValueError unless the model has positions for this many tokens, after its answer slots."""
    longest = config.max_position_embeddings
    if not (is_integer(length, 1) and length <= longest - num_slots):
        allowed = f"max_position_embeddings={longest}" + (f" - num_answer_slots={num_slots}" if num_slots else "")
        raise ValueError(f"{name} has {length} tokens: must be 1 to {allowed}")


def check_canvas(config: PreTrainedConfig, length: int) -> None:
    """Raise ValueError unless the model has positions for all vertices of a canvas of this many tokens."""
    check_length(config, length, "the canvas")
    longest, per_token = config.max_position_embeddings, config.vertices_per_token
    if length * per_token > longest:
        allowed = f"1 to max_position_embeddings={longest} / vertices_per_token={per_token}"
        raise ValueError(f"the canvas has {length} tokens: must be {allowed}")


def check_prompt(
    model: PreTrainedModel,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    num_slots: int = 0,
) -> torch.Tensor:
    """The ids or embeddings that are the prompt. Raise ValueError if it is none, before anything is computed."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if inputs_embeds is None:
        check_ids(input_ids, model.config)
    else:
        check_embeddings(inputs_embeds, model.config)
    given, name = (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
    check_device(given, name, model)
    shape = given.shape[:2]
    check_length(model.config, shape[1], "the input", num_slots)
    if attention_mask is not None:
        check_mask(attention_mask, shape)
        check_device(attention_mask, "attention_mask", model)
    if position_ids is not None:
        check_positions(position_ids, shape, model.config)
    return given


def check_refinement(name: Any, config: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Raise ValueError where a trained flow gets the other `refine_draft`: its heads would predict something else.

    Args:
        name: Folder or hub name that was loaded. config: Of the loaded model. options: Of `from_pretrained`.
    """
    if name is None or not {"config", "refine_draft"} & set(options):
        return
    hub_options = {option: options[option] for option in HUB_OPTIONS if option in options}
    saved, _ = PreTrainedConfig.get_config_dict(name, **hub_options)
    has_flow = "YanForFlowGeneration" in (saved.get("architectures") or ())
    trained_with = saved.get("refine_draft", False)
    if has_flow and trained_with != config.refine_draft:
        raise ValueError(
            f"refine_draft={config.refine_draft}: must be {trained_with}, with which the flow of {name} was trained"
        )
