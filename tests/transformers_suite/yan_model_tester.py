"""What transformers' common tests ask of the model under test: a tiny config, and inputs that fit it."""

import torch
from transformers.testing_utils import torch_device

from modeling_yan.configuration_yan import YanConfig


class YanModelTester:
    """Tiny configs and inputs of one variant; the attribute names are those that the suite reads."""

    is_training = True
    batch_size = 3
    seq_length = 7
    prompt_lengths = (7, 5, 6)
    canvas_length = 6
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    first_ordinary_id = 4

    def __init__(self, mixer: str):
        self.mixer = mixer

    def get_config(self, **overrides) -> YanConfig:
        """A config without noise, regularisers or frozen parts, so that all of it can be trained to the end."""
        fields = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_encoder_layers": self.num_hidden_layers,
            "num_flow_layers": 2,
            "num_decoder_layers": 1,
            "num_attention_heads": self.num_attention_heads,
            "encoder_mixer": self.mixer,
            "flow_mixer": self.mixer,
            "max_position_embeddings": 64,
            "canvas_length": self.canvas_length,
            "state_size": 4,
            "num_experts": 3,
            "decoder_dropout": 0.0,
            "freeze_encoder": False,
            "freeze_decoder": False,
            "freeze_embeddings": False,
        }
        return YanConfig(**{**fields, **overrides})

    def prepare_config_and_inputs_for_common(self):
        """A config with every loss term, noise and dropout switched on, and right-padded prompts."""
        config = self.get_config(
            hidden_dropout=0.1,
            attention_dropout=0.1,
            decoder_dropout=0.1,
            latent_noise=0.1,
            gate_entropy_weight=0.01,
            load_balance_weight=0.1,
            mmd_weight=0.1,
            latent_norm_weight=0.01,
            detach_target_latents=False,
        )
        lengths = torch.tensor(self.prompt_lengths)[:, None]
        attention_mask = (torch.arange(self.seq_length) < lengths).long()
        input_ids = self._ids(self.seq_length, seed=0).masked_fill(attention_mask == 0, config.pad_token_id)
        return config, {"input_ids": input_ids.to(torch_device), "attention_mask": attention_mask.to(torch_device)}

    def target_labels(self) -> torch.Tensor:
        """Labels (B, Lt) of the flow: a canvas of its own length, in which some tokens don't count."""
        labels = self._ids(self.canvas_length, seed=1)
        labels[1, -2:] = -100
        return labels

    def _ids(self, length: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.first_ordinary_id, self.vocab_size, (self.batch_size, length), generator=generator)
