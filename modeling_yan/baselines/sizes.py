"""Baselines with the width, the depth and the number of parameters of a YAN.

    python -m modeling_yan.baselines.sizes --config configuration/yan-transformer-tiny --num_experts 1 --output k1

writes the preset of plain flow matching, a YAN with one expert and wider feed-forward layers.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ..configuration_yan import YanConfig
from ..modeling_yan import YanForFlowGeneration
from .convolution import (
    ConvolvedDecoder,
    ConvolvedDecoderConfig,
    ConvolvedEncoderDecoder,
    ConvolvedEncoderDecoderConfig,
)
from .inputs import CONVOLVED
from .masked_diffusion import MaskedDiffusion, MaskedDiffusionConfig


def _decoder(config: YanConfig, intermediate_size: int, kernel_size: int = 0) -> PreTrainedModel:
    """Llama with full attention heads and tied embeddings."""
    settings = _llama(config, intermediate_size)
    if kernel_size:
        return ConvolvedDecoder(ConvolvedDecoderConfig(**settings, attention_conv_kernel=kernel_size))
    return LlamaForCausalLM(LlamaConfig(**settings))


def _masked_diffusion(config: YanConfig, intermediate_size: int, kernel_size: int = 0) -> PreTrainedModel:
    settings = _llama(config, intermediate_size)
    settings |= {name: getattr(config, name) for name in ("mask_token_id", "canvas_length")}
    return MaskedDiffusion(MaskedDiffusionConfig(**settings, attention_conv_kernel=kernel_size))


def _llama(config: YanConfig, intermediate_size: int) -> dict[str, Any]:
    return {
        **_common(config),
        "intermediate_size": intermediate_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_encoder_layers + config.num_flow_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings + config.canvas_length,
        "initializer_range": config.initializer_range,
    }


def _encoder_decoder(config: YanConfig, intermediate_size: int, kernel_size: int = 0) -> PreTrainedModel:
    """T5 with as many layers in encoder and decoder as YAN has in encoder and flow."""
    settings = {
        **_common(config),
        "d_model": config.hidden_size,
        "d_kv": config.hidden_size // config.num_attention_heads,
        "d_ff": intermediate_size,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_flow_layers,
        "num_heads": config.num_attention_heads,
        "decoder_start_token_id": config.pad_token_id,
        "dropout_rate": 0.0,
    }
    if kernel_size:
        return ConvolvedEncoderDecoder(ConvolvedEncoderDecoderConfig(**settings, attention_conv_kernel=kernel_size))
    return T5ForConditionalGeneration(T5Config(**settings))


def _pretrained_encoder_decoder(config: YanConfig, intermediate_size: int) -> PreTrainedModel:
    """BERT's decoder with cross-attention on YAN's pretrained encoder, as wide as this and as deep as YAN's flow."""
    encoder = cast(PreTrainedConfig, config.encoder)
    decoder = BertConfig(
        **_common(config),
        hidden_size=encoder.hidden_size,
        num_hidden_layers=config.num_flow_layers,
        num_attention_heads=encoder.num_attention_heads,
        intermediate_size=intermediate_size,
        is_decoder=True,
        add_cross_attention=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    settings = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(settings, name, getattr(config, name))
    settings.decoder_start_token_id = config.bos_token_id
    # at every loss it warns of models that were trained by a version of 2021
    warnings.filterwarnings("ignore", "Version v4.12.0 introduces a better way", FutureWarning)
    return EncoderDecoderModel(settings)


def _common(config: YanConfig) -> dict[str, Any]:
    shared = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    return {"tie_word_embeddings": True, **{name: getattr(config, name) for name in shared}}


def _with_convolution(make: Callable[..., PreTrainedModel]) -> Callable[[YanConfig, int], PreTrainedModel]:
    return lambda config, intermediate_size: make(config, intermediate_size, config.attention_conv_kernel)


BASELINES: dict[str, Callable[[YanConfig, int], PreTrainedModel]] = {
    "decoder": _decoder,
    "encoder_decoder": _encoder_decoder,
    "masked_diffusion": _masked_diffusion,
}
BASELINES |= {name: _with_convolution(BASELINES[kind]) for name, kind in CONVOLVED.items()}


def make_baseline(kind: str, config: YanConfig) -> PreTrainedModel:
    """A freshly initialised baseline that is as large as a YAN of `config`.

    Width, heads and number of layers are YAN's, encoder and flow added up; the feed-forward layers' width is chosen so
    that the number of parameters comes as near to YAN's as it can. YAN's embeddings may be untied, the baselines' are
    always tied. On YAN's pretrained encoder the decoder's embeddings are its own, and come on top.

    Args:
        kind: A key of `BASELINES`. The self-attention of those in `CONVOLVED` sees, as YAN's does, a convolution of
            `attention_conv_kernel` tokens; where a token may not look ahead, of those before it.

    Raises:
        ValueError: An unknown kind, a YAN so small that no feed-forward layer fits, or one without convolution for a
            kind with it.
    """
    if kind not in BASELINES:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(BASELINES)}")
    if kind in CONVOLVED and not config.attention_conv_kernel:
        raise ValueError(f"kind={kind!r}: needs a config with attention_conv_kernel above 0, the convolution's width")
    make = BASELINES[kind]
    if config.encoder is not None and kind == "encoder_decoder":
        make = _pretrained_encoder_decoder
        size = count_parameters(config) + config.vocab_size * config.encoder.hidden_size
        return make(config, fit_width(lambda width: make(config, width), size, kind))
    return make(config, fit_width(lambda width: make(config, width), count_parameters(config), kind))


def match_size(config: YanConfig, **changes: Any) -> YanConfig:
    """`config` with `changes`, and its feed-forward layers so wide that the number of parameters stays.

    With `num_experts=1` that is plain flow matching.

    Raises:
        ValueError: A change that is not allowed, or that leaves no room for feed-forward layers.
    """

    def changed(width: int) -> YanConfig:
        return config.with_fields(**{**changes, "intermediate_size": width})

    return changed(fit_width(lambda width: YanForFlowGeneration(changed(width)), count_parameters(config), "YAN"))


def count_parameters(config: YanConfig) -> int:
    """Parameters of a `YanForFlowGeneration`, tied ones once."""
    with torch.device("meta"):
        return YanForFlowGeneration(config).num_parameters()


def fit_width(make: Callable[[int], PreTrainedModel], wanted: int, name: str) -> int:
    """The feed-forward width with which `make(width)` has about `wanted` parameters: their number is affine in it.

    Raises:
        ValueError: Even the narrowest is too large.
    """
    with torch.device("meta"):
        low, high = (make(width).num_parameters() for width in (1, 2))
    width = 1 + round((wanted - low) / (high - low))
    if width < 1:
        raise ValueError(f"a {name} of {wanted} parameters has no room for feed-forward layers: at least {low} needed")
    return width


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a preset of equal size from the command line."""
    parser = argparse.ArgumentParser(description="Write a YAN preset of another kind with the size of a given one.")
    parser.add_argument("--config", required=True, help="folder or hub name of a preset")
    parser.add_argument("--num_experts", type=int, help="1 is plain flow matching")
    parser.add_argument("--encoder_mixer", help="attention or mamba")
    parser.add_argument("--flow_mixer", help="attention or mamba")
    parser.add_argument("--output", required=True, help="folder of the new preset")
    options = vars(parser.parse_args(arguments))
    config, output = YanConfig.from_pretrained(options.pop("config")), options.pop("output")
    changes = {name: value for name, value in options.items() if value is not None}
    match_size(config, **changes).save_pretrained(output)


if __name__ == "__main__":
    main()
