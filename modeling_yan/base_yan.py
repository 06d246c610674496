"""What the mixins of the models may count on: the parts that the classes of `modeling_yan` have."""

import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from .checks_yan import check_refinement, not_finite_weights
from .configuration_yan import YanConfig

if TYPE_CHECKING:  # their files import this one
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from .decoding_yan import YanTransitions
    from .graphs_yan import YanGraph
    from .modeling_yan import YanDecoder, YanModel
    from .velocity_yan import YanFlow
else:
    PreTrainedModel = object  # the class itself is the last of every model's bases


class YanBaseMixin(PreTrainedModel):
    """A model of the family, and the terms of its loss."""

    config_class: type[YanConfig]
    config: YanConfig
    loss_terms: dict[str, torch.Tensor] | None = None  # of the last pass with labels, without gradient, for logs
    num_loss_rows = 0  # in that pass

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> "Self":
        """As in transformers, but a damaged file of weights is an OSError.

        NaN or infinity in it, or weights that an unmerged adapter wraps, are a ValueError.
        """
        is_asked = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: the file of weights is cut off or damaged ({error})"
            ) from error
        model, info = loaded
        if any(".base_layer." in name for name in info["unexpected_keys"]):
            hint = "finish the run with --resume_from_checkpoint True, or merge the adapter and save the model"
            raise ValueError(f"{pretrained_model_name_or_path}: the weights lie in an adapter's layers: {hint}")
        if found := not_finite_weights(model):
            raise ValueError(f"{pretrained_model_name_or_path}: the weights must be finite, and there is {found}")
        check_refinement(pretrained_model_name_or_path, model.config, kwargs)
        return loaded if is_asked else model

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *arguments: Any, **keywords: Any
    ) -> None:
        """As in transformers, without its warning that the config's objective has no model."""
        objective = self.config.objective
        before = objective._attn_implementation
        if isinstance(attn_implementation, str):
            objective._attn_implementation_internal = attn_implementation
        try:
            super().set_attn_implementation(attn_implementation, *arguments, **keywords)
        except ValueError:
            objective._attn_implementation_internal = before
            raise

    def _keep_terms(self, terms: dict[str, torch.Tensor], num_rows: int) -> None:
        self.num_loss_rows = num_rows
        self.loss_terms = {name: term.detach() for name, term in terms.items()}

    if TYPE_CHECKING:  # not otherwise: transformers looks the names of annotations up
        decoder: YanDecoder  # of the classes with a head
        lm_head: nn.Linear

        @property
        def base_model(self) -> "YanModel": ...

        def get_input_embeddings(self) -> nn.Embedding: ...


class YanFlowMixin(YanBaseMixin):
    """A model with a flow: the parts of `YanForFlowGeneration`."""

    if TYPE_CHECKING:
        model: YanModel
        flow: YanFlow
        transitions: YanTransitions | None
        graph: YanGraph | None
