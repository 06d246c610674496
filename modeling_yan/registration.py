"""The public classes, registered with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_yan import YanConfig
from .generation_config_yan import YanGenerationConfig
from .generation_yan import YanGenerationOutput
from .modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel, YanPreTrainedModel

__all__ = [
    "YanConfig",
    "YanForAutoencoding",
    "YanForFlowGeneration",
    "YanGenerationConfig",
    "YanGenerationOutput",
    "YanModel",
    "YanPreTrainedModel",
]

AutoConfig.register("yan", YanConfig, exist_ok=True)
YanConfig.register_for_auto_class()
for auto_class, model_class in {
    AutoModel: YanModel,
    AutoModelForMaskedLM: YanForAutoencoding,
    AutoModelForCausalLM: YanForFlowGeneration,
}.items():
    auto_class.register(YanConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)  # so that saving writes the code beside the weights
