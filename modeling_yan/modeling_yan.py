"""YAN: an encoder, a mixture-of-experts flow and a decoder that together generate a text at once (arXiv 2604.15009).

Letters of the shape comments: B batch, S prompt length, L canvas length, D hidden size, K experts, V vocabulary.
"""

import math
import os
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cards_yan import YanCardMixin, YanModelCard
from .checks_yan import IGNORE_INDEX, check_canvas, check_labels, check_prompt, is_integer
from .clients_yan import refuse_cache, refuse_echo, refuse_harness_likelihood, token_output, watch_trainers
from .configuration_yan import YanConfig
from .decoding_yan import YanTransitions
from .expert_heads_yan import YanExpertHeads, YanExpertsMixin
from .experts_yan import YanExpertEmbedding
from .filling_yan import YanFillingMixin
from .flow_matching_yan import token_cross_entropy
from .generation_config_yan import YanGenerationConfig
from .generation_yan import YanGenerationMixin
from .graphs_yan import YanGraph
from .layers_yan import (
    YanAttention,
    YanDecoderLayer,
    YanEmbeddings,
    YanEncoderLayer,
    YanPositionEmbedding,
    YanShortConvolution,
    attention_mask_for,
    count_positions,
    positions_from_start,
    select_positions,
    with_valid_first,
)
from .likelihood_yan import YanLikelihoodMixin
from .linear_yan import YanIdentityLinear, YanMimeticLinear, ZeroInitLinear
from .mamba_yan import YanMamba
from .objective_yan import latent_regularisers, weighted_sum
from .outputs_yan import YanAutoencodingOutput, YanFlowOutput
from .pretrained_yan import YanHeadTransform, YanLatents, YanPretrainedMixin, YanProjection, build_backbone, check_fit
from .velocity_yan import YanFlow

if TYPE_CHECKING:
    from typing_extensions import Self

AUTO_MAP = {
    "AutoConfig": "configuration_yan.YanConfig",
    "AutoModel": "modeling_yan.YanModel",
    "AutoModelForMaskedLM": "modeling_yan.YanForAutoencoding",
    "AutoModelForCausalLM": "modeling_yan.YanForFlowGeneration",
}


