"""YAN on a pretrained encoder: any text encoder of transformers that gives one state a token, as the encoder E.

Letters of the shape comments: B batch, S prompt length, H width of the encoder, D hidden size, V vocabulary.
"""

import inspect
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils import can_return_tuple, logging

from .base_yan import YanBaseMixin
from .configuration_yan import YanConfig
from .layers_yan import with_valid_first
from .objective_config_yan import flatten_objective

if TYPE_CHECKING:
    from typing_extensions import Self

# A model on a pretrained encoder is trained as a whole, on the likelihood of its texts.
DEFAULTS = {
    "num_flow_layers": 4,
    "num_decoder_layers": 1,
    "num_experts": 1,
    "train_expert_choice": "posterior",
    "max_train_flow_steps": 3,
    "mse_weight": 0.0,
    "crf_rank": 64,
    "crf_candidates": 24,
    "tie_word_embeddings": True,
    "freeze_encoder": False,
    "freeze_decoder": False,
    "freeze_embeddings": False,
}
MAX_POSITIONS = 1024  # unless asked for more
MAX_CANVAS = 128
MIN_WORDS = 10  # transformers makes a tokenizer of special tokens alone where a folder has none
SPECIAL_TOKENS = {
    "pad_token_id": ("pad_token_id",),
    "bos_token_id": ("bos_token_id", "cls_token_id"),
    "eos_token_id": ("eos_token_id", "sep_token_id"),
    "mask_token_id": ("mask_token_id",),
}
MIN_DEVIATION = 1e-4  # of a latent's dimension, and
MIN_SHARE = 0.1  # as a share of the median's: one that hardly varies would drown the others as soon as it is trained


def backbone_class(config: PreTrainedConfig) -> type[AutoModel] | type[AutoModelForTextEncoding]:
    """The Auto class of a text encoder that has one state a token.

    Raises:
        ValueError: A config of another kind of model.
    """
    is_decoder = getattr(config, "is_decoder", False)
    is_known = type(config).__module__.startswith("transformers.")  # others may be missing where the model is loaded
    is_masked = is_known and type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if is_masked and not config.is_encoder_decoder and not is_decoder:
        return AutoModel
    encoders = MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(config) in encoders and getattr(encoders[type(config)], "__name__", "").endswith("EncoderModel"):
        return AutoModelForTextEncoding  # of an encoder-decoder
    found = f"encoder of model_type={config.model_type!r}" + (" with is_decoder=True" if is_decoder else "")
    raise ValueError(
        f"{found}: must be a bidirectional text encoder with one state a token, such as bert, distilbert, roberta, "
        "xlm-roberta, electra, deberta-v2, modernbert, or the encoder of t5 or umt5"
    )


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A fresh encoder without a pooler, which nothing would train."""
    config._experts_implementation = None  # a choice for the flow's experts, which it has none of
    model_class = cast(type[PreTrainedModel], backbone_class(config)._model_mapping[type(config)])
    has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
    return model_class(config, **({"add_pooling_layer": False} if has_pooler else {}))


def longest_input(backbone: PreTrainedModel) -> float:
    """Most tokens that an encoder has positions for; infinity if it learned no table of them."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            return module.num_embeddings - reserved
    return math.inf


def check_fit(config: YanConfig, backbone: PreTrainedModel) -> None:
    """Raise ValueError if the encoder has not the positions or the words of a YAN config."""
    longest, positions = longest_input(backbone), config.max_position_embeddings
    if positions > longest:
        raise ValueError(f"max_position_embeddings={positions}: must be at most the {longest} of the encoder")
    words = cast(nn.Embedding, backbone.get_input_embeddings()).weight
    found, allowed = words.shape, (config.vocab_size, config.word_embedding_size)
    if found != allowed:
        raise ValueError(f"the encoder's input embeddings are {tuple(found)}: must be {allowed}")


