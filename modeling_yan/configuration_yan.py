"""Configuration of YAN, a language model that writes a whole text in a few flow-matching steps (arXiv 2604.15009)."""

import math
import sys

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)
# What LoRA adapts where its config names no layers: those of the flow, in both backbones, and its experts.
LORA_MODULES = (
    r"flow\.(layers|experts)\..*\.(q_proj|k_proj|v_proj|o_proj|in_proj|x_proj|dt_proj|out_proj|up_proj|down_proj)"
)

CHOICES = {
    "encoder_mixer": ("attention", "mamba"),
    "flow_mixer": ("attention", "mamba"),
    "expert_scope": ("token", "sequence", "chain"),
    "train_expert_choice": ("argmax", "sample", "posterior"),
}
POSITIVE_FIELDS = (
    "vocab_size hidden_size num_attention_heads intermediate_size num_encoder_layers num_flow_layers "
    "num_decoder_layers max_position_embeddings state_size conv_kernel expand time_step_rank "
    "num_experts flow_sigma gate_temperature init_noise time_alpha time_beta canvas_length "
    "max_span_len layer_norm_eps initializer_range "
    "transition_candidates gate_rank"
).split()
NON_NEGATIVE_FIELDS = (
    "latent_noise nll_weight mse_weight ce_weight text_weight draft_weight gate_entropy_weight "
    "load_balance_weight mmd_weight latent_norm_weight transition_weight"
).split()
PROBABILITY_FIELDS = ("hidden_dropout attention_dropout decoder_dropout mask_ratio").split()
TOKEN_ID_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
DEPTH_FIELDS = ("num_encoder_layers", "num_flow_layers", "num_decoder_layers", "num_experts")
MOST_PARTS = 4096  # of one kind in a model: a number of parts out of a damaged file would keep it building for ever
MOST = 2**31 - 1  # of everything that is counted

LAST_VERSION = "0.1"  # that had the fields and options below
# What is gone, with the value that asked for nothing, and whether no other one can change what a model writes.
REMOVED = {
    "self_conditioning": (False, False),
    "start_point": ("noise", False),
    "use_bias": (False, False),
    "use_conv_bias": (True, False),
    "time_step_min": (0.001, True),
    "time_step_max": (0.1, True),
    "time_step_floor": (1e-4, True),
    "source_mask_ratio": (0.0, True),
    "detach_transitions": (False, True),
    "expert_exploration": (0.15, True),
    "gate_weight": (1.0, True),
    "commit_threshold": ("off", True),  # of generation: without effect but in a model with self_conditioning
}
REMOVED_CHOICES = {"train_expert_choice": ("likeliest", "mixture")}  # training alone knows them


def drop_removed(fields: dict):
    """Take out of the fields of a config what this version no longer has.

    Raises:
        ValueError: One of them has a value with which the model would write something else.
    """
    for name in [name for name in REMOVED if name in fields]:
        value, (harmless, is_ignored) = fields.pop(name), REMOVED[name]
        if value is None or value == harmless:
            continue
        if not is_ignored:
            allowed = f"{harmless!r}, or left out; version {LAST_VERSION} was the last that had others"
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        logger.warning_once(f"{name}={value!r}: ignored, version {LAST_VERSION} was the last that had it.")


def replace_removed_choices(config):
    """Give a config its default where it has a choice that this version no longer has."""
    for name, choices in REMOVED_CHOICES.items():
        value, default = getattr(config, name), getattr(type(config), name)
        if value in choices:
            logger.warning_once(
                f"{name}={value!r}: replaced by {default!r}, version {LAST_VERSION} was the last that had it."
            )
            setattr(config, name, default)


def with_plain_errors(cls):
    """Let a field of a wrong type raise a TypeError, which everyone expects, too."""
    assign = cls.__setattr__

    def __setattr__(self, name, value):
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise YanFieldTypeError(name, error.__cause__ or error) from error

    cls.__setattr__ = __setattr__
    return cls


class YanFieldTypeError(StrictDataclassFieldValidationError, TypeError):
    """A field of a config has a value of a type that it cannot have."""


