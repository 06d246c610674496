"""YAN: non-autoregressive language models that write a whole text in three flow-matching steps (arXiv 2604.15009)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_yan import YanConfig
from .generation_yan import YanGenerationConfig, YanGenerationOutput
from .modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel, YanPreTrainedModel

__version__ = "0.1.0"
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
