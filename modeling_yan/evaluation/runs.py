"""Running a checkpoint over rows of source and target: YAN, masked diffusion, or any autoregressive model."""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .speed import num_new_tokens

FREE, ORACLE = "free", "oracle"  # whether the model finds the length itself or is told the reference's
SAMPLED, DETERMINISTIC = "sampled", "deterministic"
OWN_OPTIONS = ("do_sample", "temperature", "seed", "max_new_tokens", "canvas_length", "num_flow_steps")  # of a run
FIXED_OPTIONS = {"return_prompt": True, "num_return_sequences": 1, "return_dict_in_generate": False}  # one text each


@dataclass
class Generated:
    """Text and number of new tokens (EOS included) of every row, and the seconds spent inside `generate`."""

    texts: list[str]
    num_tokens: list[int]
    seconds: float


@dataclass
class Run:
    """One way of generating: `length` "free" or "oracle", `decoding` "sampled" or "deterministic", a pass a seed."""

    length: str
    decoding: str
    passes: list[Generated] = field(default_factory=list)


@dataclass(frozen=True)
class RunOptions:
    """How to generate.

    Args:
        max_new_tokens: Most new tokens of a row whose length is free.
        num_flow_steps: YAN's solver steps per canvas; the model's if None.
        num_diffusion_steps: Steps of masked diffusion; the model's if None.
        canvas_length: Tokens that YAN and masked diffusion generate at once where the length is free; the model's if
            None.
        num_seeds: Passes of the sampled runs, with seeds 0, 1, ...
        template: What a source becomes before it is tokenized, with `{source}` in it.
        yan_options: Further options of YAN's `generate`, such as `expert_choice`.

    Raises:
        ValueError: A number below 1, a template without `{source}` or with another field, or a further option that a
            run sets itself.

    Example:

        >>> from modeling_yan.evaluation import RunOptions
        >>> RunOptions(max_new_tokens=32, num_flow_steps=1, yan_options={"expert_choice": "sample"}).num_seeds
        5
    """

    max_new_tokens: int = 64
    num_flow_steps: int | None = None
    num_diffusion_steps: int | None = None
    canvas_length: int | None = None
    num_seeds: int = 5
    batch_size: int = 32
    template: str = "{source}"
    yan_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_seeds", "batch_size", "canvas_length", "num_diffusion_steps"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number}: must be at least 1")
        fields = set(re.findall(r"{(\w+)}", self.template))
        if fields != {"source"}:
            raise ValueError(f"template={self.template!r}: must hold {{source}}, and no other field")
        own = sorted(set(self.yan_options) & set(OWN_OPTIONS))
        if own:
            raise ValueError(f"yan_options: {', '.join(own)} must not be there, a run sets these itself")
        _check_fixed(self.yan_options)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    batch_size: int = 32,
    **options: Any,
) -> list[str]:
    """The new text of `model.generate` for each source, without prompt and special tokens.

    Args:
        model: Any language model that generates.
        sources: N prompts.
        batch_size: Prompts of one call, at least 1.
        options: Options of `generate`; also `seed` and `max_source_length`, in tokens.

    Returns:
        N texts, in the order of `sources`.

    Raises:
        ValueError: An option asks for several texts, or for something else than the texts.

    Example:

        >>> import modeling_yan
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from modeling_yan.evaluation import generate_answers
        >>> folder = "examples/checkpoints/yan-transformer-tiny"
        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> tokenizer = AutoTokenizer.from_pretrained(folder)
        >>> generate_answers(model, tokenizer, ["Who has the hat? Anna took the hat."], num_flow_steps=3)
        ['Anna has the hat.']
    """
    return generate_timed(model, tokenizer, sources, batch_size, **options).texts


