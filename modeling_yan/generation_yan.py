"""Text generation with YAN: canvases of tokens, each generated at once by a few solver steps (arXiv 2604.15009).

Letters of the shape comments: B prompts, R sequences per prompt, S prompt length, L canvas length, D hidden size,
K experts, N solver steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, NoReturn, Protocol, cast

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.configuration_utils import CompileConfig
from transformers.utils import ModelOutput

from .canvas_yan import Canvas, CanvasNoise, CanvasPlan, encode_and_solve
from .checks_yan import (
    check_device,
    check_helpers,
    check_length,
    check_mask,
    check_range,
    check_tensor,
    not_finite_weights,
)
from .clients_yan import refuse_prompt_learning
from .compilation_yan import merging
from .cuda_graphs_yan import CudaGraphCache
from .flow_matching_yan import hashed_normal, hashed_uniform
from .generation_config_yan import YanGenerationConfig, YanOptionsMixin, length_limits
from .graphs_yan import UNIFORMS
from .stopping_yan import Deadline, all_criteria, cut_at_criteria, cut_at_eos, eos_ids, without_padding

PROMPT_BUCKET = 64  # a compiled program is for prompts of a multiple of this many tokens
# programs per model and code, of which torch allows 8; hooks that come later count, which torch would pass over
TRACER_SETTINGS: dict[str, Any] = {"recompile_limit": 64, "skip_nnmodule_hook_guards": False}
MODES_WITHOUT_GRAPHS: dict[str | None, str] = {
    "reduce-overhead": "default",
    "max-autotune": "max-autotune-no-cudagraphs",
}
_programs: dict[str, Callable[..., Canvas]] = {}


class Streamer(Protocol):
    """What `generate` hands tokens to as they come, such as a streamer of transformers."""

    def put(self, value: torch.Tensor, /) -> None: ...

    def end(self) -> None: ...


@dataclass
class YanGenerationOutput(ModelOutput):
    """Output of `generate(..., return_dict_in_generate=True)`. Tuples have one entry a canvas.

    Args:
        sequences: (B R, S + new tokens) ids: the prompt as it was given, the new tokens with their EOS, then padding.
        tokens_per_forward: (B R,) new tokens up to the end of the text, EOS included, over the number of trunk passes.
        num_trunk_passes: Passes through the flow's trunk in this call: N a canvas.
        trajectory: Points of the path, (B R, N + 1, L, D), from noise to latents.
        experts: (B R, L) index of each token's expert; None for the "mixture". gate: (B R, L, K) its probabilities.
            With `vertices_per_token` above 1, L is the number of vertices here. With `num_flow_steps=0` these and the
            trajectory are None.

    Example:

        >>> import torch
        >>> from modeling_yan import YanConfig, YanForFlowGeneration
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
        >>> model = YanForFlowGeneration(YanConfig(vocab_size=100, canvas_length=8, **sizes)).eval()
        >>> output = model.generate(torch.tensor([[5, 6, 7]]), num_flow_steps=2, return_dict_in_generate=True)
        >>> output.num_trunk_passes, output.trajectory[0].shape
        (2, torch.Size([1, 3, 8, 32]))
    """

    sequences: torch.Tensor
    tokens_per_forward: torch.Tensor | None = None
    num_trunk_passes: int | None = None
    trajectory: tuple[torch.Tensor, ...] | None = None
    experts: tuple[torch.Tensor, ...] | None = None
    gate: tuple[torch.Tensor, ...] | None = None


class YanGenerationMixin(YanOptionsMixin):
    """`generate` for flow models, instead of token-by-token decoding."""

    _cuda_graphs: CudaGraphCache | None = None  # of compiled generation on a GPU

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        generator: torch.Generator | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | YanGenerationOutput:
        """Continue, complete or answer the prompts.

        Every canvas of `canvas_length` tokens is generated at once in `num_flow_steps` steps. Tokens up to the EOS
        are kept. Without one the next canvas follows, conditioned on the prompt and the canvases before it (on their
        last `max_prompt_length` tokens), until `max_new_tokens` is reached. With `do_sample=False` the result
        for a prompt does not depend on the rest of the batch or on the side of its padding.

        Args:
            inputs: Prompts (B, S), also as `input_ids`. None, or a row without valid token, stands for one BOS.
            generation_config: A `YanGenerationConfig`; options may also be given by keyword, which wins.
            streamer: Gets the prompt, then each canvas; if it has `put_draft`, also the draft (B R, L) after every
                solver step.
            generator: A `torch.Generator` that draws the seed, if `seed` is None and `do_sample` is set.
            stopping_criteria: Called with the prompt and the new tokens up to each token, as if they came one by one.
                Their `scores` are None. After the token where one returns True, the rest is padding.
            tokenizer: The model's tokenizer. Only `stop_strings` need it.
            kwargs: Options of the config, and `attention_mask` (B, S); where it is missing, pad tokens are masked.

        Returns:
            Sequences (B R, S + new tokens), or a `YanGenerationOutput`.

        Raises:
            ValueError: An option, an argument or a token id that is not allowed, or a prompt that is too long.
            TypeError: `generation_config`, `streamer` or `generator` is of another class.
            FloatingPointError: The model's numbers are not finite, so that there is no text to decode.

        Example:

            >>> import torch
            >>> from modeling_yan import YanConfig, YanForFlowGeneration
            >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
            >>> model = YanForFlowGeneration(YanConfig(vocab_size=100, canvas_length=8, **sizes)).eval()
            >>> prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
            >>> tokens = model.generate(prompts, num_flow_steps=2, min_new_tokens=4, max_new_tokens=4)
            >>> tokens.shape  # the prompts, and four new tokens for each of them
            torch.Size([2, 7])
        """
        check_helpers(generation_config, streamer, generator)
        refuse_prompt_learning(getattr(self.prepare_inputs_for_generation, "__self__", self))  # PEFT puts its own here
        options, asked, given = self._options_of_call(generation_config, kwargs)
        deadline, criteria = Deadline(options.max_time), all_criteria(stopping_criteria, options, tokenizer)
        seed = options.seed
        if seed is None:
            seed = _draw_seed(generator) if options.do_sample else 0
        prompt, context, context_mask = self._prepare_prompt(inputs, options, **given)
        max_new_tokens, min_new_tokens = length_limits(options, asked, prompt.shape[1] if options.return_prompt else 0)
        if streamer is not None:
            streamer.put(prompt.cpu())
        num_rows = len(prompt) * options.num_return_sequences
        generated = prompt.new_empty(num_rows, 0)
        finished: torch.Tensor | None = None
        kept: list[torch.Tensor] = []
        canvases: list[Canvas] = []
        while True:
            forbidden = min_new_tokens - generated.shape[1]
            canvas = self._solve_canvas(context, context_mask, options, seed, len(canvases), forbidden, streamer)
            canvases.append(canvas)
            tokens = cast(torch.Tensor, canvas.tokens)[:, : max_new_tokens - generated.shape[1]]
            tokens, num_kept, finished = cut_at_eos(tokens, finished, options)
            if criteria:
                before = torch.cat([prompt.repeat_interleave(options.num_return_sequences, 0), generated], dim=1)
                cut = tokens, num_kept, finished
                tokens, num_kept, finished = cut_at_criteria(before, *cut, criteria, options)
            kept.append(num_kept)
            generated = torch.cat([generated, tokens], dim=1)
            if streamer is not None:
                self._check_generated(tokens)
                streamer.put(tokens[:, : int(num_kept.max())].cpu())  # what is padding in all rows is not returned
            if generated.shape[1] >= max_new_tokens or finished.all() or deadline.has_passed():
                break
            context, context_mask = self._extend_context(context, context_mask, tokens, options)
        if streamer is not None:
            streamer.end()
        num_tokens = reduce(torch.add, kept)
        before = prompt.repeat_interleave(options.num_return_sequences, 0)[:, : None if options.return_prompt else 0]
        sequences = torch.cat([before, generated], dim=1)
        # the device is asked last, when nothing is left to launch
        sequences = sequences[:, : before.shape[1] + int(num_tokens.max())].contiguous()
        self._check_generated(sequences)
        return _output(sequences, num_tokens, canvases) if options.return_dict_in_generate else sequences

    def first_plan(self, min_new_tokens: int = 0, **options: Any) -> CanvasPlan:
        """The plan of the first canvas that `generate` makes with these options, without sampling, for one text."""
        alone = {"do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}
        found, *_ = self._options_of_call(None, {**options, **alone})
        return _plan(found, 0, min_new_tokens or found.min_new_tokens or 0, draws_tokens=False)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for YAN: continuous batching, `generate_batch` with it, swaps rows between tokens."""
        raise NotImplementedError("YAN has no continuous batching: call generate with a padded batch of prompts")

    continuous_batching_context_manager = generate_batch = init_continuous_batching

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Load generation_config.json as a `YanGenerationConfig`; a checkpoint without one keeps the defaults."""
        defaults = self.generation_config
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        loaded = self.generation_config
        is_missing = getattr(loaded, "_from_model_config", False)
        self.generation_config = defaults if is_missing else YanGenerationConfig.from_dict(loaded.to_dict())

    def _prepare_prompt(
        self,
        inputs: torch.Tensor | None,
        options: YanGenerationConfig,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Checked ids (B, S), and the context that they are; an empty batch of prompts becomes one BOS each."""
        if inputs is not None and input_ids is not None:
            raise ValueError("the prompt was given twice, as inputs and as input_ids")
        ids = inputs if inputs is not None else input_ids
        if ids is None:  # of a model that is offloaded, the weights are on no device
            device = getattr(getattr(self, "_hf_hook", None), "execution_device", self.device)
            ids = torch.empty(1, 0, dtype=torch.long, device=device)
        check_tensor(ids, "the prompt", "a tensor of integers (B, S), int64 or int32, B at least 1", 2)
        check_device(ids, "the prompt", self)
        if ids.shape[1] == 0:
            if options.bos_token_id is None:
                raise ValueError("an empty prompt needs bos_token_id, which is None")
            ids, attention_mask = torch.full((len(ids), 1), options.bos_token_id, device=ids.device), None
        if attention_mask is None:
            attention_mask = without_padding(ids, options)
        check_mask(attention_mask, ids.shape)
        check_device(attention_mask, "attention_mask", self)
        # on the host, where a check costs less than a launch
        host_mask, fewest, most = attention_mask.cpu(), ids.shape[1], ids.shape[1]
        if not host_mask.all():
            fewest, most = (int(number) for number in _count_valid(host_mask != 0))
        low, high = (int(number) for number in ids.cpu().aminmax())
        check_range(low, high, self.config.vocab_size)
        check_length(self.config, max(most, 1), "the prompt", self.config.num_answer_slots)
        if fewest > 0:
            return ids, *_left_align(ids, attention_mask, fewest, most)
        if options.bos_token_id is None:
            raise ValueError("a prompt without valid token needs bos_token_id, which is None")
        is_empty = ~attention_mask.bool().any(1)
        ids, attention_mask = ids.clone(), attention_mask.clone()
        ids[is_empty, -1], attention_mask[is_empty, -1] = options.bos_token_id, 1
        return ids, *_left_align(ids, attention_mask, 1, max(most, 1))

    def _solve_canvas(
        self,
        context: torch.Tensor,
        context_mask: torch.Tensor | None,
        options: YanGenerationConfig,
        seed: int,
        index: int,
        num_without_eos: int,
        streamer: Streamer | None,
    ) -> Canvas:
        """The canvas number `index` after the context (B or B R, S), eager or compiled."""
        draws_tokens = options.do_sample and self._draws_tokens()
        draws_tokens = draws_tokens and (options.crf_decoding or self.graph is not None)
        plan = _plan(options, index, num_without_eos, draws_tokens)
        noise = self._draw_noise(plan.repeats * len(context), options, seed + index, draws_tokens, context.device)
        on_draft = None
        put_draft = getattr(streamer, "put_draft", None)
        if put_draft is not None:
            on_draft = lambda tokens: put_draft(tokens.cpu())  # noqa: E731
        if options.compile_config is not None and not options.disable_compile and on_draft is None:
            return self._solve_compiled(context, context_mask, noise, plan, options.compile_config)
        return encode_and_solve(self, context, context_mask, *noise, plan, on_draft)

    def _draw_noise(
        self, num_rows: int, options: YanGenerationConfig, seed: int, draws_tokens: bool, device: torch.device
    ) -> CanvasNoise:
        """All that is drawn for a canvas of `num_rows`; without sampling, they share one noise."""
        shape = num_rows if options.do_sample else 1, self.config.num_vertices(options.canvas_length)
        if options.do_sample:
            x_0 = options.temperature * self.start_noise(shape, torch.empty(0, device=device), seed)
        else:
            x_0 = _shared_noise(seed, (*shape, self.config.hidden_size), device, self.config.init_noise)
        uniform = ranks = tokens = None
        if options.expert_choice == "sample":
            # of another seed than the start noise, or the expert would be a function of it
            uniform = hashed_uniform(seed ^ 0x5EED5EED, (*shape, self.config.num_experts), device)
        elif options.expert_choice == "ranked":
            ranks = torch.arange(options.num_return_sequences, device=device)
            ranks = ranks.repeat(num_rows // len(ranks)).unsqueeze(1)
        if draws_tokens and self.transitions is not None:
            tokens = hashed_uniform(seed ^ 0x70CE70CE, (*shape, self.transitions.num_candidates), device)
        if draws_tokens and self.graph is not None:
            tokens = hashed_uniform(seed ^ 0x70CE70CE, (num_rows, options.canvas_length, UNIFORMS), device)
        return CanvasNoise(x_0, uniform, ranks, tokens)

    def _draws_tokens(self) -> bool:
        """Whether sampling draws the tokens of the CRF or of a path, too: if they were trained as a distribution."""
        has_joint = self.transitions is not None or self.graph is not None
        return has_joint and self.config.train_expert_choice == "posterior"

    def _solve_compiled(
        self,
        context: torch.Tensor,
        context_mask: torch.Tensor | None,
        noise: CanvasNoise,
        plan: CanvasPlan,
        compile_config: CompileConfig,
    ) -> Canvas:
        """The same by a compiled program; the context is padded to a length that there is a program for."""
        length = context.shape[1]
        bucket = min(-(-length // PROMPT_BUCKET) * PROMPT_BUCKET, self.config.max_prompt_length)
        if length < bucket:
            context_mask = torch.ones_like(context) if context_mask is None else context_mask
            context, context_mask = (F.pad(tensor, (0, bucket - length)) for tensor in (context, context_mask))

        def solve(*tensors: torch.Tensor | None) -> dict[str, Any]:
            settings = _compiler_settings(compile_config)
            with torch._dynamo.config.patch(**TRACER_SETTINGS), merging():
                return vars(compiled_program(settings)(self, *tensors, plan))

        tensors = context, context_mask, *noise
        if context.device.type != "cuda":
            return Canvas(**solve(*tensors))
        self._cuda_graphs = self._cuda_graphs or CudaGraphCache()
        return Canvas(**self._cuda_graphs.call(self, solve, tensors, (plan, repr(compile_config))))

    def _check_generated(self, tokens: torch.Tensor) -> None:
        """Raise FloatingPointError for tokens of -1, which come from numbers that are none."""
        if tokens.numel() and int(tokens.min()) < 0:
            found = not_finite_weights(self) or "all weights are finite"
            raise FloatingPointError(f"no text can be decoded from numbers that are not finite: {found}")

    def _extend_context(
        self,
        context: torch.Tensor,
        context_mask: torch.Tensor | None,
        tokens: torch.Tensor,
        options: YanGenerationConfig,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context and mask for the next canvas, left-aligned and at most `max_prompt_length` long."""
        self._check_generated(tokens)
        repeats = len(tokens) // len(context)
        ids = torch.cat([context.repeat_interleave(repeats, 0), tokens], dim=1)
        # Padding after the EOS of a finished row is masked; its further canvases are thrown away.
        is_valid = without_padding(tokens, options)
        context_mask = torch.ones_like(context) if context_mask is None else context_mask
        mask = torch.cat([context_mask.repeat_interleave(repeats, 0), is_valid], dim=1)
        positions_from_end = mask.flip(1).cumsum(1).flip(1)
        mask = mask * (positions_from_end <= self.config.max_prompt_length)
        return _left_align(ids, mask, *torch.stack(_count_valid(mask)).tolist())


def compiled_program(settings: dict[str, Any]) -> Callable[..., Canvas]:
    """`encode_and_solve` compiled with these settings; torch keeps a program for every model, plan and shape."""
    key = repr(settings)
    if key not in _programs:
        _programs[key] = torch.compile(encode_and_solve, **settings)
    return _programs[key]


def _compiler_settings(compile_config: CompileConfig) -> dict[str, Any]:
    """Arguments of `torch.compile`: a program for every shape, which need not record CUDA graphs of its parts."""
    settings: dict[str, Any] = {**compile_config.to_dict(), "dynamic": bool(compile_config.dynamic)}
    if settings.get("options"):
        settings["options"] = {**settings["options"], "triton.cudagraphs": False}
    return {**settings, "mode": MODES_WITHOUT_GRAPHS.get(settings.get("mode"), settings.get("mode"))}


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _shared_noise(seed: int, shape: tuple[int, ...], device: torch.device, deviation: float) -> torch.Tensor:
    """Normal numbers, remembered: deterministic generation begins every time with the same."""
    return deviation * hashed_normal(seed, shape, device)


def _plan(options: YanGenerationConfig, index: int, num_without_eos: int, draws_tokens: bool) -> CanvasPlan:
    draws = options.do_sample and (draws_tokens or options.expert_choice == "sample")  # else it scales noise alone
    return CanvasPlan(
        num_flow_steps=options.num_flow_steps,
        expert_choice=options.expert_choice,
        repeats=options.num_return_sequences if index == 0 else 1,
        suppressed=tuple(options.suppress_tokens or ()),
        eos=tuple(eos_ids(options)),
        num_without_eos=min(max(num_without_eos, 0), options.canvas_length),
        keep_path=bool(options.return_dict_in_generate),
        eos_strategy=options.eos_strategy,
        crf_decoding=options.crf_decoding,
        length_penalty=1.0 if options.length_penalty is None else float(options.length_penalty),
        temperature=options.temperature if draws else 1.0,
    )


def _draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=getattr(generator, "device", None)))


def _count_valid(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fewest and most valid tokens of a row."""
    return mask.sum(1).aminmax()


def _left_align(
    ids: torch.Tensor, mask: torch.Tensor, fewest: int, most: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The valid tokens of every row, `fewest` to `most` of them, moved to its start, the width cut to the longest row.

    The mask is None where all that is left is valid: attention without one is faster.
    """
    if fewest < ids.shape[1]:
        mask = mask.bool().long()
        order = (1 - mask).argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order)[:, :most], mask.gather(1, order)[:, :most]
    return ids, mask if fewest < most else None


def _output(sequences: torch.Tensor, num_tokens: torch.Tensor, canvases: list[Canvas]) -> YanGenerationOutput:
    num_passes = sum(canvas.num_trunk_passes for canvas in canvases)
    return YanGenerationOutput(
        sequences=sequences,
        tokens_per_forward=num_tokens / max(num_passes, 1),
        num_trunk_passes=num_passes,
        **{name: _of_each(canvases, name) for name in ("trajectory", "experts", "gate")},
    )


def _of_each(canvases: list[Canvas], name: str) -> tuple[torch.Tensor, ...] | None:
    """What every canvas has by this name; None if they have it not."""
    values = tuple(getattr(canvas, name) for canvas in canvases)
    return None if values[0] is None else values
