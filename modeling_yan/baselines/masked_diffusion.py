"""Masked diffusion: a bidirectional transformer that unmasks a canvas, the surest tokens first.

The objective is that of LLaDA (arXiv 2502.09992, algorithm 2), the sampler its low-confidence remasking (algorithm 5).
Letters: B batch, S prompt length, L canvas length, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.llama.modeling_llama import LlamaAttention

from ..checks_yan import IGNORE_INDEX
from .convolution import ConvolvedLlama
from .inputs import pad_left

MIN_MASKED_SHARE = 1e-3  # the weight 1 / t of a token must stay finite
# What a caller of token-by-token decoding hands in, and the only values that mean something here.
NEUTRAL_OPTIONS = {
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, False, True),
}


class MaskedDiffusionConfig(LlamaConfig):
    """A `LlamaConfig` without causal mask, with the canvas that a text is generated on.

    Args:
        mask_token_id: The absorbing token. eos_token_id: Fills the canvas after a text.
        canvas_length: Longest canvas. num_diffusion_steps: Steps of `generate` unless it is told otherwise.
        attention_conv_kernel: Width of a short convolution before self-attention, in tokens, odd; 0 for none.
    """

    model_type = "yan-masked-diffusion"

    is_causal: bool = False
    mask_token_id: int = 3
    canvas_length: int = 32
    num_diffusion_steps: int = 16
    attention_conv_kernel: int = 0


class MaskedDiffusion(PreTrainedModel):
    """Llama's layers, seeing both ways over prompt and canvas, with a head for the masked tokens of the canvas.

    Apart from what its tokens see it is the network of the autoregressive baseline, so that the two differ in nothing
    but the way of writing.
    """

    config_class = MaskedDiffusionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = True

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.model = ConvolvedLlama(config) if config.attention_conv_kernel else LlamaModel(config)
        for module in self.model.modules():
            if isinstance(module, LlamaAttention):
                module.is_causal = False  # where there is no padding there is no mask, and sdpa would be causal
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        token_ids = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        self.generation_config = GenerationConfig(**token_ids, max_new_tokens=config.canvas_length)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        canvas_length: int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """The objective on targets `labels` (B, Lt), or the logits (B, L, V) of a canvas of masks after the prompt.

        A share t ~ U(0, 1) of each row's canvas is masked, and the masked tokens' cross-entropy weighs 1 / t; the
        loss is the mean over the canvas, in nats. The canvas is the target, -100 and all after it filled with EOS.

        Args:
            input_ids: Prompts (B, S). attention_mask: (B, S), 0 on padding, which may be on either side.
            canvas_length: L, at least Lt; the model's if None.

        Raises:
            ValueError: A canvas that is not 1 to the model's `canvas_length`, or labels that do not fit into it.
        """
        length = self._check_canvas(self.config.canvas_length if canvas_length is None else canvas_length)
        prompt, mask = _pad_prompt(input_ids, attention_mask)
        if labels is None:
            canvas = input_ids.new_full((len(input_ids), length), self.config.mask_token_id)
            return MaskedLMOutput(logits=self.canvas_logits(prompt, mask, canvas))
        target = self._fill(labels, length)
        share = torch.rand(len(target), 1, device=target.device).clamp(min=MIN_MASKED_SHARE)
        is_masked = torch.rand(target.shape, device=target.device) < share
        logits = self.canvas_logits(prompt, mask, target.masked_fill(is_masked, self.config.mask_token_id))
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        loss = (losses.view(target.shape) * is_masked / share).mean()
        return MaskedLMOutput(loss=loss, logits=logits[:, : labels.shape[1]])

    def canvas_logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, canvas: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, L, V) of a canvas (B, L) after prompts (B, S) that are padded on the left."""
        mask = torch.cat([attention_mask, torch.ones_like(canvas)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ids = torch.cat([input_ids, canvas], dim=1)
        states = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        return self.lm_head(states[:, -canvas.shape[1] :])

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        num_diffusion_steps: int | None = None,
        min_new_tokens: int = 0,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Unmask `max_new_tokens` tokens in `num_diffusion_steps` equal steps; prompt and new tokens (B, S + L).

        Every step predicts all masked tokens and keeps those of the highest probability; there are at most as many
        steps as tokens. Deterministic. Behind the first EOS comes padding. The first `min_new_tokens` are no EOS.

        Raises:
            ValueError: More tokens than the canvas has, steps below 1, or an option that this model does not have.
        """
        length = self._check_canvas(self.config.canvas_length if max_new_tokens is None else max_new_tokens)
        steps = self.config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps
        steps = _check_steps(steps, length)
        _check_options(kwargs)
        prompt, mask = _pad_prompt(input_ids, attention_mask)
        canvas = input_ids.new_full((len(input_ids), length), self.config.mask_token_id)
        for step in range(steps):
            logits = self.canvas_logits(prompt, mask, canvas)
            logits[..., self.config.mask_token_id] = -torch.inf
            logits[:, : min_new_tokens or 0, self.config.eos_token_id] = -torch.inf
            canvas = self._unmask(canvas, logits, length * (step + 1) // steps)
        is_eos = canvas == self.config.eos_token_id
        canvas = canvas.masked_fill(is_eos.cumsum(1) - is_eos.long() > 0, self.config.pad_token_id)
        return torch.cat([input_ids, canvas], dim=1)

    def _unmask(self, canvas: torch.Tensor, logits: torch.Tensor, num_known: int) -> torch.Tensor:
        """The canvas with its known tokens and the most probable of the masked ones, `num_known` in all."""
        is_known = canvas != self.config.mask_token_id
        confidence, tokens = logits.float().softmax(-1).max(-1)
        chosen = confidence.masked_fill(is_known, torch.inf).topk(num_known, dim=1).indices
        tokens = torch.where(is_known, canvas, tokens)
        return torch.full_like(canvas, self.config.mask_token_id).scatter(1, chosen, tokens.gather(1, chosen))

    def _fill(self, labels: torch.Tensor, length: int) -> torch.Tensor:
        """Targets (B, Lt) as a canvas (B, L), with EOS after them."""
        if labels.shape[1] > length:
            raise ValueError(f"labels of {labels.shape[1]} tokens: must be at most the canvas of {length}")
        labels = labels.masked_fill(labels == IGNORE_INDEX, self.config.eos_token_id)
        return nn.functional.pad(labels, (0, length - labels.shape[1]), value=self.config.eos_token_id)

    def _check_canvas(self, length: int) -> int:
        longest = self.config.canvas_length
        if not 0 < length <= longest:
            raise ValueError(f"a canvas of {length} tokens: must be 1 to canvas_length={longest}")
        return length


def _pad_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and mask (B, S) with the padding on the left: prompt and canvas touch, which a convolution sees."""
    return pad_left(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)


def _check_steps(steps: int, length: int) -> int:
    if steps < 1:
        raise ValueError(f"num_diffusion_steps={steps}: must be at least 1")
    return min(steps, length)


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in NEUTRAL_OPTIONS:
            raise ValueError(f"generate of masked diffusion has no argument {name}")
        if value not in NEUTRAL_OPTIONS[name]:
            allowed = " or ".join(map(str, NEUTRAL_OPTIONS[name]))
            raise ValueError(f"{name}={value!r}: must be {allowed} for masked diffusion")


AutoConfig.register(MaskedDiffusionConfig.model_type, MaskedDiffusionConfig)
AutoModelForCausalLM.register(MaskedDiffusionConfig, MaskedDiffusion)