class YanPreTrainedModel(YanPretrainedMixin, YanCardMixin, YanExpertsMixin, PreTrainedModel):
    """What all YAN models have in common: loading, saving, initial weights.

    Example:

        >>> from modeling_yan import YanModel, YanPreTrainedModel
        >>> issubclass(YanModel, YanPreTrainedModel)
        True
    """

    config_class = YanConfig
    config: YanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    takes_num_items = False  # every term is a mean, so the Trainer has to divide it over accumulated batches
    _no_split_modules = ["YanEncoderLayer", "YanFlowLayer", "YanDecoderLayer", "YanExpertHeads"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": YanEncoderLayer, "attentions": YanAttention}

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `forward` divides its loss by `num_items_in_batch`; a Trainer asks before it makes its callbacks."""
        watch_trainers()
        return self.takes_num_items

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As in transformers, whose own warns at a name that PEFT and TRL go on reading."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, YanMamba | YanExpertHeads):
            module.reset_parameters()
        elif isinstance(module, YanPositionEmbedding):
            module.reset_sinusoids(self.config.initializer_range)
        elif isinstance(module, YanMimeticLinear):
            module.reset_mimetic(self.config.num_attention_heads)
        elif isinstance(module, YanShortConvolution):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # as torch does: the generic one is far too small
        elif isinstance(module, YanIdentityLinear):
            module.reset_identity()
        elif isinstance(module, ZeroInitLinear):  # every block of the flow starts as a plain pre-norm block
            init.zeros_(module.weight)
        elif isinstance(module, YanExpertEmbedding):
            init.normal_(module.weight)
        elif isinstance(module, YanLatents):
            module.reset_statistics()
        elif isinstance(module, YanProjection):
            module.reset_rotation()
        elif isinstance(module, YanGraph):
            module.reset_distances()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save weights, config, a model card and this code; every class of the family loads from the folder."""
        if self._auto_class is not None:  # transformers itself names only the class that is saved
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    def __init__(self, config: YanConfig, *args: Any, **kwargs: Any) -> None:
        if config.model_type != YanConfig.model_type:
            raise ValueError(f"model_type={config.model_type!r}: must be {YanConfig.model_type!r}")
        config.validate_fields()  # it may have been changed since it was made
        super().__init__(config, *args, **kwargs)
        self.model_card = YanModelCard()


class YanModel(YanPreTrainedModel):
    """Embeddings and bidirectional encoder, its own or a pretrained one: token ids to one latent vector per token.

    Example:

        >>> import torch
        >>> from modeling_yan import YanConfig, YanModel
        >>> model = YanModel(YanConfig(vocab_size=100, hidden_size=32, num_attention_heads=4, num_encoder_layers=1))
        >>> model(torch.tensor([[5, 6, 7]]), torch.ones(1, 3)).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    _keys_to_ignore_on_load_unexpected = {r"^(flow|decoder|lm_head|transitions|graph)\."}  # of the classes with a head

    def __init__(self, config: YanConfig) -> None:
        super().__init__(config)
        self.embeddings = YanEmbeddings(config)
        if config.encoder is None:
            self.layers = nn.ModuleList(YanEncoderLayer(config, index) for index in range(config.num_encoder_layers))
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.encoder, self.latents = build_backbone(config.encoder), YanLatents(config)
            check_fit(config, self.encoder)
        self.post_init()

    @property
    def words_name(self) -> str:
        """Name of the input embeddings."""
        words = self.get_input_embeddings()
        return next(name for name, module in self.named_modules() if module is words)

    def get_input_embeddings(self) -> nn.Embedding:
        if self.config.encoder is None:
            return self.embeddings.word_embeddings
        return cast(nn.Embedding, self.encoder.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        if self.config.encoder is None:
            self.embeddings.word_embeddings = value
        else:
            self.encoder.set_input_embeddings(value)
            self.config.encoder.vocab_size = value.num_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode `input_ids` (B, S); the `last_hidden_state` of what comes back is the latents (B, S, D).

        Args:
            input_ids: Ids in [0, vocab_size). attention_mask: (B, S), 0 on padding, which may be on either side.
            position_ids: (B, S); counted over the valid tokens if None, as a pretrained encoder always does.
            inputs_embeds: (B, S, E) instead of ids, E the width of the input embeddings.

        Raises:
            ValueError: Neither or both of ids and embeddings; no token, or more than `max_position_embeddings`; a mask
                of another shape; ids that are no integers or, on the CPU, outside the vocabulary.
        """
        refuse_cache(kwargs)
        given = check_prompt(self, input_ids, attention_mask, position_ids, inputs_embeds)
        if input_ids is not None and attention_mask is None and position_ids is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        if self.config.encoder is not None:
            return self.encode_pretrained(input_ids, attention_mask, inputs_embeds, **kwargs)
        if position_ids is None:
            position_ids = count_positions(given, attention_mask)
        return self._encode(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _encode(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        hidden_states = self.embeddings(input_ids, position_ids, inputs_embeds)
        mask = attention_mask_for(self.config, hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class YanDecoder(nn.Module):
    """Latents to the states that the language-model head reads, every token independently."""

    def __init__(self, config: YanConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.decoder_dropout)
        self.layers = nn.ModuleList(YanDecoderLayer(config) for _ in range(config.num_decoder_layers))
        if config.encoder is not None:
            self.transform = YanHeadTransform(config)

    def forward(self, latents: torch.Tensor, dropout: bool = True) -> torch.Tensor:
        hidden_states = self.dropout(latents) if dropout else latents
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.transform(hidden_states) if hasattr(self, "transform") else hidden_states


class YanForAutoencoding(YanPreTrainedModel):
    """Stage one: encoder and decoder, trained to restore a text from its infilling corruption.

    Example:

        >>> import torch
        >>> from modeling_yan import YanConfig, YanForAutoencoding
        >>> config = YanConfig(vocab_size=100, hidden_size=32, num_attention_heads=4, num_encoder_layers=1)
        >>> corrupted, text = torch.tensor([[5, config.mask_token_id, 7]]), torch.tensor([[5, 6, 7]])
        >>> output = YanForAutoencoding(config)(corrupted, torch.ones(1, 3), labels=text)
        >>> output.logits.shape, output.loss.dim()
        (torch.Size([1, 3, 100]), 0)
    """

    _keys_to_ignore_on_load_unexpected = {r"^(flow|transitions|graph)\."}  # of stage two
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.word_embeddings.weight"}
    takes_num_items = True

    def __init__(self, config: YanConfig) -> None:
        super().__init__(config)
        self.model = YanModel(config)
        self.decoder = YanDecoder(config)
        self._tied_weights_keys = {"lm_head.weight": f"model.{self.model.words_name}.weight"}
        self.lm_head = nn.Linear(config.word_embedding_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> YanAutoencodingOutput:
        """Encode ids that the collator corrupted, and decode them.

        In training, noise is added to the latents (`latent_noise`).

        Args:
            input_ids, attention_mask, position_ids: (B, L). inputs_embeds: (B, L, E), instead of `input_ids`.
            labels: The clean ids (B, L); -100 is ignored.
            num_items_in_batch: Number of labels of the whole batch, of which this call has a part. The mean loss is
                multiplied by the share of labels in this call. So the losses of all parts add up to one mean.

        Returns:
            A `YanAutoencodingOutput`: `logits` (B, L, V), and with labels the losses (scalars).

        Raises:
            ValueError: `labels` have another shape than the input.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        latents = outputs.last_hidden_state
        labels = None if labels is None else check_labels(labels, self, len(latents))
        if labels is not None and labels.shape != latents.shape[:2]:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be {tuple(latents.shape[:2])} as the input")
        logits = self.lm_head(self.decoder(self._add_noise(latents)))
        terms = {} if labels is None else self._loss_terms(logits, labels, latents, attention_mask)
        if labels is not None and num_items_in_batch is not None:
            terms["loss"] = terms["loss"] * (labels != IGNORE_INDEX).sum() / num_items_in_batch
        return YanAutoencodingOutput(
            **terms,
            logits=logits,
            last_hidden_state=latents,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _add_noise(self, latents: torch.Tensor) -> torch.Tensor:
        noise = self.config.objective.latent_noise
        if not self.training or noise == 0:
            return latents
        level = noise * torch.rand(len(latents), 1, 1, device=latents.device, dtype=latents.dtype)
        return latents + level * torch.randn_like(latents)

    def _loss_terms(
        self, logits: torch.Tensor, labels: torch.Tensor, latents: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        valid = labels != IGNORE_INDEX
        ce_loss = token_cross_entropy(logits, labels.masked_fill(~valid, 0), valid)
        regularisers = latent_regularisers(self, latents, attention_mask)
        terms = {"ce_loss": ce_loss, **regularisers}
        self._keep_terms(terms, len(labels))
        return {"loss": ce_loss + weighted_sum(self.config.objective, regularisers), **terms}


class YanForFlowGeneration(
    YanPreTrainedModel,
    YanLikelihoodMixin,
    YanFillingMixin,
    YanGenerationMixin,
):
    """Stage two: encoder, mixture-of-experts flow and decoder; trains the flow and generates text with it.

    Example:

        >>> import torch
        >>> from modeling_yan import YanConfig, YanForFlowGeneration
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
        >>> model = YanForFlowGeneration(YanConfig(vocab_size=100, canvas_length=8, **sizes))
        >>> prompt, target = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
        >>> model(prompt, torch.ones(1, 3), labels=target).loss.dim()  # the objective
        0
        >>> model.eval().generate(prompt, min_new_tokens=8, max_new_tokens=8).shape
        torch.Size([1, 11])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.word_embeddings.weight"}
    _has_experts = True

    def __init__(self, config: YanConfig) -> None:
        super().__init__(config)
        self.model = YanModel(config)
        self.flow = YanFlow(config)
        self.decoder = YanDecoder(config)
        self._tied_weights_keys = {"lm_head.weight": f"model.{self.model.words_name}.weight"}
        self.lm_head = nn.Linear(config.word_embedding_size, config.vocab_size)
        self.transitions = YanTransitions(config) if config.crf_rank else None
        self.graph = YanGraph(config) if config.vertices_per_token > 1 else None
        self.generation_config = YanGenerationConfig.for_model(config)
        self.post_init()
        self.apply_freeze_switches()

    def _apply(self, *args: Any, **kwargs: Any) -> "Self":
        """As in torch; CUDA graphs of the model go, and the memory of the weights that they were recorded with."""
        self._cuda_graphs = None
        return super()._apply(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "Self":
        """As in transformers; the freeze switches are applied again, because loading replaces the parameters.

        Where the folder is an adapter's, all of its base is frozen, and stays so.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not model._hf_peft_config_loaded:
            model.apply_freeze_switches()
        return loaded

    def apply_freeze_switches(self) -> None:
        """Let the objective's `freeze_*` fields decide which parameters are trained; call it after changing them.

        Parameters that training never uses are frozen as well, because DDP would wait for their gradients: the gate
        of a single expert, and the flow if `max_train_flow_steps` is 0.
        """
        objective = self.config.objective
        trains_flow = not objective.freeze_flow and objective.max_train_flow_steps > 0
        parts = {
            self.model: not objective.freeze_encoder,
            self.flow: trains_flow,
            self.flow.gate: trains_flow and self.config.num_experts > 1,
            self.decoder: not objective.freeze_decoder,
            self.lm_head: not objective.freeze_decoder,
            self.model.embeddings: not objective.freeze_embeddings,
        }
        if self.config.encoder is not None:
            parts |= self.model.pretrained_switches()  # last: the head may be tied to the encoder's words
        for part, is_trained in parts.items():
            for parameter in part.parameters():
                if parameter.is_floating_point():  # a weight that is quantized to integers has no gradient
                    parameter.requires_grad_(is_trained)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """As in torch. TRL's SFTTrainer asks for a `fused_lm_head` that it has put into `forward`, past the flow."""
        if not torch.compiler.is_compiling():
            refuse_harness_likelihood()
        if not fused_lm_head:
            return super().__call__(*args, **kwargs)
        outputs = super().__call__(*args, **kwargs)
        return token_output(outputs.loss, outputs.logits, kwargs["labels"])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        canvas_length: int | None = None,
        num_flow_steps: int | None = None,
        encoder_outputs: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> YanFlowOutput:
        """The objective's loss if `labels` are given, else the logits of a solve (arXiv 2604.15009, section 3).

        In evaluation mode nothing is random: noise and times are functions of a row's prompt and target. The loss of a
        batch is the mean of those that its rows have alone.

        Args:
            input_ids: Prompt ids (B, S) in [0, vocab_size); S at most `config.max_prompt_length`.
            attention_mask: (B, S), 1 on tokens and 0 on padding, which may be anywhere; all ones if None.
            position_ids: (B, S); counted over the valid tokens if None.
            inputs_embeds: (B, S, E) in place of `input_ids`, E the width of the input embeddings.
            labels: Target ids (B, at most L); -100 is ignored, wherever it stands. The target moves to the start of
                the canvas. EOS pads it to L tokens, and counts in the loss; with a graph, the first EOS alone.
            canvas_length: Canvas width L, in [1, max_position_embeddings / vertices_per_token];
                `config.canvas_length` if None. At most `num_answer_slots / vertices_per_token` with `refine_draft`.
            num_flow_steps: Euler steps N; `config.num_flow_steps` if None. In training None draws N from
                `min_train_flow_steps` to `max_train_flow_steps`. 0 decodes the encoder's draft.
            encoder_outputs: States (B, num_answer_slots + S, encoder width) from `encoder_states`, so that a frozen
                pretrained encoder is not asked again.

        Returns:
            A `YanFlowOutput`: `loss` and its terms (scalars) with labels, and `logits` (B, L, V) and `latents`
            (B, L, D). With labels they are as wide as the labels, and in their order.

        Raises:
            ValueError: Labels that repeat the input or are wider than the canvas, a canvas beyond the positions, or
                fewer steps than 0.

        Example:

            >>> import torch
            >>> from modeling_yan import YanConfig, YanForFlowGeneration
            >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
            >>> model = YanForFlowGeneration(YanConfig(vocab_size=100, canvas_length=8, **sizes)).eval()
            >>> model(torch.tensor([[5, 6, 7]]), torch.ones(1, 3)).logits.shape
            torch.Size([1, 8, 100])
        """
        refuse_cache(kwargs)
        slots = self.config.num_answer_slots
        given = check_prompt(self, input_ids, attention_mask, position_ids, inputs_embeds, slots)
        if labels is not None:
            labels = check_labels(labels, self, len(given))
            refuse_echo(input_ids, attention_mask, labels, self.config.eos_token_id)
        if attention_mask is not None:
            # with padding between the slots and the prompt, or within it, tokens would not know their neighbours
            sequences = attention_mask, input_ids, position_ids, inputs_embeds
            attention_mask, input_ids, position_ids, inputs_embeds = with_valid_first(*sequences)
        canvas_length = self.config.canvas_length if canvas_length is None else canvas_length
        check_canvas(self.config, canvas_length)
        num_flow_steps = self._draw_num_steps() if num_flow_steps is None else num_flow_steps
        if not is_integer(num_flow_steps):
            raise ValueError(f"num_flow_steps={num_flow_steps!r}: must be an integer of at least 0")
        self._check_draft(canvas_length, num_flow_steps)
        prompt = self.encode_prompt(
            input_ids, attention_mask, position_ids, inputs_embeds, encoder_outputs=encoder_outputs, **kwargs
        )
        if labels is None:
            terms = self.logits_of_canvas(prompt, canvas_length, num_flow_steps)
        else:
            canvas = self.labels_to_canvas(labels, canvas_length)
            terms = self.along_path(self._objective(canvas, prompt, num_flow_steps), canvas)
            positions = positions_from_start(labels != IGNORE_INDEX)
            terms |= {name: select_positions(terms[name], positions) for name in ("logits", "latents")}
        return YanFlowOutput(**terms, hidden_states=prompt.hidden_states, attentions=prompt.attentions)


__all__ = [
    "YanAutoencodingOutput",
    "YanFlowOutput",
    "YanForAutoencoding",
    "YanForFlowGeneration",
    "YanModel",
    "YanPreTrainedModel",
]