@with_plain_errors
@strict
class YanConfig(PreTrainedConfig):
    r"""Sizes, choices and loss weights of a YAN model.

    Args:
        vocab_size: Number of tokens V.
        hidden_size: Width d of every latent, shared by encoder, flow and decoder.
        intermediate_size: Width of the feed-forward layers; `4 * hidden_size` if None.
        moe_intermediate_size: Width of each expert head; `intermediate_size` if None. `num_experts` of them
            have as many parameters as others of another number that are together as wide.
        num_encoder_layers, num_flow_layers, num_decoder_layers: Depth of each part. The decoder has no self-mixer.
        num_attention_heads: Heads of self- and cross-attention; must divide `hidden_size`.
        encoder: Config of a pretrained text encoder of transformers, or a dictionary of it, instead of YAN's own, for
            which None stands. It has its own sizes: `num_encoder_layers`, `encoder_mixer` and what belongs to it are
            then without effect. See `from_encoder_pretrained`.
        encoder_name: Name of that encoder on the hub, for the model card.
        encoder_mixer, flow_mixer: `"attention"` or `"mamba"` (bidirectional Mamba-1), chosen independently.
        attention_conv_kernel: Width of a depthwise convolution before self-attention, in tokens, odd; 0 for none. It
            lets a token know its neighbours, which attention to learned positions is slow to find.
        cross_attention_layers: Flow layers (0-based) that attend to the encoded prompt; all of them if None.
        max_position_embeddings: Longest prompt, its answer slots included, and longest canvas, in tokens.
        state_size, conv_kernel, expand, time_step_rank: As in transformers' `MambaConfig`; `time_step_rank` is
            `ceil(hidden_size / 16)` if None.
        num_experts: Number K of velocity experts; K = 1 is ordinary flow matching.
        share_expert_head: Whether all experts are one head of `moe_intermediate_size` that a learned embedding of the
            expert conditions. K experts then cost as much as one, in parameters and in the time of a text.
        flow_sigma: Standard deviation of each expert's Gaussian in the mixture likelihood.
        gate_temperature: The gate's logits are divided by it.
        init_noise: Standard deviation of the noise in the start point x0.
        latent_noise: Upper end of the uniform noise level that training adds to encoder latents, per sequence.
        time_alpha, time_beta: Training times are drawn from Beta(time_alpha, time_beta).
        num_answer_slots: Mask tokens that the model puts before every prompt by itself. The encoder writes a first
            draft of the answer in their places; with `canvas_length` of them it can be read off without a flow.
        canvas_length: Tokens written at once. A target that ends earlier is filled with EOS up to here.
        num_flow_steps: Default number of solver steps. 0, one pass without a flow, needs answer slots for the canvas
            and `train_expert_choice="posterior"`, here and in the next two, which are 0 together.
        min_train_flow_steps, max_train_flow_steps: Training solves with a number of steps drawn uniformly from here.
        transition_rank: Rank R of the scores of neighbouring tokens, with which a canvas is read off as one chain; 0
            to read every token by itself.
        transition_candidates: Likeliest tokens of each place that take part in the chain.
        expert_scope: Whether every `"token"` has an expert of its own, as in the paper, or a `"sequence"` has one for
            all its tokens, which then agree on one of several possible texts. In a `"chain"` each token's expert
            depends on the expert of the token before it: a hidden Markov model with K^L paths.
        gate_rank: Rank of the gate's scores for experts of neighbouring tokens, with `expert_scope="chain"`.
        train_expert_choice: How the solver of the training objective picks an expert: `"sample"` from the gate, as
            in the paper, or its `"argmax"`. `"posterior"` maximises the likelihood of the target's tokens, summed over
            all experts (`text_loss`), and goes on with experts drawn from their posterior: the experts share the
            possible targets out among them. A model with `expert_scope="chain"` needs it. The velocity's likelihood
            and the gate's own losses (`nll_weight`, `gate_entropy_weight`, `load_balance_weight`) have no part in it.
        mask_ratio, max_span_len: Text infilling of the autoencoder stage: share of tokens masked, longest span.
        freeze_encoder, freeze_decoder, freeze_embeddings, freeze_flow: Parts that the flow stage leaves as they are.
            With all of them frozen, it trains the transitions of a finished model.
        detach_target_latents: Whether x1 = E(y) is a constant for the flow stage. If False and the encoder is
            trained, `mmd_weight` and `latent_norm_weight` keep the latents from collapsing.
        nll_weight, mse_weight, ce_weight, text_weight, draft_weight, transition_weight: Weights of the loss terms, at
            least 0. Likelihood and squared error count per latent dimension, so that one set of weights serves every
            width.
        gate_entropy_weight, load_balance_weight, mmd_weight, latent_norm_weight: Weights of the terms of
            gate and latents, at least 0.

    Raises:
        ValueError: A field has a value that is not allowed; the message names field, value and what is allowed.
        TypeError: A field has a value of another type; the message names them, too.
    """

    model_type = "yan"
    sub_configs = {"encoder": AutoConfig}
    attribute_map = {"num_hidden_layers": "num_encoder_layers"}
    keys_to_ignore_at_inference = [
        "nll_loss",
        "nll_loss_per_dim",
        "mse_loss",
        "ce_loss",
        "text_loss",
        "draft_loss",
        "transition_loss",
        "gate_entropy",
        "expert_usage",
        "load_balance_loss",
        "mmd_loss",
        "latent_norm_loss",
        "latents",
        "hidden_states",
        "attentions",
    ]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    num_encoder_layers: int = 8
    num_flow_layers: int = 8
    num_decoder_layers: int = 2
    num_attention_heads: int = 12
    encoder: dict | PreTrainedConfig | None = None
    encoder_name: str | None = None
    encoder_mixer: str = "attention"
    flow_mixer: str = "attention"
    attention_conv_kernel: int = 0
    cross_attention_layers: list[int] | None = None
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    decoder_dropout: float | int = 0.1
    tie_word_embeddings: bool = False

    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | None = None

    num_experts: int = 4
    flow_sigma: float | int = 1.0
    gate_temperature: float | int = 1.0
    init_noise: float | int = 1.0
    latent_noise: float | int = 0.0
    time_alpha: float | int = 1.0
    time_beta: float | int = 1.0
    num_answer_slots: int = 0
    canvas_length: int = 128
    num_flow_steps: int = 3
    min_train_flow_steps: int = 1
    max_train_flow_steps: int = 4
    transition_rank: int = 0
    transition_candidates: int = 16
    share_expert_head: bool = False
    expert_scope: str = "token"
    gate_rank: int = 64
    train_expert_choice: str = "sample"
    mask_ratio: float | int = 0.15
    max_span_len: int = 3

    freeze_encoder: bool = True
    freeze_decoder: bool = True
    freeze_embeddings: bool = True
    freeze_flow: bool = False
    detach_target_latents: bool = True
    nll_weight: float | int = 1.0
    mse_weight: float | int = 1.0
    ce_weight: float | int = 1.0
    text_weight: float | int = 1.0
    draft_weight: float | int = 0.5
    transition_weight: float | int = 1.0
    gate_entropy_weight: float | int = 0.01
    load_balance_weight: float | int = 0.1
    mmd_weight: float | int = 0.0
    latent_norm_weight: float | int = 0.0

    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    mask_token_id: int | None = 3

    def __post_init__(self, **kwargs):
        drop_removed(kwargs)
        replace_removed_choices(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        if isinstance(self.encoder, dict):
            self.encoder = _encoder_config(self.encoder)
        known = set(dir(self))
        super().__post_init__(**kwargs)
        unknown = sorted(
            set(kwargs) & set(vars(self)) - known - {"auto_map", "custom_pipelines", "quantization_config"}
        )
        unknown = [name for name in unknown if not name.startswith("_")]
        if unknown:
            logger.warning(f"YanConfig has no field {', '.join(unknown)}; kept as plain attributes without effect.")
        self.validate_fields()  # here for a plain ValueError; transformers calls it again before saving

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, but a config of another model raises a ValueError."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type={model_type!r}: a YAN model needs a config of model_type {cls.model_type!r}")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        """As in transformers. PEFT, which asks for the fields before it adapts a model, then knows its layers."""
        if "peft.utils.constants" in sys.modules:
            known = sys.modules["peft.utils.constants"].TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            known.setdefault(self.model_type, LORA_MODULES)
        return super().to_dict()

    def validate_fields(self):
        """Check every number against its range, then the fields that depend on one another."""
        self._check_ranges()
        self._check_choices()

    def _check_ranges(self):
        for name in POSITIVE_FIELDS:
            self._require(name, lambda value: 0 < value <= MOST, f"greater than 0 and at most {MOST}")
        for name in NON_NEGATIVE_FIELDS:
            self._require(name, lambda value: 0 <= value <= MOST, f"at least 0 and at most {MOST}")
        for name in DEPTH_FIELDS:
            self._require(name, lambda value: value <= MOST_PARTS, f"at most {MOST_PARTS}")
        for name in PROBABILITY_FIELDS:
            self._require(name, lambda value: 0 <= value < 1, "in [0, 1)")
        for name in TOKEN_ID_FIELDS:
            if getattr(self, name) is not None:
                self._require(
                    name, lambda value: 0 <= value < self.vocab_size, f"in [0, vocab_size={self.vocab_size})"
                )

    def _check_choices(self):
        for name, choices in CHOICES.items():
            self._require(name, choices.__contains__, f"one of {', '.join(choices)}")
        if self.expert_scope == "chain":
            self._require("train_expert_choice", "posterior".__eq__, "'posterior' with expert_scope='chain'")
        heads = f"a divisor of hidden_size={self.hidden_size}"
        self._require("num_attention_heads", lambda value: self.hidden_size % value == 0, heads)
        width = f"None or greater than 0 and at most {MOST}"
        self._require("moe_intermediate_size", lambda value: value is None or 0 < value <= MOST, width)
        slots = f"0 to below max_position_embeddings={self.max_position_embeddings}, and 0 without mask_token_id"
        has_slots = self.mask_token_id is not None or self.encoder is not None
        most = self.max_position_embeddings if has_slots else 1
        self._require("num_answer_slots", lambda value: 0 <= value < most, slots)
        self._require("transition_rank", lambda value: 0 <= value <= MOST, f"at least 0 and at most {MOST}")
        odd = "0 or a positive odd number"
        self._require("attention_conv_kernel", lambda value: value == 0 or (0 < value <= MOST and value % 2), odd)
        layers, depth = self.cross_attention_layers, self.num_flow_layers
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            raise ValueError(f"cross_attention_layers={layers}: must be None or a non-empty list without repetition")
        self._require(
            "cross_attention_layers",
            lambda value: value is None or all(0 <= layer < depth for layer in value),
            f"None or layers in [0, num_flow_layers={depth})",
        )
        if self.encoder is not None:
            vocabulary = f"the encoder's {self.encoder.vocab_size}"
            self._require("vocab_size", self.encoder.vocab_size.__eq__, vocabulary)
        longest = f"at most max_position_embeddings={self.max_position_embeddings}"
        self._require("canvas_length", lambda value: value <= self.max_position_embeddings, longest)
        can_do_without = self.num_answer_slots >= self.canvas_length and self.train_expert_choice == "posterior"
        least = 0 if can_do_without else 1
        steps = (
            f"at least {least}" + " without answer slots for the canvas and train_expert_choice='posterior'" * least
        )
        for name in ("num_flow_steps", "min_train_flow_steps"):
            self._require(name, lambda value: least <= value <= MOST, f"{steps}, and at most {MOST}")
        alone = "1 or more, or 0 as max_train_flow_steps: a flow is trained in every update, or in none"
        self._require("min_train_flow_steps", lambda value: value > 0 or self.max_train_flow_steps == 0, alone)
        fewest = f"at least min_train_flow_steps={self.min_train_flow_steps}"
        self._require("max_train_flow_steps", lambda value: value >= self.min_train_flow_steps, fewest)

    def _require(self, name, is_allowed, allowed):
        value = getattr(self, name)
        if not is_allowed(value):
            raise ValueError(f"{name}={value!r}: must be {allowed}")

    @property
    def flow_layers_with_cross_attention(self) -> list[int]:
        """The flow layers that attend to the prompt, in order."""
        return sorted(self.cross_attention_layers or range(self.num_flow_layers))

    @property
    def word_embedding_size(self) -> int:
        """Width of the input embeddings, which may be another than that of the latents in a pretrained encoder."""
        if self.encoder is None:
            return self.hidden_size
        names = ("input_embedding_size", "embedding_size", "hidden_size")
        return next(size for name in names if (size := getattr(self.encoder, name, None)))

    @property
    def max_prompt_length(self) -> int:
        """Longest prompt, in tokens, beside the model's own answer slots."""
        return self.max_position_embeddings - self.num_answer_slots

    @property
    def expert_intermediate_size(self) -> int:
        """Width of each expert head, `moe_intermediate_size` if there is one."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def mamba_intermediate_size(self) -> int:
        """Width of the Mamba mixer between its projections, `expand * hidden_size`."""
        return self.expand * self.hidden_size


def _encoder_config(fields: dict) -> PreTrainedConfig:
    """The config of an encoder that transformers knows, from its fields."""
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"encoder of model_type={model_type!r}: must be a model type that transformers knows")
    return AutoConfig.for_model(**fields)


__all__ = ["YanConfig"]
