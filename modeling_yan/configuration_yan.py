"""Configuration of YAN, a language model that generates a whole text in a few steps of flow matching."""

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .fields_yan import (
    MOST,
    drop_removed,
    replace_removed_choices,
    require,
    require_ranges,
    warn_of_unknown,
    with_plain_errors,
)
from .objective_config_yan import OBJECTIVE_NAMES, YanObjectiveConfig, as_objective, refuse_clash

# What LoRA adapts where its config names no layers: those of the flow, in both backbones. The experts are no layers:
# PEFT adapts their weights where they are named, as `target_parameters`.
LORA_MODULES = r"flow\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|in_proj|x_proj|dt_proj|out_proj|up_proj|down_proj)"
LORA_PARAMETERS = ["experts.heads.up_proj", "experts.heads.down_proj"]

CHOICES = {
    "encoder_mixer": ("attention", "mamba"),
    "flow_mixer": ("attention", "mamba"),
    "expert_scope": ("token", "sequence"),
    "train_expert_choice": ("argmax", "sample", "posterior"),
}
POSITIVE_FIELDS = (
    *("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "num_encoder_layers"),
    *("num_flow_layers", "num_decoder_layers", "max_position_embeddings", "state_size", "conv_kernel", "expand"),
    *("time_step_rank", "num_experts", "gate_temperature", "init_noise", "canvas_length"),
    *("layer_norm_eps", "initializer_range", "crf_candidates", "vertices_per_token"),
)
PROBABILITY_FIELDS = ("hidden_dropout", "attention_dropout", "decoder_dropout")
TOKEN_ID_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
DEPTH_FIELDS = ("num_encoder_layers", "num_flow_layers", "num_decoder_layers", "num_experts")
MOST_PARTS = 4096  # of one kind in a model: a number of parts out of a damaged file would keep it building for ever


@with_plain_errors
@strict
class YanConfig(PreTrainedConfig):
    r"""Sizes and choices of a YAN model; how it is trained is its `objective`.

    Section numbers are those of arXiv 2604.15009. The fields of the objective may be given, read and set here, too:
    `YanConfig(mse_weight=0.0)`, `config.mse_weight`.

    Args:
        vocab_size: Number of tokens V; at least 1, default 32000.
        hidden_size: Width D of every latent, shared by encoder, flow and decoder; at least 1, default 768.
        intermediate_size: Width of the feed-forward layers; at least 1, default `4 * hidden_size`.
        moe_intermediate_size: Width of each expert head; at least 1, default `intermediate_size`. Divide it by K to
            keep the number of parameters when you multiply `num_experts` by K.
        num_encoder_layers, num_flow_layers, num_decoder_layers: Depth of each part; at least 1, default 8, 8 and 2.
            The decoder has no self-mixer.
        num_attention_heads: Heads of self- and cross-attention; a divisor of `hidden_size`, default 12.
        encoder: Config of a pretrained text encoder of transformers, or a dictionary of it; default None, YAN's own
            encoder. A pretrained one has its own sizes: `num_encoder_layers`, `encoder_mixer` and what belongs to it
            then have no effect. See `from_encoder_pretrained`.
        encoder_name: Name of that encoder on the hub, for the model card; default None.
        encoder_mixer, flow_mixer: `"attention"` or `"mamba"` (bidirectional Mamba-1), chosen independently; default
            `"attention"`.
        attention_conv_kernel: Width of a depthwise convolution before self-attention, in tokens; odd, or 0 for none,
            the default. It shows each token its neighbours, which attention learns slowly from learned positions.
        cross_attention_layers: Indices of the flow layers that attend to the encoded prompt, in [0, num_flow_layers);
            default all.
        max_position_embeddings: Longest prompt, its answer slots included, and longest canvas, in tokens or vertices;
            at least 1, default 1024.
        layer_norm_eps: Added to the variance in every LayerNorm; above 0, default 1e-5.
        initializer_range: Standard deviation of fresh weights; above 0, default 0.02.
        hidden_dropout, attention_dropout, decoder_dropout: Dropout probabilities in [0, 1): after embeddings and
            mixers, default 0.0; of attention weights, default 0.0; of the latents that the decoder reads, default 0.1.
        tie_word_embeddings: Whether the language-model head is the table of input embeddings; default False.
        state_size, conv_kernel, expand, time_step_rank: As in transformers' `MambaConfig`; at least 1, default 16, 4,
            2 and `ceil(hidden_size / 16)`.
        num_experts: Number K of velocity experts; at least 1, default 4. K = 1 is ordinary flow matching (section 3).
        share_expert_head: Whether all experts share one head of width `moe_intermediate_size`, which a learned
            embedding of the expert conditions; default False. K experts then have nearly as many parameters as one.
            A text drawn at temperature 1 takes as long as with one expert. Without sampling all K texts are compared,
            which takes longer.
        expert_scope: Which tokens share an expert. `"token"`, the default: each token has its own, as in the paper.
            `"sequence"`: one expert generates the whole canvas.
        gate_temperature: The gate's logits are divided by it (section 3); above 0, default 1.0.
        init_noise: Standard deviation of the noise in the start point x0 (section 3); above 0, default 1.0.
        num_answer_slots: Mask tokens that the model puts before every prompt; below `max_position_embeddings`,
            default 0. The encoder's latents in these slots are a draft of the answer. The draft can be decoded without
            the flow if there are at least `canvas_length * vertices_per_token` slots.
        copy_prompt_to_slots: Whether the slots hold the prompt's first tokens instead of mask tokens (arXiv
            1711.02281), each `vertices_per_token` times; default False. It needs `num_answer_slots` above 0. Slots
            after the end of the prompt keep their mask tokens. Answers that follow the prompt word for word, such as
            translations, are then learned faster. Use it for answers of one canvas, because every further canvas gets
            the same slots.
        refine_draft: Whether the flow refines the encoder's draft; default False. Its trunk sees the draft at every
            step, and a head predicts what to add to it, which is zero before training. The start stays noise, while
            arXiv 2310.03725 couples it to the prompt. Train the encoder, too (`freeze_encoder=False`). It needs
            `num_answer_slots >= canvas_length * vertices_per_token` and `train_expert_choice="posterior"`.
        canvas_length: Tokens L generated at once; at most `max_position_embeddings / vertices_per_token`, default 128.
            EOS pads a shorter target to L tokens.
        num_flow_steps: Number N of Euler steps in generation; at least 0, default 3. 0 decodes the encoder's draft
            without the flow. It needs `num_answer_slots >= canvas_length * vertices_per_token` and
            `train_expert_choice="posterior"`. The objective's `min_train_flow_steps` and `max_train_flow_steps` may
            both be 0 under the same conditions.
        crf_rank: Rank R of the scores of neighbouring tokens, a linear-chain CRF that decodes the canvas; at least 0,
            default 0, which decodes every token independently.
        crf_candidates: Number of most probable tokens of each position that the CRF scores; at least 1, default 16.
        vertices_per_token: Number of vertices that the canvas has for each token; at least 1, default 1: every token
            has a fixed position. With more, a text is a path through the vertices along learned links (arXiv
            2205.07459, section 3). A link also depends on the token of the vertex before it. The text's probability is
            the sum over all paths. 2 suits texts about as long as the prompt. It needs
            `train_expert_choice="posterior"`, `crf_rank=0` and `mse_weight=0`. Several experts need
            `expert_scope="sequence"`.
        train_expert_choice: The objective, and the expert that its solver uses. `"sample"`, the default, draws the
            expert from the gate, with the losses of the paper (section 3). `"argmax"` takes the gate's most probable
            one, with the same losses. `"posterior"` maximises the likelihood of the target's tokens, summed over all
            experts (`text_loss`). It draws the expert from its posterior, so that different experts learn different
            targets. It has no `nll_weight`, `gate_entropy_weight` or `load_balance_weight`. The field is no part of
            `objective`, because generation depends on it, too.
        objective: How the model is trained: a `YanObjectiveConfig`, or a dictionary of its fields; default its own.
        pad_token_id, bos_token_id, eos_token_id, mask_token_id: In [0, vocab_size), or None; default 0, 1, 2 and 3.

    Raises:
        ValueError: A field has a value that is not allowed; the message names field, value and what is allowed. A
            field of the objective is given twice, with two values.
        TypeError: A field has a value of another type; the message names them, too.

    Example:

        >>> from modeling_yan import YanConfig
        >>> config = YanConfig(hidden_size=64, num_attention_heads=4, mse_weight=0.0)
        >>> config.intermediate_size, config.objective.mse_weight
        (256, 0.0)
    """

    model_type = "yan"
    sub_configs = {"encoder": AutoConfig, "objective": YanObjectiveConfig}
    attribute_map = {
        "num_hidden_layers": "num_encoder_layers",
        # the names of 0.1 and 0.2
        "transition_rank": "crf_rank",
        "transition_candidates": "crf_candidates",
    }
    keys_to_ignore_at_inference = [
        "nll_loss",
        "nll_loss_per_dim",
        "mse_loss",
        "ce_loss",
        "text_loss",
        "draft_loss",
        "crf_loss",
        "gate_entropy",
        "expert_usage",
        "expert_information",
        "load_balance_loss",
        "mmd_loss",
        "latent_norm_loss",
        "latents",
        "hidden_states",
        "attentions",
    ]

    vocab_size: int = 32000
    hidden_size: int = 768
    moe_intermediate_size: int | None = None
    num_encoder_layers: int = 8
    num_flow_layers: int = 8
    num_decoder_layers: int = 2
    num_attention_heads: int = 12
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

    num_experts: int = 4
    share_expert_head: bool = False
    expert_scope: str = "token"
    gate_temperature: float | int = 1.0
    init_noise: float | int = 1.0
    num_answer_slots: int = 0
    copy_prompt_to_slots: bool = False
    refine_draft: bool = False
    canvas_length: int = 128
    num_flow_steps: int = 3
    crf_rank: int = 0
    crf_candidates: int = 16
    vertices_per_token: int = 1
    train_expert_choice: str = "sample"

    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    mask_token_id: int | None = 3

    if not TYPE_CHECKING:  # what may be given
        intermediate_size: int | None = None
        time_step_rank: int | None = None
        encoder: dict | PreTrainedConfig | None = None
        objective: dict | PreTrainedConfig | None = None
    else:  # what `__post_init__` makes of it; fields of the objective are arguments, too
        intermediate_size: int
        time_step_rank: int
        encoder: PreTrainedConfig | None
        objective: YanObjectiveConfig

        def __init__(self, **fields: Any) -> None: ...

    def __post_init__(self, **kwargs: Any) -> None:
        drop_removed(kwargs)
        replace_removed_choices(self)
        flat = {name: kwargs.pop(name) for name in OBJECTIVE_NAMES if name in kwargs}
        refuse_clash(flat, self.objective)
        self.objective = as_objective(self.objective)
        for name, value in flat.items():
            setattr(self.objective, name, value)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        if isinstance(self.encoder, dict):
            self.encoder = _encoder_config(self.encoder)
        known = set(dir(self))
        super().__post_init__(**kwargs)
        warn_of_unknown(self, kwargs, known)
        self.validate_fields()  # here for a plain ValueError; transformers calls it again before saving

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.attribute_map:  # before the type of the field is checked
            setattr(self, self.attribute_map[name], value)
            return
        if name in OBJECTIVE_NAMES:
            setattr(self.objective, name, value)
            return
        if name == "objective" and name in vars(self):  # the first time is before `__post_init__`, which needs it raw
            value = as_objective(value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """The fields of the objective; nothing else comes here but what is missing."""
        if name in OBJECTIVE_NAMES and "objective" in vars(self):
            return getattr(self.objective, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def with_fields(self, **fields: Any) -> "YanConfig":
        """A checked copy in which some fields, of the model or of its objective, have other values.

        Raises:
            ValueError: A field that does not exist, or a value that is not allowed.

        Example:

            >>> from modeling_yan import YanConfig
            >>> YanConfig().with_fields(num_experts=1, mse_weight=0.0).objective.mse_weight
            0.0
        """
        self.refuse_unknown(fields)
        return type(self).from_dict(self.to_dict(), **fields)

    @classmethod
    def refuse_unknown(cls, names: Iterable[str]) -> None:
        """Raise ValueError if one of the names is no field, neither of the model nor of its objective."""
        names = [cls.attribute_map.get(name, name) for name in names]
        unknown = sorted(name for name in names if not hasattr(cls, name) and name not in OBJECTIVE_NAMES)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: YanConfig has no such field")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "YanConfig":
        """As in transformers, but a config of another model, or a field that is not allowed, raises a ValueError."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type={model_type!r}: a YAN model needs a config of model_type {cls.model_type!r}")
        refuse_clash(kwargs, kwargs.get("objective"))
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate_fields()  # transformers assigns the keywords last, and checks only their types
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """As in transformers. PEFT, which asks for the fields before it adapts a model, then knows its layers."""
        if "peft.utils.constants" in sys.modules:
            known = sys.modules["peft.utils.constants"].TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            known.setdefault(self.model_type, LORA_MODULES)
        return super().to_dict()

    def validate_fields(self) -> None:
        """Check every number against its range, then the fields that depend on one another."""
        require_ranges(self, POSITIVE_FIELDS, (), PROBABILITY_FIELDS)
        for name in DEPTH_FIELDS:
            require(self, name, lambda value: value <= MOST_PARTS, f"at most {MOST_PARTS}")
        for name in TOKEN_ID_FIELDS:
            if getattr(self, name) is not None:
                require(
                    self, name, lambda value: 0 <= value < self.vocab_size, f"in [0, vocab_size={self.vocab_size})"
                )
        self.objective.validate_fields()
        self._check_choices()
        self._check_graph()
        self._check_lengths()

    def _check_choices(self) -> None:
        if self.expert_scope == "chain":
            allowed = "one of token, sequence; version 0.2 was the last that had it"
            raise ValueError(f"expert_scope='chain': must be {allowed}")
        for name, choices in CHOICES.items():
            require(self, name, choices.__contains__, f"one of {', '.join(choices)}")
        heads = f"a divisor of hidden_size={self.hidden_size}"
        require(self, "num_attention_heads", lambda value: self.hidden_size % value == 0, heads)
        width = f"None or greater than 0 and at most {MOST}"
        require(self, "moe_intermediate_size", lambda value: value is None or 0 < value <= MOST, width)
        require(self, "crf_rank", lambda value: 0 <= value <= MOST, f"at least 0 and at most {MOST}")
        odd = "0 or a positive odd number"
        require(self, "attention_conv_kernel", lambda value: value == 0 or (0 < value <= MOST and value % 2), odd)
        layers, depth = self.cross_attention_layers, self.num_flow_layers
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            raise ValueError(f"cross_attention_layers={layers}: must be None or a non-empty list without repetition")
        require(
            self,
            "cross_attention_layers",
            lambda value: value is None or all(0 <= layer < depth for layer in value),
            f"None or layers in [0, num_flow_layers={depth})",
        )
        if self.encoder is not None:
            vocabulary = f"the encoder's {self.encoder.vocab_size}"
            require(self, "vocab_size", self.encoder.vocab_size.__eq__, vocabulary)

    def _check_graph(self) -> None:
        if self.vertices_per_token == 1:
            return
        reason = f"with vertices_per_token={self.vertices_per_token}"
        require(self, "train_expert_choice", "posterior".__eq__, f"'posterior' {reason}")
        for name in ("crf_rank", "mse_weight"):
            require(self, name, lambda value: value == 0, f"0 {reason}")
        allowed = f"'sequence' {reason} and num_experts={self.num_experts}"
        require(self, "expert_scope", lambda value: self.num_experts == 1 or value == "sequence", allowed)

    def _check_lengths(self) -> None:
        longest, per_token = self.max_position_embeddings, self.vertices_per_token
        most = f"at most max_position_embeddings={longest}" + f" / vertices_per_token={per_token}" * (per_token > 1)
        require(self, "canvas_length", lambda value: value * per_token <= longest, most)
        slots = f"0 to below max_position_embeddings={longest}, and 0 without mask_token_id"
        has_slots = self.mask_token_id is not None or self.encoder is not None
        require(self, "num_answer_slots", lambda value: 0 <= value < (longest if has_slots else 1), slots)
        allowed = f"False with num_answer_slots={self.num_answer_slots}"
        require(self, "copy_prompt_to_slots", lambda value: not value or self.num_answer_slots > 0, allowed)
        has_draft = (
            self.num_answer_slots >= self.num_vertices(self.canvas_length) and self.train_expert_choice == "posterior"
        )
        allowed = "False without answer slots for the canvas and train_expert_choice='posterior'"
        require(self, "refine_draft", lambda value: not value or has_draft, allowed)
        least = 0 if has_draft else 1
        steps = (
            f"at least {least}" + " without answer slots for the canvas and train_expert_choice='posterior'" * least
        )
        for name in ("num_flow_steps", "min_train_flow_steps"):
            require(self, name, lambda value: least <= value <= MOST, f"{steps}, and at most {MOST}")

    def num_vertices(self, num_tokens: int) -> int:
        """Vertices, or positions, of a canvas of this many tokens."""
        return num_tokens * self.vertices_per_token

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return () if self.eos_token_id is None else (self.eos_token_id,)

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
    def encoder_hidden_size(self) -> int:
        """Width of the encoder's states, which may be another than that of the latents in a pretrained encoder."""
        return self.hidden_size if self.encoder is None else self.encoder.hidden_size

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


def _encoder_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config of an encoder that transformers knows, from its fields."""
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"encoder of model_type={model_type!r}: must be a model type that transformers knows")
    return AutoConfig.for_model(**fields)


__all__ = ["YanConfig"]
