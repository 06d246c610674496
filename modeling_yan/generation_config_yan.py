"""Options of generation: what they are, what a model can honour of them, and what is refused."""

import math
import reprlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils import logging

from .canvas_yan import YanCanvasMixin
from .checks_yan import check_canvas, check_options
from .clients_yan import open_options
from .decoding_yan import EOS_STRATEGIES
from .experts_yan import EXPERT_CHOICES
from .fields_yan import drop_removed

logger = logging.get_logger(__name__)
FLOW_FIELDS = (
    "num_flow_steps",
    "expert_choice",
    "canvas_length",
    "eos_strategy",
    "crf_decoding",
    "seed",
    "return_prompt",
)
RENAMED = {"end_choice": "eos_strategy", "use_transitions": "crf_decoding"}  # names of 0.1 and 0.2
HINTS = {  # of what generate does not take
    "token_type_ids": "prepare_tokenizer leaves them out",
    "inputs_embeds": "it takes token ids alone; forward takes embeddings",
}
OLD_OPTIONS = {*RENAMED, "compile_generation", "solver"}  # that a call may still have
IGNORED_KWARGS = ("labels", "use_cache", "synced_gpus")  # Seq2SeqTrainer hands them in
STOCK_FIELDS = frozenset(vars(GenerationConfig()))
PROMPT_ARGUMENTS = ("input_ids", "attention_mask")
SIMPLE_TYPES = (int, float, str, type(None), CompileConfig)
# that options depend on
OPTION_FIELDS = (
    *("canvas_length", "num_flow_steps", "max_position_embeddings", "num_answer_slots", "vocab_size"),
    *("num_experts", "expert_scope", "train_expert_choice"),
)
# of transformers, that generate acts upon
HONOURED_OPTIONS = (
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "suppress_tokens"),
    *("do_sample", "temperature", "num_return_sequences", "length_penalty", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "compile_config", "disable_compile"),
)
NOT_OF_THE_TEXT = ("use_cache", "transformers_version")  # set everywhere, and of no influence on what is generated
# what stock generate takes besides the fields of its config
STOCK_ARGUMENTS = (
    *("logits_processor", "prefix_allowed_tokens_fn", "assistant_model", "assistant_tokenizer", "custom_generate"),
    *("negative_prompt_ids", "negative_prompt_attention_mask"),
)
# All other fields of a config are refused, also those of a transformers that comes later, unless they are switched
# off: None, False, nothing, or one of these values.
NEUTRAL_VALUES = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "top_p", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
}


