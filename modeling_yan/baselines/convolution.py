"""Llama's and T5's layers with YAN's short convolution before their self-attention.

Letters: B batch, L sequence length, D hidden size.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5Stack

from ..layers_yan import YanShortConvolution
from ..mamba_yan import mask_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Base
else:
    Base = object  # the mixins stand before a model of transformers


class CausalShortConvolution(YanShortConvolution):
    """Adds to every token a depthwise convolution of it and those before it, as many tokens as the kernel is wide."""

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """States (B, L, D) to (B, L, D); `padding_mask` (B, L) is 0 on padding at either end."""
        visible = mask_padding(hidden_states, padding_mask).transpose(1, 2)
        visible = F.pad(visible, (self.kernel_size[0] - 1, 0))
        return hidden_states + F.conv1d(visible, self.weight, groups=self.groups).transpose(1, 2)


class ConvolvedAttention(nn.Module):
    """A self-attention of transformers after a short convolution, which looks where the attention may look."""

    def __init__(self, attention: nn.Module, hidden_size: int, kernel_size: int, is_causal: bool) -> None:
        super().__init__()
        convolution = CausalShortConvolution if is_causal else YanShortConvolution
        self.convolution = convolution(hidden_size, kernel_size)
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """What `attention` returns for the convolved states (B, L, D)."""
        return self.attention(self.convolution(hidden_states, padding_mask), **kwargs)


class Convolved(Base):
    """Mixin for a model that starts as it does in transformers."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Of classes that are not its own, transformers passes over modules without a parameter of their own as if they
        # had been initialised. But T5 scales its projections there: they would start with a deviation of 1.
        super()._initialize_weights(module)


class ConvolvedStack(Convolved):
    """Mixin for a stack of layers: hands the padding mask on to the convolutions inside, and starts them as YAN's."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, YanShortConvolution):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As without convolutions, for a mask (B, L).

        Raises:
            ValueError: `use_cache`.
        """
        if use_cache:  # the next token's convolution needs the states of those before it, not their keys and values
            raise ValueError("use_cache=True: must be False for a model with short convolutions")
        masks = {"attention_mask": attention_mask, "padding_mask": attention_mask}
        return super().forward(input_ids=input_ids, use_cache=False, **masks, **kwargs)


class ConvolvedLlama(ConvolvedStack, LlamaModel):
    """Llama's layers with convolutions that are causal unless the config says that the model is not."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        sizes = config.hidden_size, config.attention_conv_kernel
        layers: Iterable[Any] = self.layers
        for layer in layers:
            layer.self_attn = ConvolvedAttention(layer.self_attn, *sizes, getattr(config, "is_causal", True))
        self.post_init()


class ConvolvedT5Stack(ConvolvedStack, T5Stack):
    """T5's encoder or decoder with convolutions, causal in the decoder."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        sizes = config.d_model, config.attention_conv_kernel
        blocks: Iterable[Any] = self.block
        for layer in (block.layer[0] for block in blocks):
            layer.SelfAttention = ConvolvedAttention(layer.SelfAttention, *sizes, config.is_decoder)
        self.post_init()


class ConvolvedDecoderConfig(LlamaConfig):
    """A `LlamaConfig` with the width of the convolutions, in tokens, odd; the model has no cache."""

    model_type = "yan-convolved-decoder"

    attention_conv_kernel: int = 9
    use_cache: bool = False


class ConvolvedDecoder(Convolved, LlamaForCausalLM):
    """Llama with causal convolutions, which generates without a cache."""

    config_class = ConvolvedDecoderConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = ConvolvedLlama(config)
        self.post_init()


class ConvolvedEncoderDecoderConfig(T5Config):
    """A `T5Config` with the width of the convolutions, in tokens, odd; the model has no cache."""

    model_type = "yan-convolved-encoder-decoder"

    attention_conv_kernel: int = 9
    use_cache: bool = False


class ConvolvedEncoderDecoder(Convolved, T5ForConditionalGeneration):
    """T5 with convolutions, causal ones in the decoder, which generates without a cache."""

    config_class = ConvolvedEncoderDecoderConfig

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.encoder, self.decoder = (ConvolvedT5Stack(stack.config) for stack in (self.encoder, self.decoder))
        self.post_init()


for _model, _auto in ((ConvolvedDecoder, AutoModelForCausalLM), (ConvolvedEncoderDecoder, AutoModelForSeq2SeqLM)):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    _auto.register(_model.config_class, _model)
