"""Tokens and positions to vectors, and the answer slots that the model puts before every prompt.

Letters of the shape comments: B batch, S prompt length, D hidden size, E width of the input embeddings.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .compilation_yan import select_rows


class YanEmbedding(nn.Embedding):
    """An embedding whose gradient is right where it is compiled, too."""

    def forward(self, ids):
        return select_rows(self.weight, ids)


class YanPositionEmbedding(YanEmbedding):
    """Learned positions that start as sinusoids: attention to a fixed distance is then one rotation.

    Their frequencies are evenly spaced up to half a turn a token, so that one position is unlike all others.
    """

    @torch.no_grad()
    def reset_sinusoids(self, standard_deviation: float):
        num_frequencies = self.embedding_dim // 2
        frequencies = math.pi * torch.arange(1, num_frequencies + 1) / num_frequencies
        angles = torch.arange(self.num_embeddings)[:, None] * frequencies
        table = nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.embedding_dim % 2))
        init.copy_(self.weight, math.sqrt(2) * standard_deviation * table)


class YanEmbeddings(nn.Module):
    """Token and learned position embeddings; the flow uses the positions too.

    A pretrained encoder has its own token embeddings, and may lack a mask token for the answer slots.
    """

    def __init__(self, config):
        super().__init__()
        if config.encoder is None:
            self.word_embeddings = YanEmbedding(config.vocab_size, config.hidden_size)
        elif config.num_answer_slots and config.mask_token_id is None:
            self.answer_slots = YanEmbedding(config.num_answer_slots, config.word_embedding_size)
        self.position_embeddings = YanPositionEmbedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None):
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        positions = self.position_embeddings(position_ids)
        return self.dropout(inputs_embeds.to(positions.dtype) + positions)


class YanAnswerSlotsMixin:
    """The answer slots of `YanForFlowGeneration`, and the draft that the encoder writes in their places."""

    def with_answer_slots(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None) -> dict:
        """The prompt with the model's own answer slots before it, as arguments of `YanModel`."""
        number = self.config.num_answer_slots
        if number and input_ids is not None and self.config.mask_token_id is None:
            input_ids, inputs_embeds = None, self.get_input_embeddings()(input_ids)
        if number and input_ids is not None:
            input_ids = F.pad(input_ids, (number, 0), value=self.config.mask_token_id)
        if number and inputs_embeds is not None:
            slots = self._slot_embeddings(inputs_embeds.device).to(inputs_embeds.dtype)
            inputs_embeds = torch.cat([slots.expand(len(inputs_embeds), -1, -1), inputs_embeds], dim=1)
        if number and attention_mask is not None:
            attention_mask = F.pad(attention_mask, (number, 0), value=1)
        if number and position_ids is not None:
            slots = torch.arange(number, device=position_ids.device).expand(len(position_ids), -1)
            position_ids = torch.cat([slots, position_ids + number], dim=1)
        names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
        return dict(zip(names, (input_ids, attention_mask, position_ids, inputs_embeds), strict=True))

    def _slot_embeddings(self, device):
        """Input embeddings (1, slots, E) of the answer slots: of mask tokens, or learned where there are none."""
        if self.config.mask_token_id is None:
            return self.model.embeddings.answer_slots(torch.arange(self.config.num_answer_slots, device=device)[None])
        ids = torch.full((1, self.config.num_answer_slots), self.config.mask_token_id, device=device)
        return self.get_input_embeddings()(ids)

    def _check_draft(self, canvas_length: int):
        slots = self.config.num_answer_slots
        if slots < canvas_length:
            allowed = f"at least 1 with num_answer_slots={slots} and canvas_length={canvas_length}: there is no draft"
            raise ValueError(f"num_flow_steps=0: must be {allowed}")

    def draft(self, latents, canvas_length: int) -> torch.Tensor:
        """The encoder's own latents (B, canvas_length, D) in the answer slots, out of those of the prompt (B, S, D).

        Raises:
            ValueError: There are fewer slots than the canvas has tokens.
        """
        slots = self.config.num_answer_slots
        if canvas_length > slots:
            needed = f"at least canvas_length={canvas_length}, to read the encoder's draft"
            raise ValueError(f"num_answer_slots={slots}: must be {needed}")
        return latents[:, :canvas_length]
