"""YAN: non-autoregressive language models that write a whole text in three flow-matching steps."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_yan import YanConfig
from .generation_yan import YanGenerationConfig, YanGenerationOutput
from .modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel, YanPreTrainedModel

AutoConfig.register("yan", YanConfig, exist_ok=True)
AutoModel.register(YanConfig, YanModel, exist_ok=True)
AutoModelForCausalLM.register(YanConfig, YanForFlowGeneration, exist_ok=True)