@torch.no_grad()
def generate_timed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    batch_size: int = 32,
    seed: Sequence[int] | int | None = None,
    max_source_length: int | None = None,
    **options: Any,
) -> Generated:
    """Generate for each source, and count tokens and seconds.

    Args:
        max_source_length: Sources of more tokens keep their end, as in training.
        seed: For models whose `generate` has a `seed`. Every batch gets its own, made from this and its index: with
            one for all, rows at the same position of different batches would start from the same noise.
    """
    _check_fixed(options)
    result = Generated([], [], 0.0)
    for start in tqdm(range(0, len(sources), batch_size), desc="generating", leave=False):
        batch = _tokenize(tokenizer, sources[start : start + batch_size], max_source_length).to(model.device)
        if seed is not None:
            options["seed"] = _batch_seed(seed, start)
        sequences, seconds = _timed(cast(Any, model).generate, **batch, **options)
        # an encoder-decoder gives back its start token instead of the prompt
        new_tokens = sequences[:, 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1] :]
        result.texts += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        result.num_tokens += num_new_tokens(new_tokens, model.generation_config.eos_token_id)
        result.seconds += seconds
    return result


def _check_fixed(options: dict[str, Any]) -> None:
    for name, allowed in FIXED_OPTIONS.items():
        if options.get(name) not in (None, allowed):
            raise ValueError(f"{name}={options[name]!r}: must be {allowed}, or left out")


def run_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    references: Sequence[str],
    options: RunOptions,
) -> list[Run]:
    """Generate for all sources in every way the model has, each without and with the reference's length.

    YAN runs "sampled", one pass a seed, with `do_sample=True` at temperature 1: a seed chooses the start noise. It
    also runs "deterministic", with `do_sample=False`: one noise for all rows and times, so one pass says everything.
    Every other model runs "deterministic": masked diffusion on one canvas, an autoregressive one greedy, with its
    cache of keys and values if it can have one.

    With "oracle" length a row gets at most as many new tokens as its reference has, without EOS, and the canvas has
    that length too (at most the longest that the model can generate); rows of one length are generated together, so
    its batches are smaller and its speed compares only with other oracle runs.

    Raises:
        ValueError: A prompt that is too long for the model.
    """
    prompts = [options.template.replace("{source}", source) for source in sources]
    lengths = [max(1, len(ids)) for ids in tokenizer(list(references), add_special_tokens=False)["input_ids"]]
    _check_prompts(model, tokenizer, prompts, max(options.max_new_tokens, *lengths))
    generate_timed(model, tokenizer, prompts[: options.batch_size], options.batch_size, max_new_tokens=1)  # warm-up
    runs = []
    for decoding in (SAMPLED, DETERMINISTIC) if is_yan(model) else (DETERMINISTIC,):
        free, oracle = Run(FREE, decoding), Run(ORACLE, decoding)
        for seed in range(options.num_seeds if decoding == SAMPLED else 1):
            settings = _settings(model, options, decoding)
            generate = _generator(model, tokenizer, prompts, options.batch_size, settings, decoding, seed)
            free.passes.append(generate(range(len(prompts)), **_length(model, options)))
            oracle.passes.append(_by_length(model, generate, lengths))
        runs += [free, oracle]
    return runs


def is_yan(model: PreTrainedModel) -> bool:
    """Whether the model is a YAN, also one that was loaded as remote code."""
    return model.config.model_type == "yan"


def is_masked_diffusion(model: PreTrainedModel) -> bool:
    """Whether the model is a `MaskedDiffusion` of `modeling_yan.baselines`."""
    return model.config.model_type == "yan-masked-diffusion"


def load_for_generation(name: str, device: str = "cpu") -> PreTrainedModel:
    """The model of a folder or hub name, of whichever class that generates text it is, in evaluation mode."""
    is_encoder_decoder = AutoConfig.from_pretrained(name).is_encoder_decoder
    auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_pretrained(name).to(device).eval()  # type: ignore[arg-type]


