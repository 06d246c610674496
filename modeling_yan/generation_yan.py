from transformers import GenerationConfig
from transformers.generation import GenerationMixin
class YanGenerationConfig(GenerationConfig):
    @classmethod
    def from_yan_config(cls, config):
        return cls()
class YanGenerationMixin(GenerationMixin):
    pass