class YanProjection(nn.Linear):
    """From the encoder's width to that of the latents, without bias; starts as a random rotation."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    @torch.no_grad()
    def reset_rotation(self) -> None:
        init.orthogonal_(self.weight)


class YanLatents(nn.Module):
    """States of a pretrained encoder (B, S, H) to latents (B, S, D).

    They are projected where the widths differ, and have mean 0 and variance 1 in every dimension, by the statistics of
    a user's rows; less variance in one that hardly varies. A fresh model leaves them as they are.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        width, size = config.encoder_hidden_size, config.hidden_size
        self.projection = None if width == size else YanProjection(width, size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def reset_statistics(self) -> None:
        init.zeros_(self.mean)
        init.ones_(self.std)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states if self.projection is None else self.projection(states)
        return (states - self.mean) / self.std


def _take(tensor: torch.Tensor | None, index: torch.Tensor | None, dim: int = 1) -> torch.Tensor | None:
    """The entries of a tensor (B, ..., S, ...) along a dimension in the order `index` (B, S), if there are both."""
    if tensor is None or index is None:
        return tensor
    shape = [len(index)] + [1] * (tensor.dim() - 1)
    shape[dim] = index.shape[1]
    return tensor.take_along_dim(index.view(shape), dim)


class YanHeadTransform(nn.Module):
    """Latents (B, S, D) to the space of the encoder's input embeddings, as a masked-language head does."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.word_embedding_size)
        self.act_fn = ACT2FN[getattr(config.encoder, "hidden_act", None) or "gelu"]
        self.norm = nn.LayerNorm(config.word_embedding_size, eps=config.layer_norm_eps)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act_fn(self.dense(latents)))

    @torch.no_grad()
    def take_back(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Go on with the same result where latents x become (x - shift) / scale."""
        self.dense.bias.add_(self.dense.weight @ shift)
        self.dense.weight.mul_(scale)


class YanPretrainedMixin(YanBaseMixin):
    """What every YAN model can do with a pretrained encoder."""

    encoder: PreTrainedModel  # of a `YanModel` that is on one
    latents: YanLatents

    @classmethod
    def from_encoder_pretrained(
        cls,
        name_or_path: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        hub_options: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> "Self":
        """A new model on a pretrained text encoder.

            model = YanForFlowGeneration.from_encoder_pretrained("bert-base-uncased", num_flow_layers=4)

        The encoder is a sub-config, `config.encoder`, and part of the checkpoint. Flow and decoder are new. The
        decoder starts from the encoder's masked-language head where there is one. Next, measure the latents
        (`measure_latents`) and train.

        Args:
            name_or_path: Folder or hub name of the encoder and of its tokenizer.
            tokenizer: Another tokenizer, with the encoder's vocabulary.
            hub_options: Options of transformers' `from_pretrained`, such as `{"revision": ..., "token": ...}`.
            dtype: Floating-point dtype of the weights, such as `torch.bfloat16`; float32 if None.
            fields: Fields of `YanConfig` or of its objective. By default there are 4 flow layers, 1 decoder layer, one
                expert, a CRF of rank 64 and tied embeddings. `train_expert_choice` is "posterior", and nothing is
                frozen.

        Returns:
            The new model, in evaluation mode.

        Raises:
            ValueError: A model that is no text encoder, has no tokenizer or does not fit the fields; unknown fields.
            TypeError: `tokenizer` is no tokenizer, or `dtype` no floating-point dtype.
        """
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer={tokenizer!r}: must be a tokenizer, as AutoTokenizer loads it")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype={dtype!r}: must be a dtype of floating-point numbers, such as torch.bfloat16")
        hub_options = hub_options or {}
        encoder = AutoConfig.from_pretrained(name_or_path, **hub_options)
        backbone_class(encoder)
        encoder.name_or_path = ""  # the checkpoint holds its weights
        if tokenizer is None:
            tokenizer = _load_tokenizer(name_or_path, hub_options)
        cls.config_class.refuse_unknown(fields)
        config = cls.config_class(**_default_fields(encoder, tokenizer, fields))
        if config.encoder_name is None and not os.path.exists(name_or_path):
            config.encoder_name = name_or_path
        model = cls(config)
        _load_encoder(model, name_or_path, hub_options)
        model.tie_weights()
        model.to(dtype or model.dtype)  # type: ignore[arg-type]
        return model.eval()

    def post_init(self) -> None:
        """As in transformers, but a model does not ignore the weights that its parts by themselves would ignore."""
        super().post_init()
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())
        # or a Trainer that goes on would miss the tied weights in its log, which a checkpoint holds once
        self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), *self.all_tied_weights_keys}

    def train(self, mode: bool = True) -> "Self":
        """As in torch, but a frozen pretrained encoder has no dropout."""
        super().train(mode)
        encoder = getattr(self, "encoder", None)
        if mode and encoder is not None and not any(weight.requires_grad for weight in encoder.parameters()):
            encoder.eval()
        return self

    def pretrained_switches(self) -> dict[nn.Module, bool]:
        """Which parts of a `YanModel` the `freeze_*` fields leave to be trained; smaller ones come later."""
        objective = self.config.objective
        is_trained, has_words = not objective.freeze_encoder, not objective.freeze_embeddings
        return {self.latents: True, self.encoder: is_trained, self.get_input_embeddings(): is_trained and has_words}

    @can_return_tuple
    def encode_pretrained(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """The forward pass of a `YanModel` with a pretrained encoder.

        The encoder sees the valid tokens of a row side by side, whatever is between or before them, so that padding
        shifts no positions.
        """
        names, position = ("output_hidden_states", "output_attentions"), None
        asked = {name: kwargs.get(name, getattr(self.config, name)) for name in names}
        if attention_mask is not None:
            order = (attention_mask == 0).int().argsort(dim=1, stable=True)
            position = order.argsort(dim=1)
            attention_mask = attention_mask.gather(1, order)
            input_ids, inputs_embeds = _take(input_ids, order), _take(inputs_embeds, order)
        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        outputs = self.encoder(**given, attention_mask=attention_mask, return_dict=True, **asked)
        hidden_states, attentions = outputs.get("hidden_states"), outputs.get("attentions")
        return BaseModelOutput(
            last_hidden_state=self.latents(_take(outputs.last_hidden_state, position)),
            hidden_states=hidden_states and tuple(_take(each, position) for each in hidden_states),
            attentions=attentions and tuple(_take(_take(each, position, 2), position, 3) for each in attentions),
        )

    @property
    def keeps_states(self) -> bool:
        """Whether training leaves the states of a pretrained encoder as they are, so that they can be kept."""
        parts = [getattr(self.base_model, "encoder", None), getattr(self.base_model.embeddings, "answer_slots", None)]
        weights = [weight for part in parts if part is not None for weight in part.parameters()]
        return self.config.encoder is not None and not any(weight.requires_grad for weight in weights)

    @torch.no_grad()
    def encoder_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """States (B, S', H) of a pretrained encoder for prompts (B, S), as `forward` takes them: `encoder_outputs`.

        S' counts the model's own answer slots, which come first, and the prompt, its valid tokens first.
        """
        if attention_mask is not None:
            attention_mask, input_ids = with_valid_first(attention_mask, input_ids)
        put_slots = getattr(self, "with_answer_slots", dict)
        prompt = put_slots(input_ids=input_ids, attention_mask=attention_mask)
        given = {name: value for name, value in prompt.items() if value is not None}
        return self.base_model.encoder(**given, return_dict=True).last_hidden_state

    def take_states(
        self,
        encoder_outputs: torch.Tensor | tuple[torch.Tensor, ...],
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """What `YanModel` gives for a prompt, from the states of its pretrained encoder.

        Raises:
            ValueError: There is no pretrained encoder, it is trained, or the states have another shape.
        """
        if not self.keeps_states:
            raise ValueError("encoder_outputs: must be None but for a pretrained encoder with freeze_encoder=True")
        states = encoder_outputs if torch.is_tensor(encoder_outputs) else encoder_outputs[0]
        given = next(each for each in (input_ids, inputs_embeds) if each is not None)
        shape = *given.shape[:2], self.config.encoder_hidden_size
        if tuple(states.shape) != shape:
            raise ValueError(f"encoder_outputs of shape {tuple(states.shape)}: must be {shape}, answer slots included")
        return BaseModelOutput(last_hidden_state=self.base_model.latents(states.to(self.dtype)))

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Normalise the latents by their mean and deviation over batches of texts, in every dimension independently.

        The decoder goes on decoding what it decoded. Call it before training: the flow has to learn the new latents.

        Args:
            batches: With `input_ids` (B, S) and, where there is padding, `attention_mask`; other entries are ignored.

        Raises:
            ValueError: The encoder is not a pretrained one, or there are fewer than two tokens.
        """
        model = self.base_model
        if self.config.encoder is None:
            raise ValueError("encoder=None: latents are measured with a pretrained encoder alone")
        was_training, count = model.training, 0
        total = squares = torch.zeros((), dtype=torch.float64)
        model.eval()
        for batch in batches:
            given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask") if name in batch}
            latents = model(**given, return_dict=True).last_hidden_state.cpu().double()
            mask = given.get("attention_mask")
            tokens = latents.flatten(0, 1) if mask is None else latents[mask.bool().cpu()]
            count, total, squares = count + len(tokens), total + tokens.sum(0), squares + tokens.square().sum(0)
        model.train(was_training)
        if count < 2:
            raise ValueError(f"the batches have {count} tokens: must be at least 2")
        shift = total / count
        scale = (squares / count - shift.square()).clamp(min=0).sqrt()  # of the latents as they were
        deviation = scale * model.latents.std.cpu()
        floor = max(MIN_DEVIATION, MIN_SHARE * deviation.median().item())
        scale = deviation.clamp(min=floor) / model.latents.std.cpu()
        shift, scale = shift.to(model.latents.mean), scale.to(model.latents.mean)
        model.latents.mean += model.latents.std * shift
        model.latents.std *= scale
        if hasattr(self, "decoder"):
            self.decoder.transform.take_back(scale, shift)


def _load_tokenizer(name_or_path: str, hub_options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub_options)
        num_words = len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name_or_path!r} has no tokenizer that can be loaded: give tokenizer=...") from error
    if num_words < MIN_WORDS:
        raise ValueError(f"{name_or_path!r} has no tokenizer but special tokens: give tokenizer=...")
    return tokenizer


def _default_fields(
    encoder: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]
) -> dict[str, Any]:
    """All fields of the config: those that are given, and for the others what fits encoder and tokenizer."""
    num_ids = 1 + max(tokenizer.get_vocab().values())
    if num_ids > encoder.vocab_size:
        raise ValueError(f"the tokenizer has {num_ids} ids: must be at most vocab_size={encoder.vocab_size}")
    longest = longest_input(_on_meta(encoder))
    defaults = DEFAULTS | {"hidden_size": encoder.hidden_size, "num_encoder_layers": encoder.num_hidden_layers}
    defaults["max_position_embeddings"] = int(min(longest, MAX_POSITIONS))
    for name, sources in SPECIAL_TOKENS.items():
        ids = [getattr(position, source, None) for position in (tokenizer, encoder) for source in sources]
        defaults[name] = next((token for token in ids if token is not None), None)
    if fields.get("vertices_per_token", 1) > 1:
        defaults["crf_rank"] = 0  # a graph replaces the CRF
    fields = {**defaults, "vocab_size": encoder.vocab_size, "encoder": encoder, **flatten_objective(fields)}
    size = fields["hidden_size"]
    num_heads = (heads for heads in range(encoder.num_attention_heads, 0, -1) if size % heads == 0)
    fields.setdefault("num_attention_heads", next(num_heads))
    fields.setdefault("canvas_length", min(MAX_CANVAS, fields["max_position_embeddings"]))
    if fields["eos_token_id"] is None:
        raise ValueError("eos_token_id=None: neither tokenizer nor encoder has a token that ends a text")
    return fields


def _on_meta(encoder: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), init.no_init_weights():
        return build_backbone(encoder)


@torch.no_grad()
def _load_encoder(model: Any, name_or_path: str, hub_options: dict[str, Any]) -> None:
    """Load the encoder's weights into a new model, and the head of its masked-language model into the decoder."""
    encoder = model.base_model.encoder
    is_masked = backbone_class(model.config.encoder) is AutoModel
    auto_class = AutoModelForMaskedLM if is_masked else AutoModelForTextEncoding
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing of the head is no news
    try:
        loaded, info = auto_class.from_pretrained(name_or_path, output_loading_info=True, **hub_options)
    finally:
        logging.set_verbosity(verbosity)
    source = loaded.base_model if is_masked else loaded
    prefix = f"{loaded.base_model_prefix}." if is_masked else ""
    missing = sorted(name for name in info["missing_keys"] if name.startswith(prefix))
    if missing:
        raise ValueError(f"{name_or_path!r} has no weights of the encoder's {', '.join(missing[:3])}")
    encoder.load_state_dict(source.state_dict())
    words = encoder.get_input_embeddings().weight
    if getattr(model.base_model.embeddings, "answer_slots", None) is not None:
        model.base_model.embeddings.answer_slots.weight.add_(words.mean(0))
    if not hasattr(model, "decoder"):
        return
    model.lm_head.weight.copy_(words)
    model.lm_head.bias.zero_()
    for layer in model.decoder.layers:  # they start as nothing, so that `measure_latents` changes no text
        layer.feed_forward.down_proj.weight.zero_()
    head = _masked_head(loaded, info["missing_keys"], words.shape) if is_masked else None
    if head is not None:
        _start_from_head(model, *head)
    else:  # logits of a fresh head have a variance of about 1
        model.decoder.transform.norm.weight.fill_(1 / (words.float().square().mean().sqrt() * words.shape[1] ** 0.5))


def _masked_head(
    loaded: PreTrainedModel, missing: set[str], shape: torch.Size
) -> tuple[nn.Linear, nn.LayerNorm, nn.Linear] | None:
    """Dense layer, norm and output layer of a masked-language head; None if it has another form or no weights."""
    inside, output = set(loaded.base_model.modules()), loaded.get_output_embeddings()
    parts = [(name, part) for name, part in loaded.named_modules() if part not in inside and part is not output]
    layers, norms = ([part for part in parts if isinstance(part[1], kind)] for kind in (nn.Linear, nn.LayerNorm))
    if output is None or output.weight.shape != shape or (len(layers), len(norms)) != (1, 1):
        return None
    if any(f"{name}.weight" in missing for name, _ in layers + norms):
        return None
    return layers[0][1], norms[0][1], output


def _start_from_head(model: Any, dense: nn.Linear, norm: nn.LayerNorm, output: nn.Linear) -> None:
    """Let the decoder compute the logits of the masked-language head, up to what a projection loses."""
    transform, projection = model.decoder.transform, model.base_model.latents.projection
    transform.dense.weight.copy_(dense.weight if projection is None else dense.weight @ projection.weight.pinverse())
    for target, source in ((transform.dense, dense), (transform.norm, norm), (model.lm_head, output)):
        if target.bias is not None:
            target.bias.zero_() if source.bias is None else target.bias.copy_(source.bias)
    transform.norm.weight.copy_(norm.weight)
    model.lm_head.weight.copy_(output.weight)
