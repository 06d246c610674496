"""How a YAN model is trained: the `objective` of its config, which does not change what it generates."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .fields_yan import MOST, require, require_ranges, warn_of_unknown, with_plain_errors

POSITIVE_FIELDS = ("flow_sigma", "time_alpha", "time_beta", "max_span_len")
NON_NEGATIVE_FIELDS = (
    *("latent_noise", "nll_weight", "mse_weight", "ce_weight", "text_weight", "draft_weight", "crf_weight"),
    *("gate_entropy_weight", "load_balance_weight", "mmd_weight", "latent_norm_weight"),
)


@with_plain_errors
@strict
class YanObjectiveConfig(PreTrainedConfig):
    r"""Corruption, frozen parts, training steps and weights of the losses: `YanConfig.objective`.

    No field changes what a trained model generates. The loss is the sum of its terms, each times its weight; section
    numbers are those of arXiv 2604.15009.

    Args:
        mask_ratio: Share of the tokens that text infilling masks in the autoencoder stage; in [0, 0.5], default 0.15.
        max_span_len: Longest span that text infilling masks, in tokens; at least 1, default 3.
        latent_noise: In the autoencoder stage, Gaussian noise is added to the latents of each sequence. Its standard
            deviation is drawn from U(0, latent_noise); at least 0, default 0.0. So the decoder tolerates errors of the
            flow.
        freeze_encoder, freeze_decoder, freeze_embeddings: Whether the flow stage leaves this part as it is; default
            True. Call `apply_freeze_switches` after a change.
        freeze_flow: Whether the flow is frozen; default False. With all four frozen, only the CRF or the graph is
            trained.
        detach_target_latents: Whether the target latents x1 = E(y) have no gradient in the flow stage; default True.
            If False and the encoder is trained, `mmd_weight` and `latent_norm_weight` prevent a collapse of the
            latents.
        min_train_flow_steps, max_train_flow_steps: The number of solver steps in training is drawn uniformly from this
            range; at least 1, default 1 and 4. 0 for both trains a model without its flow.
        time_alpha, time_beta: Training times t are drawn from Beta(time_alpha, time_beta); above 0, default 1.0.
        flow_sigma: Standard deviation of each expert's Gaussian, per latent dimension (section 3); above 0, default
            1.0.
        nll_weight: Weight of the negative log-likelihood of the velocity, per latent dimension (section 3); at least
            0, default 1.0. No effect with `train_expert_choice="posterior"`.
        mse_weight: Weight of the squared error of the solved latents, per dimension; at least 0, default 1.0. With
            `"posterior"`, the mean over where each step of the solver leads.
        ce_weight: Weight of the cross-entropy of the decoded latents, per token of the canvas; at least 0, default
            1.0. With `"posterior"`, that mean, too.
        text_weight: Weight of the negative log-likelihood of the text, summed over all experts, per token of the
            canvas; at least 0, default 1.0. With `"posterior"` only.
        draft_weight: Weight of the cross-entropy of the encoder's draft in the answer slots; at least 0, default 0.5.
            It needs slots for the whole canvas, and an encoder that is trained.
        crf_weight: Weight of the CRF's negative log-likelihood of the text, per token; at least 0, default 1.0. It
            needs `crf_rank` above 0.
        gate_entropy_weight: Weight of the gate's entropy, which is subtracted; at least 0, default 0.01. No effect
            with `"posterior"`.
        load_balance_weight: Weight of KL(mean gate || uniform); at least 0, default 0.1. No effect with `"posterior"`.
        mmd_weight: Weight of the squared maximum mean discrepancy between latents and N(0, I); at least 0, default
            0.0.
        latent_norm_weight: Weight of the mean square of the latents; at least 0, default 0.0.

    Raises:
        ValueError: A field has a value that is not allowed; the message names field, value and what is allowed.
        TypeError: A field has a value of another type; the message names them, too.

    Example:

        >>> from modeling_yan import YanConfig
        >>> YanConfig(objective={"mse_weight": 0.0}).objective.mse_weight
        0.0
        >>> YanConfig(mse_weight=0.0).objective.mse_weight  # the same, in short
        0.0
    """

    model_type = "yan_objective"
    attribute_map = {"transition_weight": "crf_weight"}  # the name of 0.1 and 0.2

    mask_ratio: float | int = 0.15
    max_span_len: int = 3
    latent_noise: float | int = 0.0
    freeze_encoder: bool = True
    freeze_decoder: bool = True
    freeze_embeddings: bool = True
    freeze_flow: bool = False
    detach_target_latents: bool = True
    min_train_flow_steps: int = 1
    max_train_flow_steps: int = 4
    time_alpha: float | int = 1.0
    time_beta: float | int = 1.0
    flow_sigma: float | int = 1.0
    nll_weight: float | int = 1.0
    mse_weight: float | int = 1.0
    ce_weight: float | int = 1.0
    text_weight: float | int = 1.0
    draft_weight: float | int = 0.5
    crf_weight: float | int = 1.0
    gate_entropy_weight: float | int = 0.01
    load_balance_weight: float | int = 0.1
    mmd_weight: float | int = 0.0
    latent_norm_weight: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        known = set(dir(self))
        super().__post_init__(**kwargs)
        warn_of_unknown(self, kwargs, known)
        self.validate_fields()  # here for a plain ValueError; transformers calls it again before saving

    def to_dict(self) -> dict[str, Any]:
        """The fields of the objective, without those that transformers gives to every config."""
        found = super().to_dict()
        return {name: found[name] for name in (*OBJECTIVE_FIELDS, "model_type", "transformers_version")}

    def validate_fields(self) -> None:
        """Check every number against its range, and the two numbers of steps against each other."""
        require_ranges(self, POSITIVE_FIELDS, NON_NEGATIVE_FIELDS, ())
        require(self, "mask_ratio", lambda value: 0 <= value <= 0.5, "in [0, 0.5]")
        require(self, "min_train_flow_steps", lambda value: 0 <= value <= MOST, f"at least 0 and at most {MOST}")
        alone = "1 or more, or 0 as max_train_flow_steps: a flow is trained in every update, or in none"
        require(self, "min_train_flow_steps", lambda value: value > 0 or self.max_train_flow_steps == 0, alone)
        fewest = f"at least min_train_flow_steps={self.min_train_flow_steps}"
        require(self, "max_train_flow_steps", lambda value: value >= self.min_train_flow_steps, fewest)


_OF_ALL = {field.name for field in fields(PreTrainedConfig)}
OBJECTIVE_FIELDS = tuple(field.name for field in fields(YanObjectiveConfig) if field.name not in _OF_ALL)
OBJECTIVE_NAMES = (*OBJECTIVE_FIELDS, *YanObjectiveConfig.attribute_map)


def as_objective(value: Any) -> YanObjectiveConfig:
    """The objective that a config, its fields or None stand for."""
    if value is None or isinstance(value, dict):
        own = {"model_type", "transformers_version"}
        return YanObjectiveConfig(**{name: each for name, each in (value or {}).items() if name not in own})
    if value.model_type != YanObjectiveConfig.model_type:  # its class may be that of a checkpoint's code
        raise ValueError(f"objective of model_type={value.model_type!r}: must be {YanObjectiveConfig.model_type!r}")
    return value


def refuse_clash(fields: dict[str, Any], nested: PreTrainedConfig | dict[str, Any] | None) -> None:
    """Raise ValueError if a field stands in `fields` and in an objective, `nested`, with two values."""
    flat, given = _of_objective(fields), _given(nested)
    for name in flat.keys() & given.keys():
        if flat[name] != given[name]:
            both = f"{name}={flat[name]!r} and objective={{{name!r}: {given[name]!r}}}"
            raise ValueError(f"{both}: must be the same, or one of them")


def flatten_objective(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `YanConfig` with those of the objective among them, wherever they were given."""
    nested = fields.get("objective")
    refuse_clash(fields, nested)
    others = {name: value for name, value in fields.items() if name not in ("objective", *OBJECTIVE_NAMES)}
    return {**others, **_of_objective(fields), **_given(nested)}


def _given(nested: PreTrainedConfig | dict[str, Any] | None) -> dict[str, Any]:
    """What is given in an objective: a config, a dictionary, or None for nothing."""
    return _of_objective(nested if isinstance(nested, dict) else {} if nested is None else nested.to_dict())


def _of_objective(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the objective among others, by their names of today."""
    names = YanObjectiveConfig.attribute_map
    return {names.get(name, name): value for name, value in fields.items() if name in OBJECTIVE_NAMES}