class YanGenerationConfig(GenerationConfig):
    """Generation options of YAN, and those of `GenerationConfig` that a non-autoregressive model can honour.

    Honoured: `max_new_tokens`, `max_length`, `min_new_tokens`, `min_length`, `max_time` (in seconds, after which no
    further canvas begins), `stop_strings` (with a `tokenizer`), `do_sample`, `temperature`, `num_return_sequences`,
    `suppress_tokens`, `eos_token_id`, `pad_token_id`, `bos_token_id`, `return_dict_in_generate`, and those below.
    `use_cache` changes nothing. All other options raise an error in `generate`.

    Args:
        num_flow_steps: Euler steps N per canvas, at least 0; `config.num_flow_steps` if None. Each step is a pass
            through the flow's trunk. 0 decodes the encoder's draft in the answer slots (`num_answer_slots`) without
            the flow.
        expert_choice: How each token's expert is chosen at t = 0. "argmax" takes the most probable expert of the gate;
            with `expert_scope="sequence"`, the expert of the most probable text. "sample" draws from the gate.
            "mixture" weights all experts by the gate. "ranked" gives sequence r of a prompt its r-th most probable
            expert. It works without `do_sample`, with `num_return_sequences` of at most `num_experts`. Pass
            `num_return_sequences` to `generate` then. If None, "argmax"; with `do_sample` and
            `train_expert_choice="posterior"`, "sample".
        canvas_length: Tokens generated at once, at least 1; `config.canvas_length` if None.
        eos_strategy: Where a text ends; "likeliest" if None. "likeliest" takes the length with the highest joint
            probability of the tokens and of the EOS in all positions after them. With a CRF and
            `train_expert_choice="posterior"`, `length_penalty` ranks the lengths. "first" takes the first EOS of
            tokens that are decoded independently of the end. It has no effect on a graph (`vertices_per_token`), whose
            path ends at EOS or after `canvas_length` tokens.
        crf_decoding: Whether the CRF of a model with `crf_rank` decodes a canvas; True if None. If False, every token
            is decoded independently.
        seed: Seed of everything that is drawn, an integer. If None, it is drawn from the global random state with
            `do_sample`. Without `do_sample` it is 0, and all rows start from the same noise.
        return_prompt: Whether the sequences begin with the prompt. If None, they do, except for Seq2SeqTrainer, which
            compares them with the labels. `max_length` and `min_length` count the returned tokens. It is never saved,
            because a pipeline removes the prompt itself.
        compile_config: With a `CompileConfig` of transformers, generation is one program of `torch.compile`. On a GPU
            it is recorded as a CUDA graph. The first call for a batch size, a canvas length and each 64 tokens of
            prompt compiles, for a minute or more. `CompileConfig(backend="eager")` records without the compiler, in
            seconds. `disable_compile` switches it off. It is never saved.
        temperature: Used with `do_sample`; at least 0, 1 if None. It multiplies the start noise, and divides the
            log-probabilities of drawn experts and tokens. With `expert_scope="sequence"` and a CRF or a graph, a low
            temperature also favours experts with a more probable best text.
        length_penalty: The best text has the highest log-probability divided by its length to this power; 1 if None.
            It needs `train_expert_choice="posterior"`, and a CRF, a graph, or `expert_scope="sequence"`. Without a
            graph it also needs `eos_strategy="likeliest"`. It has no effect with `do_sample`.

    Example:

        >>> from modeling_yan import YanGenerationConfig
        >>> options = YanGenerationConfig(num_flow_steps=2, max_new_tokens=16)
        >>> options.num_flow_steps, options.seed  # what is left open is up to the model
        (2, None)
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs = with_new_names(kwargs)
        for name in FLOW_FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compile_generation":
            name, value = "compile_config", CompileConfig() if value else None
        super().__setattr__(RENAMED.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        """Options by their old names; nothing else comes here but what is missing."""
        if name in RENAMED and RENAMED[name] in vars(self):
            return getattr(self, RENAMED[name])
        if name == "compile_generation":
            return self.compile_config is not None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def for_model(cls, config: PreTrainedConfig) -> "YanGenerationConfig":
        """The default options of a fresh model: deterministic, one canvas, and nothing left to a pipeline's taste."""
        token_ids = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return cls(do_sample=False, temperature=1.0, max_new_tokens=config.canvas_length, **token_ids)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, without `return_prompt`."""
        saved = deepcopy(self)
        saved.return_prompt = None
        super(YanGenerationConfig, saved).save_pretrained(*args, **kwargs)

    def validate(self, strict: bool = False, *args: Any, **kwargs: Any) -> None:
        """Check every field; raises ValueError with the field, its value and what is allowed."""
        penalty, self.length_penalty = self.length_penalty, None  # transformers knows it of beams alone
        try:
            super().validate(strict, *args, **kwargs)
        finally:
            self.length_penalty = penalty
        _check_flow_fields(self)


def with_new_names(options: dict[str, Any]) -> dict[str, Any]:
    """Options with today's names. A new name wins over the old one where both are given.

    Old names are deprecated: one that asks for something is warned of.

    Raises:
        ValueError: An option that is gone has a value with which the model would generate something else.
    """
    options = dict(options)
    drop_removed(options)
    compiles = options.pop("compile_generation", None)
    if compiles:
        logger.warning_once("compile_generation=True: deprecated, give a compile_config=CompileConfig().")
        options["compile_config"] = options.get("compile_config") or CompileConfig()
    elif compiles is not None:
        options["compile_config"] = None
    for old in [old for old in RENAMED if options.get(old) is not None]:
        logger.warning_once(f"{old}={options[old]!r}: the option is now called {RENAMED[old]}, use this name.")
    known = {name: value for name, value in options.items() if name not in RENAMED}
    return {new: options[old] for old, new in RENAMED.items() if old in options} | known


def _check_flow_fields(options: GenerationConfig) -> None:
    for name, is_allowed, allowed in _FIELD_RULES:
        value = getattr(options, name, None)
        if value is not None and not is_allowed(value):
            raise ValueError(f"{name}={value!r}: must be {allowed}")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _are_strings(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, (list, tuple)) and all(isinstance(string, str) and string for string in strings)


_FIELD_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "num_flow_steps",
        lambda value: value is not False and (value == 0 or _is_positive_int(value)),
        "an integer of at least 0",
    ),
    ("canvas_length", _is_positive_int, "an integer of at least 1"),
    ("expert_choice", lambda value: value in tuple(EXPERT_CHOICES), f"one of {', '.join(EXPERT_CHOICES)}"),
    ("eos_strategy", lambda value: value in tuple(EOS_STRATEGIES), f"one of {', '.join(EOS_STRATEGIES)}"),
    ("crf_decoding", lambda value: isinstance(value, bool), "True or False"),
    ("seed", lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer"),
    ("length_penalty", lambda value: _is_number(value) and math.isfinite(value), "a finite number"),
    ("temperature", lambda value: _is_number(value) and 0 <= value < math.inf, "a finite number of at least 0"),
    ("max_time", lambda value: _is_number(value) and value >= 0, "a number of seconds, at least 0"),
    ("stop_strings", lambda value: _are_strings(value), "a string or a list of strings, none of them empty"),
)


class YanOptionsMixin(YanCanvasMixin, GenerationMixin):
    """Which options a call of `generate` has, checked for this model."""

    _last_call = None  # what it asked for, and the options that came of it

    def _options_of_call(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[YanGenerationConfig, list[dict[str, Any]], dict[str, Any]]:
        """Options, who asked for what (as `length_limits` wants it), and the prompt among the keywords.

        A call that asks for what the last one did gets its options without work: it would take longer than a solver
        step of a GPU.
        """
        prompt = {name: kwargs.pop(name) for name in PROMPT_ARGUMENTS if name in kwargs}
        if old := {name: kwargs[name] for name in OLD_OPTIONS if name in kwargs}:
            others = {name: value for name, value in kwargs.items() if name not in old}
            kwargs = with_new_names(old) | others
        keywords = [(name, type(value), value) for name, value in kwargs.items()]  # True is not 1 here
        call = keywords, [getattr(self.config, name) for name in OPTION_FIELDS], vars(self.generation_config)
        is_simple = generation_config is None and all(isinstance(value, SIMPLE_TYPES) for value in kwargs.values())
        last = self._last_call  # once: another thread may replace it at any time
        if not (is_simple and last and last[0] == call):
            configs = [config for config in (generation_config, self.generation_config) if config is not None]
            asked = [kwargs, *(config.to_diff_dict() for config in configs)]
            _refuse_other_options({*vars(self.config), *vars(self.config.objective)}, *asked)
            self.open_options = open_options(self.generation_config)
            options = self._resolve_options(generation_config, kwargs)
            self._last_call = (deepcopy(call), options, asked) if is_simple else None
        else:
            _, options, asked = last
        return options, asked, prompt

    def _resolve_options(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> YanGenerationConfig:
        """Keyword, then passed config, then the model's config, then the defaults."""
        check_options(kwargs, self.config.vocab_size)  # transformers would not say which one it can't compare
        if isinstance(kwargs.get("suppress_tokens"), int):
            kwargs = {**kwargs, "suppress_tokens": [kwargs["suppress_tokens"]]}
        # without beams, transformers would refuse several sequences, and warn of a length penalty
        of_beams = {name: kwargs[name] for name in ("num_return_sequences", "length_penalty") if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in of_beams}
        prepared = self._prepare_generation_config(generation_config, **others)  # type: ignore[misc]
        # a config of transformers' own class gets our fields below
        options, model_kwargs = cast(tuple[YanGenerationConfig, dict[str, Any]], prepared)
        vars(options).update({name: value for name, value in of_beams.items() if value is not None})
        defaults = {
            "num_flow_steps": self.config.num_flow_steps,
            "expert_choice": self._default_expert_choice(options),
            "canvas_length": self.config.canvas_length,
            "eos_strategy": "likeliest",
            "crf_decoding": True,
            "return_prompt": "synced_gpus" not in model_kwargs,
            "max_new_tokens": self.config.canvas_length,
            "temperature": 1.0,
        }
        for name in (*FLOW_FIELDS, "max_new_tokens", "temperature"):
            value = model_kwargs.pop(name, getattr(options, name, None))
            setattr(options, name, defaults.get(name) if value is None else value)
        _check_flow_fields(options)
        check_options(vars(options), self.config.vocab_size)
        check_canvas(self.config, options.canvas_length)
        self._check_num_sequences(options)
        self._check_fit(options)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in IGNORED_KWARGS}
        if model_kwargs:
            hints = [hint for name, hint in HINTS.items() if name in model_kwargs]
            raise ValueError(": ".join([f"generate has no argument {', '.join(model_kwargs)}", *hints]))
        return options

    def _default_expert_choice(self, options: YanGenerationConfig) -> str:
        """Experts that were trained as a distribution are drawn from it where anything is drawn."""
        return "sample" if options.do_sample and self.config.train_expert_choice == "posterior" else "argmax"

    def _check_fit(self, options: YanGenerationConfig) -> None:
        """Raise ValueError for an option that this model can't honour."""
        self._check_draft(options.canvas_length, options.num_flow_steps)
        if options.length_penalty not in (None, 1):
            self._check_length_penalty(options)

    def _check_length_penalty(self, options: YanGenerationConfig) -> None:
        config, penalty = self.config, f"length_penalty={options.length_penalty}: must be 1 without"
        if config.train_expert_choice != "posterior":
            raise ValueError(f"{penalty} train_expert_choice='posterior'")
        has_experts = config.num_experts > 1 and config.expert_scope == "sequence"
        if not (has_experts or self.graph is not None or (self.transitions is not None and options.crf_decoding)):
            raise ValueError(f"{penalty} a CRF, a graph, or experts with expert_scope='sequence'")
        if options.eos_strategy == "first" and self.graph is None:  # which fills the canvas, whatever its length
            raise ValueError(f"{penalty} eos_strategy='likeliest', found 'first'")

    def _check_num_sequences(self, options: YanGenerationConfig) -> None:
        number, is_ranked = options.num_return_sequences, options.expert_choice == "ranked"
        if not _is_positive_int(number):
            raise ValueError(f"num_return_sequences={number!r}: must be an integer of at least 1")
        if is_ranked and number > self.config.num_experts:
            allowed = f'at most num_experts={self.config.num_experts} with expert_choice="ranked"'
            raise ValueError(f"num_return_sequences={number}: must be {allowed}")
        if number > 1 and not (options.do_sample or is_ranked):
            allowed = '1 unless do_sample=True or expert_choice="ranked"'
            raise ValueError(f"num_return_sequences={number}: must be {allowed}")