def _settings(model: PreTrainedModel, options: RunOptions, decoding: str) -> dict[str, Any]:
    """Options of `generate` besides lengths and seed."""
    if is_masked_diffusion(model):
        return {"num_diffusion_steps": options.num_diffusion_steps}
    if not is_yan(model):
        has_cache = not getattr(model.config, "attention_conv_kernel", 0)  # baselines with convolutions have none
        return {"do_sample": False, "num_beams": 1, "use_cache": has_cache}
    steps = {} if options.num_flow_steps is None else {"num_flow_steps": options.num_flow_steps}
    noise = {"do_sample": True, "temperature": 1.0} if decoding == SAMPLED else {"do_sample": False}
    return {**options.yan_options, **steps, **noise}


def _length(model: PreTrainedModel, options: RunOptions) -> dict[str, Any]:
    if is_masked_diffusion(model):
        canvas_length = options.canvas_length or model.config.canvas_length
        return {"max_new_tokens": min(options.max_new_tokens, canvas_length)}
    canvas = {"canvas_length": options.canvas_length} if is_yan(model) and options.canvas_length else {}
    return {"max_new_tokens": options.max_new_tokens, **canvas}


def _oracle_length(model: PreTrainedModel, length: int) -> dict[str, Any]:
    if is_masked_diffusion(model):
        return {"max_new_tokens": min(length, model.config.canvas_length)}
    return {"max_new_tokens": length, **({"canvas_length": min(length, _most_tokens(model))} if is_yan(model) else {})}


def _most_tokens(model: PreTrainedModel) -> int:
    """The longest canvas that a YAN can have."""
    config = model.config
    room = [config.max_position_embeddings] + [config.num_answer_slots] * config.refine_draft
    return min(room) // config.vertices_per_token


def _generator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    settings: dict[str, Any],
    decoding: str,
    seed: int,
) -> Callable[..., Generated]:
    """Function from the numbers of rows, and lengths, to what is generated for them."""

    def generate(rows: Iterable[int], **length: Any) -> Generated:
        own_seed: dict[str, Any] = {"seed": (seed, length["max_new_tokens"])} if decoding == SAMPLED else {}
        chosen = [prompts[row] for row in rows]
        return generate_timed(model, tokenizer, chosen, batch_size, **settings, **length, **own_seed)

    return generate


def _by_length(model: PreTrainedModel, generate: Callable[..., Generated], lengths: list[int]) -> Generated:
    """Generate all rows, those of equal reference length together."""
    result = Generated([""] * len(lengths), [0] * len(lengths), 0.0)
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        part = generate(rows, **_oracle_length(model, length))
        for row, text, number in zip(rows, part.texts, part.num_tokens):
            result.texts[row], result.num_tokens[row] = text, number
        result.seconds += part.seconds
    return result


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None
) -> BatchEncoding:
    """Prompts as tensors, padded on the left, where a causal model needs it; YAN takes either side."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    limits = {"truncation": max_length is not None, "max_length": max_length}
    batch = tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt", **limits)
    tokenizer.truncation_side = side
    batch.pop("token_type_ids", None)  # `generate` refuses what the model's forward doesn't take
    return batch


def _check_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None or model.config.is_encoder_decoder:
        return
    if is_masked_diffusion(model):
        max_new_tokens = min(max_new_tokens, model.config.canvas_length)
    room = longest - (getattr(model.config, "num_answer_slots", 0) if is_yan(model) else max_new_tokens)
    for row, ids in enumerate(tokenizer(list(prompts))["input_ids"]):
        if len(ids) > room:
            allowed = f"{room} for this model" + ("" if is_yan(model) else f" with {max_new_tokens} new tokens")
            raise ValueError(f"row {row}: the prompt has {len(ids)} tokens, must be at most {allowed}")


def _batch_seed(seed: Sequence[int] | int, start: int) -> int:
    entropy = [*(seed if isinstance(seed, Sequence) else [seed]), start]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _timed(function: Callable[..., Any], **options: Any) -> tuple[Any, float]:
    _synchronize()
    start = time.perf_counter()
    result = function(**options)
    _synchronize()
    return result, time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
