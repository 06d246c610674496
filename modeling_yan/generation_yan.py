"""Text generation with YAN: canvases of tokens, each written at once by a few solver steps (arXiv 2604.15009).

Letters of the shape comments: B prompts, R sequences per prompt, S prompt length, L canvas length, D hidden size,
K experts, N solver steps.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .compilation_yan import merging
from .experts_yan import EXPERT_CHOICES
from .flow_matching_yan import SOLVERS, extrapolate, hashed_normal, hashed_uniform, solve_flow
from .layers_yan import count_positions
from .reading_yan import END_CHOICES, best_of_text_and_fill
from .recording_yan import Recordings
from .trainer_yan import open_options

FLOW_FIELDS = (
    "num_flow_steps",
    "solver",
    "expert_choice",
    "canvas_length",
    "commit_threshold",
    "end_choice",
    "use_transitions",
    "seed",
    "return_prompt",
    "compile_generation",
)
COMMIT_THRESHOLD = 0.9  # probability of a token that is sure, unless asked otherwise
PROMPT_BUCKET = 64  # a compiled program is for prompts of a multiple of so many tokens
# programs per model and code, of which torch allows 8; hooks that come later count, which torch would pass over
TRACER_SETTINGS = {"recompile_limit": 64, "skip_nnmodule_hook_guards": False}
MODES_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
MAX_LOGITS = 2**28  # computed at once
_programs: dict[str, Callable] = {}
IGNORED_KWARGS = ("labels", "use_cache", "synced_gpus")  # Seq2SeqTrainer hands them in
PROMPT_ARGUMENTS = ("input_ids", "attention_mask")
SIMPLE_TYPES = (int, float, str, type(None), CompileConfig)
# that options depend on
OPTION_FIELDS = (
    *("canvas_length", "num_flow_steps", "max_position_embeddings", "num_answer_slots", "vocab_size"),
    *("num_experts", "expert_scope", "train_expert_choice", "start_point"),
)
# Options of token-by-token decoding, with the values besides None, False and nothing that leave them switched off.
REFUSED_OPTIONS = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "top_p", "typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(
        "penalty_alpha dola_layers bad_words_ids force_words_ids constraints forced_bos_token_id forced_eos_token_id "
        "begin_suppress_tokens sequence_bias stop_strings watermarking_config prompt_lookup_num_tokens "
        "cache_implementation output_scores output_logits output_attentions output_hidden_states assistant_model "
        "logits_processor prefix_allowed_tokens_fn negative_prompt_ids custom_generate".split(),
        (),
    ),
}


class YanGenerationConfig(GenerationConfig):
    """Generation options of YAN, beside those of `GenerationConfig` that a non-autoregressive model can honour.

    Honoured: `max_new_tokens`, `max_length`, `min_new_tokens`, `min_length`, `do_sample`, `temperature`,
    `num_return_sequences`, `suppress_tokens`, `eos_token_id`, `pad_token_id`, `bos_token_id`,
    `return_dict_in_generate`. Options of autoregressive decoding raise an error in `generate`.

    Args:
        num_flow_steps: Solver steps N per canvas; the model's default if None. 0 reads off the encoder's draft in its
            answer slots (`num_answer_slots`), one pass without a flow.
        solver: "euler" (N trunk passes a canvas) or "heun" (2 N); "euler" if None.
        expert_choice: Each token's expert at t = 0: the gate's "argmax", a "sample" of it, the "mixture" of all, or
            "ranked", the most probable one for the first of `num_return_sequences`, the next for the second and so on,
            which writes different texts without `do_sample` (their number is then a keyword of `generate`: a config
            has to be one of transformers', too). If None "argmax", but with `do_sample` "sample" for a model with
            `train_expert_choice="posterior"`.
        canvas_length: Tokens written at once; the model's if None.
        commit_threshold: Of a model with `self_conditioning`: after each solver step but the last, the tokens that are
            at least so probable are settled, and the first of every run of others; the next step sees them. 0 settles
            all of them, "off" none; 0.9 if None.
        end_choice: Where a text ends: "likeliest" takes the length for which the tokens and the EOS in all places
            behind them are the most probable together, "first" the first EOS among tokens that are chosen without
            regard to it; "likeliest" if None.
        use_transitions: Of a model with `transition_rank`: whether a canvas is read off as the best chain of tokens,
            and not every token by itself; True if None.
        seed: Chooses the start noise. With `do_sample` it is drawn from the global random state if None; without, it
            is 0 and all rows start from the same noise.
        return_prompt: Whether the sequences begin with the prompt; if None, they do, but not for Seq2SeqTrainer, which
            compares them with the labels.
        compile_generation: Whether encoder, solver and decoder run as one program of `torch.compile`, which on a GPU
            is recorded as a CUDA graph (default False). The first call for a batch size, a canvas length and each 64
            tokens of prompt compiles, for a minute or more; `compile_config` may choose other settings of the
            compiler, such as `CompileConfig(backend="eager")` to record without it, in seconds.
        temperature: With `do_sample` it scales the start noise, and divides the logits of what is drawn: of the gate
            and of the chain of tokens. At least 0.
        length_penalty: Of a chain of experts or of tokens in a model with `train_expert_choice="posterior"`, without
            `do_sample`: of the best texts of all lengths the one is written whose log-probability, divided by its
            length to this power, is the highest; 1 if None.
    """

    def __init__(self, **kwargs):
        for name in FLOW_FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    @classmethod
    def for_model(cls, config) -> "YanGenerationConfig":
        """The default options of a fresh model: deterministic, one canvas, and nothing left to a pipeline's taste."""
        token_ids = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return cls(do_sample=False, temperature=1.0, max_new_tokens=config.canvas_length, **token_ids)

    def validate(self, strict=False, **kwargs):
        """Check every field; raises ValueError with the field, its value and what is allowed."""
        penalty, self.length_penalty = self.length_penalty, None  # transformers knows it of beams alone
        try:
            super().validate(strict=strict, **kwargs)
        finally:
            self.length_penalty = penalty
        _check_flow_fields(self)


def _check_flow_fields(options):
    for name, is_allowed, allowed in _FIELD_RULES:
        value = getattr(options, name, None)
        if value is not None and not is_allowed(value):
            raise ValueError(f"{name}={value!r}: must be {allowed}")


def _is_positive_int(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_FIELD_RULES = (
    (
        "num_flow_steps",
        lambda value: value is not False and (value == 0 or _is_positive_int(value)),
        "an integer of at least 0",
    ),
    ("canvas_length", _is_positive_int, "an integer of at least 1"),
    ("solver", lambda value: value in SOLVERS, f"one of {', '.join(SOLVERS)}"),
    ("expert_choice", lambda value: value in EXPERT_CHOICES, f"one of {', '.join(EXPERT_CHOICES)}"),
    ("commit_threshold", lambda value: value == "off" or (_is_number(value) and 0 <= value <= 1), '0 to 1, or "off"'),
    ("end_choice", lambda value: value in END_CHOICES, f"one of {', '.join(END_CHOICES)}"),
    ("use_transitions", lambda value: isinstance(value, bool), "True or False"),
    ("seed", lambda value: isinstance(value, int), "an integer"),
    ("compile_generation", lambda value: isinstance(value, bool), "True or False"),
    ("length_penalty", _is_number, "a number"),
    ("temperature", lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
)


@dataclass
class YanGenerationOutput(ModelOutput):
    """Output of `generate(..., return_dict_in_generate=True)`. Tuples have one entry a canvas.

    Args:
        sequences: (B R, S + new tokens) ids: the prompt as it was given, the new tokens with their EOS, then padding.
        tokens_per_forward: (B R,) new tokens up to the end of the text, EOS included, over the number of trunk passes.
        num_trunk_passes: Passes through the flow's trunk in this call: N a canvas with "euler".
        trajectory: Points of the path, (B R, N + 1, L, D), from noise to latents.
        experts: (B R, L) index of each token's expert; None for the "mixture". gate: (B R, L, K) its probabilities.
    """

    sequences: torch.LongTensor
    tokens_per_forward: torch.Tensor | None = None
    num_trunk_passes: int | None = None
    trajectory: tuple[torch.Tensor, ...] | None = None
    experts: tuple[torch.LongTensor, ...] | None = None
    gate: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class CanvasPlan:
    """What does not change the tensors that a canvas is written from, but what is done with them.

    Args:
        num_flow_steps, solver, expert_choice, end_choice, use_transitions, length_penalty: As in
            `YanGenerationConfig`.
        temperature: Of what is drawn: experts, and tokens of a chain.
        repeats: Sequences R per row of context.
        commit_threshold: The same; None to settle no tokens.
        suppressed: Forbidden token ids. eos: Ids forbidden among the first `num_without_eos` tokens.
        keep_path: Whether the points of the path, the experts and their gate are wanted.
    """

    num_flow_steps: int
    solver: str
    expert_choice: str
    repeats: int
    suppressed: tuple[int, ...]
    eos: tuple[int, ...]
    num_without_eos: int
    keep_path: bool
    commit_threshold: float | None = None
    end_choice: str = "likeliest"
    use_transitions: bool = True
    length_penalty: float = 1.0
    temperature: float = 1.0

    @classmethod
    def of_config(cls, config, num_flow_steps: int, num_without_eos: int = 0, **options) -> "CanvasPlan":
        """The plan of a canvas that is written without sampling and without further wishes."""
        eos = () if config.eos_token_id is None else (config.eos_token_id,)
        return cls(num_flow_steps, "euler", "argmax", 1, (), eos, num_without_eos, False, **options)


@dataclass
class Canvas:
    """One canvas: its token ids (B R, L), and how they came about where that is wanted."""

    tokens: torch.LongTensor
    num_trunk_passes: int
    trajectory: torch.Tensor | None = None
    experts: torch.LongTensor | None = None
    gate: torch.Tensor | None = None


class YanGenerationMixin(GenerationMixin):
    """`generate` for flow models, in place of token-by-token decoding."""

    generation_config_class = YanGenerationConfig
    _last_call = None  # what it asked for, and the options that came of it
    _recordings = None  # of compiled generation on a GPU

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs,
    ) -> torch.LongTensor | YanGenerationOutput:
        """Continue, complete or answer the prompts.

        Every canvas of `canvas_length` tokens is written at once in `num_flow_steps` steps. Tokens up to the EOS
        are kept; without one the next canvas follows, conditioned on the prompt and the canvases before it (on their
        last `max_prompt_length` tokens), until `max_new_tokens` is reached. With `do_sample=False` the result
        for a prompt does not depend on the rest of the batch or on the side of its padding.

        Args:
            inputs: Prompts (B, S), also as `input_ids`. None, or a row without valid token, stands for one BOS.
            generation_config: A `YanGenerationConfig`; options may also be given by keyword, which wins.
            streamer: Gets the prompt, then each canvas; if it has `put_draft`, also the draft (B R, L) after every
                solver step.
            generator: Draws the seed, if `seed` is None and `do_sample` is set.
            stopping_criteria: Asked about the prompt and the new tokens up to each one, in order, as if they had been
                written one by one, with None for the scores; what follows the token where one says stop is padding.
            kwargs: Options of the config, and `attention_mask` (B, S); where it is missing, pad tokens are masked.

        Returns:
            Sequences (B R, S + new tokens), or a `YanGenerationOutput`.

        Raises:
            ValueError: An option, an argument or a token id that is not allowed, or a prompt that is too long.
        """
        options, asked, given = self._options_of_call(generation_config, kwargs)
        seed = options.seed
        if seed is None:
            seed = _draw_seed(generator) if options.do_sample else 0
        prompt, context, context_mask = self._prepare_prompt(inputs, options, **given)
        max_new_tokens, min_new_tokens = _length_limits(options, asked, prompt.shape[1])
        if streamer is not None:
            streamer.put(prompt.cpu())
        num_rows = len(prompt) * options.num_return_sequences
        written = prompt.new_empty(num_rows, 0)
        finished, kept, canvases = None, [], []
        while True:
            forbidden = min_new_tokens - written.shape[1]
            canvas = self._write_canvas(context, context_mask, options, seed, len(canvases), forbidden, streamer)
            canvases.append(canvas)
            tokens = canvas.tokens[:, : max_new_tokens - written.shape[1]]
            tokens, num_kept, finished = _cut_at_eos(tokens, finished, options)
            if stopping_criteria:
                before = torch.cat([prompt.repeat_interleave(options.num_return_sequences, 0), written], dim=1)
                cut = tokens, num_kept, finished
                tokens, num_kept, finished = _cut_at_criteria(before, *cut, stopping_criteria, options)
            kept.append(num_kept)
            written = torch.cat([written, tokens], dim=1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if written.shape[1] >= max_new_tokens or finished.all():
                break
            context, context_mask = self._extend_context(context, context_mask, tokens, options)
        if streamer is not None:
            streamer.end()
        num_tokens = reduce(torch.add, kept)
        before = prompt.repeat_interleave(options.num_return_sequences, 0)[:, : None if options.return_prompt else 0]
        sequences = torch.cat([before, written], dim=1)
        # the device is asked last, when nothing is left to launch
        sequences = sequences[:, : before.shape[1] + int(num_tokens.max())].contiguous()
        return _output(sequences, num_tokens, canvases) if options.return_dict_in_generate else sequences

    def adjust_generation_fn(self, *args, **kwargs):
        """Load generation_config.json as a `YanGenerationConfig`; a checkpoint without one keeps the defaults."""
        defaults = self.generation_config
        super().adjust_generation_fn(*args, **kwargs)
        loaded = self.generation_config
        is_missing = getattr(loaded, "_from_model_config", False)
        self.generation_config = defaults if is_missing else YanGenerationConfig.from_dict(loaded.to_dict())

    def _options_of_call(self, generation_config, kwargs):
        """Options, who asked for what (as `_length_limits` wants it), and the prompt among the keywords.

        A call that asks for what the last one did gets its options without work, which would take longer than a GPU
        takes for a solver step.
        """
        prompt = {name: kwargs.pop(name) for name in PROMPT_ARGUMENTS if name in kwargs}
        keywords = [(name, type(value), value) for name, value in kwargs.items()]  # True is not 1 here
        call = keywords, [getattr(self.config, name) for name in OPTION_FIELDS], vars(self.generation_config)
        is_simple = generation_config is None and all(isinstance(value, SIMPLE_TYPES) for value in kwargs.values())
        if not (is_simple and self._last_call and self._last_call[0] == call):
            configs = [config for config in (generation_config, self.generation_config) if config is not None]
            asked = [kwargs, *(config.to_diff_dict() for config in configs)]
            _refuse_autoregressive_options(*asked)
            self.open_options = open_options(self.generation_config)
            options = self._resolve_options(generation_config, kwargs)
            self._last_call = (deepcopy(call), options, asked) if is_simple else None
        else:
            _, options, asked = self._last_call
        return options, asked, prompt

    def _resolve_options(self, generation_config, kwargs):
        """Keyword, then passed config, then the model's config, then the defaults."""
        num_sequences = kwargs.get("num_return_sequences")
        # transformers would refuse several that are neither sampled nor beams
        others = {name: value for name, value in kwargs.items() if name != "num_return_sequences"}
        options, model_kwargs = self._prepare_generation_config(generation_config, **others)
        if num_sequences is not None:
            options.num_return_sequences = num_sequences
        defaults = {
            "num_flow_steps": self.config.num_flow_steps,
            "solver": "euler",
            "expert_choice": self._default_expert_choice(options),
            "canvas_length": self.config.canvas_length,
            "commit_threshold": COMMIT_THRESHOLD,
            "end_choice": "likeliest",
            "use_transitions": True,
            "return_prompt": "synced_gpus" not in model_kwargs,
            "max_new_tokens": self.config.canvas_length,
        }
        for name in (*FLOW_FIELDS, "max_new_tokens"):
            value = model_kwargs.pop(name, getattr(options, name, None))
            setattr(options, name, defaults.get(name) if value is None else value)
        _check_flow_fields(options)
        self._check_length(options.canvas_length, "the canvas")
        self._check_num_sequences(options)
        self._check_fit(options)
        if any(not 0 <= token < self.config.vocab_size for token in options.suppress_tokens or ()):
            allowed = f"[0, vocab_size={self.config.vocab_size})"
            raise ValueError(f"suppress_tokens={options.suppress_tokens}: must be in {allowed}")
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in IGNORED_KWARGS}
        if model_kwargs:
            raise ValueError(f"generate has no argument {', '.join(model_kwargs)}")
        return options

    def _default_expert_choice(self, options):
        """Experts that were trained as a distribution are drawn from it where anything is drawn."""
        return "sample" if options.do_sample and self.config.train_expert_choice == "posterior" else "argmax"

    def _check_fit(self, options):
        """Raise ValueError for an option that this model can't honour."""
        slots, canvas_length = self.config.num_answer_slots, options.canvas_length
        if options.num_flow_steps == 0:
            self._check_draft(canvas_length)
        if self.config.start_point == "draft" and slots < canvas_length:
            raise ValueError(f"canvas_length={canvas_length}: must be at most num_answer_slots={slots}")
        is_chain = self.config.expert_scope == "chain"
        if is_chain and options.expert_choice == "ranked":
            raise ValueError("expert_choice='ranked': must be argmax, sample or mixture with expert_scope='chain'")
        if self.config.train_expert_choice != "posterior" and options.length_penalty not in (None, 1):
            allowed = "1 without train_expert_choice='posterior'"
            raise ValueError(f"length_penalty={options.length_penalty}: must be {allowed}")

    def _check_num_sequences(self, options):
        number, is_ranked = options.num_return_sequences, options.expert_choice == "ranked"
        if not _is_positive_int(number):
            raise ValueError(f"num_return_sequences={number!r}: must be an integer of at least 1")
        if is_ranked and number > self.config.num_experts:
            allowed = f'at most num_experts={self.config.num_experts} with expert_choice="ranked"'
            raise ValueError(f"num_return_sequences={number}: must be {allowed}")
        if number > 1 and not (options.do_sample or is_ranked):
            allowed = '1 unless do_sample=True or expert_choice="ranked"'
            raise ValueError(f"num_return_sequences={number}: must be {allowed}")

    def _prepare_prompt(self, inputs, options, input_ids=None, attention_mask=None):
        """Checked ids (B, S), and the context that they are; an empty batch of prompts becomes one BOS each."""
        if inputs is not None and input_ids is not None:
            raise ValueError("the prompt was given twice, as inputs and as input_ids")
        ids = inputs if inputs is not None else input_ids
        ids = torch.empty(1, 0, dtype=torch.long, device=self.device) if ids is None else ids
        if not torch.is_tensor(ids) or ids.dim() != 2 or ids.is_floating_point() or len(ids) == 0:
            found = f"{tuple(ids.shape)} of {ids.dtype}" if torch.is_tensor(ids) else type(ids).__name__
            raise ValueError(f"the prompt is {found}: must be a tensor of integers (B, S), B at least 1")
        if ids.shape[1] == 0:
            if options.bos_token_id is None:
                raise ValueError("an empty prompt needs bos_token_id, which is None")
            ids, attention_mask = torch.full((len(ids), 1), options.bos_token_id, device=ids.device), None
        if attention_mask is None:
            pad_token_id = options.pad_token_id
            attention_mask = torch.ones_like(ids) if pad_token_id is None else (ids != pad_token_id).long()
        if attention_mask.shape != ids.shape:
            raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}: must be {tuple(ids.shape)}")
        # on the host, where a check costs less than a launch
        host_mask, fewest, most = attention_mask.cpu(), ids.shape[1], ids.shape[1]
        if not host_mask.all():
            fewest, most = (int(number) for number in _count_valid(host_mask != 0))
        low, high = (int(number) for number in ids.cpu().aminmax())
        self._check_range(low, high)
        self._check_length(max(most, 1), "the prompt", self.config.num_answer_slots)
        if fewest > 0:
            return ids, *_left_align(ids, attention_mask, fewest, most)
        if options.bos_token_id is None:
            raise ValueError("a prompt without valid token needs bos_token_id, which is None")
        is_empty = ~attention_mask.bool().any(1)
        ids, attention_mask = ids.clone(), attention_mask.clone()
        ids[is_empty, -1], attention_mask[is_empty, -1] = options.bos_token_id, 1
        return ids, *_left_align(ids, attention_mask, 1, max(most, 1))

    def _write_canvas(self, context, context_mask, options, seed, index, num_without_eos, streamer) -> Canvas:
        """Draw the noise of a canvas, and write it on the context (B or B R, S)."""
        draws_tokens = options.do_sample and options.use_transitions and self._draws_tokens()
        plan = _plan(options, index, num_without_eos, self.config.self_conditioning, draws_tokens)
        # without sampling, all rows share their noise
        num_noises = plan.repeats * len(context) if options.do_sample else 1
        shape, seed, device = (num_noises, options.canvas_length), seed + index, context.device
        if options.do_sample:
            x_0 = options.temperature * self.start_noise(shape, torch.empty(0, device=device), seed)
        else:
            x_0 = _shared_noise(seed, (*shape, self.config.hidden_size), device, self.config.init_noise)
        expert_numbers = None
        if options.expert_choice == "sample":
            # of another seed than the start noise, or the expert would be a function of it
            expert_numbers = hashed_uniform(seed ^ 0x5EED5EED, (*shape, self.config.num_experts), device)
        elif options.expert_choice == "ranked":
            ranks = torch.arange(options.num_return_sequences, device=device)
            expert_numbers = ranks.repeat(plan.repeats * len(context) // len(ranks)).unsqueeze(1)
        token_numbers = None
        if draws_tokens:
            token_numbers = hashed_uniform(seed ^ 0x70CE70CE, (*shape, self.transitions.num_candidates), device)
        tensors = context, context_mask, x_0, expert_numbers, token_numbers
        if options.compile_generation and not hasattr(streamer, "put_draft"):
            return self._write_compiled(*tensors, plan, options.compile_config)
        return write_canvas(self, *tensors, plan, streamer if hasattr(streamer, "put_draft") else None)

    def _draws_tokens(self) -> bool:
        """Whether sampling draws the chain of tokens, too: where the model was trained as a distribution of them."""
        return self.transitions is not None and self.config.train_expert_choice == "posterior"

    def _write_compiled(
        self, context, context_mask, x_0, expert_numbers, token_numbers, plan, compile_config
    ) -> Canvas:
        """The same by a compiled program; the context is padded to a length that there is a program for."""
        length = context.shape[1]
        bucket = min(-(-length // PROMPT_BUCKET) * PROMPT_BUCKET, self.config.max_prompt_length)
        if length < bucket:
            context_mask = torch.ones_like(context) if context_mask is None else context_mask
            context, context_mask = (F.pad(tensor, (0, bucket - length)) for tensor in (context, context_mask))

        def write(*tensors):
            settings = _compiler_settings(compile_config)
            with torch._dynamo.config.patch(**TRACER_SETTINGS), merging():
                return vars(compiled_program(settings)(self, *tensors, plan))

        tensors = context, context_mask, x_0, expert_numbers, token_numbers
        if context.device.type != "cuda":
            return Canvas(**write(*tensors))
        self._recordings = self._recordings or Recordings()
        return Canvas(**self._recordings.call(self, write, tensors, (plan, repr(compile_config))))

    def read_off(self, latents, plan: CanvasPlan, token_numbers=None) -> torch.LongTensor:
        """Most likely allowed token ids (B R, L) of latents (B R, L, D); never all logits of a large batch at once.

        With uniform numbers (B R, L, C) they are drawn instead, each row as a chain.
        """
        eos, texts = plan.eos if plan.end_choice == "likeliest" else (), []
        for part in self._split_rows(latents):
            logits = self._allowed_logits(part, plan)
            if token_numbers is None:
                texts.append(self.most_likely(logits, part, eos, plan.use_transitions, plan.length_penalty))
            else:
                numbers, token_numbers = token_numbers.split([len(part), len(token_numbers) - len(part)])
                options = numbers, eos, plan.temperature
                texts.append(self.transitions.draw(self.get_input_embeddings(), logits, part, *options))
        return torch.cat(texts)

    def best_chain(self, ends, prior, plan: CanvasPlan) -> torch.LongTensor:
        """The experts (B R, L) of a chain that write the best text together, from their ends (B R, L, K, D)."""
        eos = plan.eos if plan.end_choice == "likeliest" else ()
        scores = []
        for end in ends.unbind(2):  # one by one, or the logits would be K vocabularies wide
            parts = [best_of_text_and_fill(self._allowed_logits(part, plan), eos) for part in self._split_rows(end)]
            scores.append([torch.cat(part) for part in zip(*parts, strict=True)])
        tokens, *fill = (torch.stack(each, dim=-1) for each in zip(*scores, strict=True))
        return prior.best_chain(tokens, *fill, length_penalty=plan.length_penalty)

    def commit(self, latents, plan: CanvasPlan) -> torch.Tensor:
        """What the flow sees (B R, L, D) of the tokens that are settled when latents (B R, L, D) are read off."""
        parts = [self._most_likely(part, plan) for part in self._split_rows(latents)]
        tokens, probabilities = (torch.cat(results) for results in zip(*parts, strict=True))
        is_sure = probabilities >= plan.commit_threshold
        # the first of a run of unsure tokens is what the others of the run have to fit
        return self.settle(tokens, is_sure | F.pad(is_sure, (1, -1), value=True))

    def _most_likely(self, latents, plan):
        logits = self._allowed_logits(latents, plan).float()
        highest, tokens = logits.max(-1)
        return tokens, (highest - logits.logsumexp(-1)).exp()

    def _split_rows(self, latents):
        chains = 0 if self.transitions is None else self.transitions.num_candidates**3 // 2
        per_token = max(self.config.vocab_size, chains)
        return latents.split(max(1, MAX_LOGITS // (latents.shape[1] * per_token)))

    def _allowed_logits(self, latents, plan):
        logits = self.decode(latents)
        # one token after the other: a list as an index would be copied to the device, and keep CUDA graphs out
        for token in plan.suppressed:
            logits[..., token] = -torch.inf
        for token in plan.eos if plan.num_without_eos > 0 else ():
            logits[:, : plan.num_without_eos, token] = -torch.inf
        return logits

    def _extend_context(self, context, context_mask, tokens, options):
        """Context and mask for the next canvas, left-aligned and at most `max_prompt_length` long."""
        repeats = len(tokens) // len(context)
        ids = torch.cat([context.repeat_interleave(repeats, 0), tokens], dim=1)
        # Padding after the EOS of a finished row is masked; its further canvases are thrown away.
        is_valid = torch.ones_like(tokens) if options.pad_token_id is None else (tokens != options.pad_token_id).long()
        context_mask = torch.ones_like(context) if context_mask is None else context_mask
        mask = torch.cat([context_mask.repeat_interleave(repeats, 0), is_valid], dim=1)
        positions_from_end = mask.flip(1).cumsum(1).flip(1)
        mask = mask * (positions_from_end <= self.config.max_prompt_length)
        return _left_align(ids, mask, *torch.stack(_count_valid(mask)).tolist())


def write_canvas(
    model, context, context_mask, x_0, expert_numbers, token_numbers, plan: CanvasPlan, streamer=None
) -> Canvas:
    """Encode the context and solve for one canvas of tokens: nothing but a function of tensors and the plan.

    Args:
        model: A `YanForFlowGeneration`. context, context_mask: (B, S); the mask may be None if all is valid.
        x_0: Noise of the start (B R or 1, L, D). expert_numbers: As `choose_experts` wants them, for B R rows.
        token_numbers: Uniform numbers (B R, L, C) to draw the chain of tokens with, or None for the best one.
        streamer: Gets drafts, if there is one.
    """
    prompt = model.with_answer_slots(context, context_mask, count_positions(context, context_mask))
    context_mask = prompt["attention_mask"]
    latents = model.model(**prompt, return_dict=True).last_hidden_state
    if plan.repeats > 1:
        latents = latents.repeat_interleave(plan.repeats, 0)
        context_mask = None if context_mask is None else context_mask.repeat_interleave(plan.repeats, 0)
    length = x_0.shape[1]
    if plan.num_flow_steps == 0:
        return Canvas(model.read_off(model.draft(latents, length), plan, token_numbers), 0)
    condition = model.condition(latents, context_mask, length)
    x_0 = model.start(x_0, condition)
    velocity = model.velocity_field(
        condition, length, plan.num_flow_steps, plan.solver, plan.expert_choice, expert_numbers
    )
    velocity.temperature = plan.temperature
    if plan.expert_choice == "argmax" and model.config.expert_scope == "chain":
        velocity.choose = lambda ends, prior: model.best_chain(ends, prior, plan)
    path = [x_0]

    def record(step, x):
        path.append(x)
        can_commit = plan.commit_threshold is not None and step < plan.num_flow_steps
        if streamer is None and not can_commit:
            return
        draft = extrapolate(*path[-2:], step, plan.num_flow_steps)
        if streamer is not None:
            streamer.put_draft(model.read_off(draft, plan, token_numbers).cpu())
        if can_commit:
            velocity.settled = model.commit(draft, plan)

    x_1 = solve_flow(velocity, x_0, plan.num_flow_steps, plan.solver, record)
    tokens = model.read_off(x_1, plan, token_numbers)
    if not plan.keep_path:
        return Canvas(tokens, velocity.num_trunk_passes)
    how = {"trajectory": torch.stack(path, 1), "experts": velocity.experts, "gate": velocity.log_gate.exp()}
    return Canvas(tokens, velocity.num_trunk_passes, **how)


def compiled_program(settings: dict) -> Callable[..., Canvas]:
    """`write_canvas` compiled with these settings; torch keeps a program for every model, plan and shape."""
    key = repr(settings)
    if key not in _programs:
        _programs[key] = torch.compile(write_canvas, **settings)
    return _programs[key]


def _compiler_settings(compile_config) -> dict:
    """Arguments of `torch.compile`. It need not record CUDA graphs: the whole program becomes one."""
    settings = {"dynamic": False} if compile_config is None else compile_config.to_dict()
    if settings.get("options"):
        settings["options"] = {**settings["options"], "triton.cudagraphs": False}
    return {**settings, "mode": MODES_WITHOUT_GRAPHS.get(settings.get("mode"), settings.get("mode"))}


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _shared_noise(seed, shape, device, deviation) -> torch.Tensor:
    """Normal numbers, remembered: deterministic generation begins every time with the same."""
    return deviation * hashed_normal(seed, shape, device)


def _plan(options, index, num_without_eos, can_commit, draws_tokens) -> CanvasPlan:
    draws = options.do_sample and (draws_tokens or options.expert_choice == "sample")  # else it scales noise alone
    return CanvasPlan(
        num_flow_steps=options.num_flow_steps,
        solver=options.solver,
        expert_choice=options.expert_choice,
        repeats=options.num_return_sequences if index == 0 else 1,
        suppressed=tuple(options.suppress_tokens or ()),
        eos=tuple(_eos_ids(options)),
        num_without_eos=min(max(num_without_eos, 0), options.canvas_length),
        keep_path=bool(options.return_dict_in_generate),
        commit_threshold=options.commit_threshold if can_commit and options.commit_threshold != "off" else None,
        end_choice=options.end_choice,
        use_transitions=options.use_transitions,
        length_penalty=1.0 if options.length_penalty is None else float(options.length_penalty),
        temperature=options.temperature if draws else 1.0,
    )


def _refuse_autoregressive_options(kwargs, *configs):
    """Raise ValueError if a keyword or a config asks for token-by-token decoding; drop the keywords that don't."""
    defaults = GenerationConfig._get_default_generation_params()  # a config may be filled up with them; nobody asked
    chosen = [{name: value for name, value in config.items() if value != defaults.get(name)} for config in configs]
    for options in (kwargs, *chosen):
        names = [name for name, neutral in REFUSED_OPTIONS.items() if not _is_off(options.get(name), neutral)]
        if names:
            raise ValueError(f"generate of YAN writes all tokens at once and has no {', '.join(names)}")
    for name in REFUSED_OPTIONS:
        kwargs.pop(name, None)


def _is_off(value, neutral):
    is_empty = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
    return is_empty or (not isinstance(value, bool) and value in neutral)


def _length_limits(options, asked, prompt_length):
    """Most and fewest new tokens; the first of `asked` that has one of the two upper limits decides between them."""
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


def _draw_seed(generator):
    return int(torch.randint(2**31, (), generator=generator, device=getattr(generator, "device", None)))


def _count_valid(mask) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Fewest and most valid tokens of a row."""
    return mask.sum(1).aminmax()


def _left_align(ids, mask, fewest: int, most: int):
    """The valid tokens of every row, `fewest` to `most` of them, moved to its start, the width cut to the longest row.

    The mask is None where all that is left is valid: attention without one is faster.
    """
    if fewest < ids.shape[1]:
        mask = mask.bool().long()
        order = (1 - mask).argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order)[:, :most], mask.gather(1, order)[:, :most]
    return ids, mask if fewest < most else None


def _eos_ids(options):
    eos = options.eos_token_id
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [int(eos)]


def _is_eos(tokens, options):
    ids = _eos_ids(options)
    return reduce(torch.logical_or, (tokens == eos for eos in ids)) if ids else torch.zeros_like(tokens, dtype=bool)


def _cut_at_eos(tokens, finished, options):
    """Pad what follows the first EOS, and all of a row that was finished before; `finished` may be None at first.

    Returns the tokens (B, L), how many of each row are kept (B,), and which rows are finished (B,).
    """
    is_eos = _is_eos(tokens, options)
    num_eos = is_eos.cumsum(1)
    is_after, is_finished = num_eos > is_eos, num_eos[:, -1] > 0
    if finished is not None:
        is_after, is_finished = is_after | finished.unsqueeze(1), is_finished | finished
    return tokens.masked_fill(is_after, _fill_token(options)), tokens.shape[1] - is_after.sum(1), is_finished


def _cut_at_criteria(before, tokens, num_kept, finished, criteria, options):
    """Pad what follows the token at which a criterion stops a row; arguments and results as of `_cut_at_eos`."""
    criteria, tokens, is_over = StoppingCriteriaList(criteria), tokens.clone(), torch.zeros_like(finished)
    for stop in range(1, tokens.shape[1] + 1):
        is_over = is_over | criteria(torch.cat([before, tokens[:, :stop]], dim=1), None)
        tokens[is_over, stop:] = _fill_token(options)
        num_kept = torch.where(is_over, num_kept.clamp(max=stop), num_kept)
    return tokens, num_kept, finished | is_over


def _fill_token(options):
    """What stands behind the end of a row."""
    return options.pad_token_id if options.pad_token_id is not None else (_eos_ids(options) or [0])[0]


def _output(sequences, num_tokens, canvases):
    num_passes = sum(canvas.num_trunk_passes for canvas in canvases)
    has_experts, has_path = canvases[0].experts is not None, canvases[0].trajectory is not None
    return YanGenerationOutput(
        sequences=sequences,
        tokens_per_forward=num_tokens / max(num_passes, 1),
        num_trunk_passes=num_passes,
        trajectory=tuple(canvas.trajectory for canvas in canvases) if has_path else None,
        experts=tuple(canvas.experts for canvas in canvases) if has_experts else None,
        gate=tuple(canvas.gate for canvas in canvases) if has_path else None,
    )