def _refuse_other_options(model_fields: set[str], kwargs: dict[str, Any], *configs: dict[str, Any]) -> None:
    """Raise ValueError if a keyword or a config asks for what is not honoured; drop the keywords that ask for nothing.

    Keywords that transformers does not know either are left to the caller.
    """
    keywords = {name: value for name, value in kwargs.items() if name in STOCK_FIELDS or name in STOCK_ARGUMENTS}
    defaults = GenerationConfig._get_default_generation_params()  # a config may be filled up with them; nobody asked
    chosen = [{name: value for name, value in config.items() if value != defaults.get(name)} for config in configs]
    # from_pretrained hands fields of the model's config to that of generation, too
    known = {*FLOW_FIELDS, *HONOURED_OPTIONS, *NOT_OF_THE_TEXT, *(model_fields - STOCK_FIELDS)}
    for options in (keywords, *chosen):
        others = {name: value for name, value in options.items() if name not in known and not name.startswith("_")}
        asked = [f"{name}={reprlib.repr(value)}" for name, value in others.items() if not _is_off(name, value)]
        if asked:
            raise ValueError(f"{', '.join(asked)}: no option of YAN, which generates all tokens of a canvas at once")
    for name in keywords.keys() - known:
        del kwargs[name]


def _is_off(name: str, value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return not value
    return (isinstance(value, (list, tuple, dict)) and not value) or (
        name in NEUTRAL_VALUES and value == NEUTRAL_VALUES[name]
    )


def length_limits(options: YanGenerationConfig, asked: list[dict[str, Any]], prompt_length: int) -> tuple[int, int]:
    """Most and fewest new tokens; the first of `asked` that has one of the two upper limits decides between them.

    `prompt_length` tokens are returned before the new ones, and count in `max_length` and `min_length`.
    """
    decisive = next((limits for limits in asked if limits.get("max_new_tokens") or limits.get("max_length")), {})
    max_new_tokens = options.max_new_tokens
    if not decisive.get("max_new_tokens") and decisive.get("max_length"):
        max_new_tokens = decisive["max_length"] - prompt_length
        if max_new_tokens < 1:
            raise ValueError(f"max_length={decisive['max_length']}: must be above the prompt's {prompt_length} tokens")
    min_new_tokens = max(options.min_new_tokens or 0, (options.min_length or 0) - prompt_length)
    if min_new_tokens > max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens}: must be at most max_new_tokens={max_new_tokens}")
    return max_new_tokens, min_new_tokens
