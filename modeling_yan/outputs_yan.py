"""What the models return.

Letters of the shape comments: B batch, L canvas length, D hidden size, K experts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class YanAutoencodingOutput(ModelOutput):
    """Output of `YanForAutoencoding`; the terms are there when `labels` were given.

    Args:
        loss: Weighted sum of the terms below.
        ce_loss: Cross-entropy of the decoded latents against the labels, nats per token.
        mmd_loss: Squared maximum mean discrepancy between latents and N(0, I), if `mmd_weight` > 0.
        latent_norm_loss: Mean square of the latents.
        logits: (B, L, V). last_hidden_state: The latents (B, L, D).
        hidden_states, attentions: Of the encoder, when asked for.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    mmd_loss: torch.Tensor | None = None
    latent_norm_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class YanFlowOutput(ModelOutput):
    """Output of `YanForFlowGeneration`; the terms are there when `labels` were given, unweighted.

    Args:
        loss: Weighted sum of the terms below (`nll_loss_per_dim` for the likelihood, the entropy subtracted).
        nll_loss: Negative log-likelihood of the target velocity, nats per token.
        nll_loss_per_dim: The same divided by D, comparable across widths.
        mse_loss: Squared error of the solved latents, per token and dimension.
        ce_loss: Cross-entropy of the decoded solved latents, nats per token; with `train_expert_choice="posterior"`
            the mean over the solver's steps, each with the end point that it leads to. With a graph
            (`vertices_per_token`) it is the negative log-likelihood of the text, summed over its paths, and so are
            `text_loss` and `draft_loss`. It is divided by the canvas's tokens.
        text_loss: Negative log-likelihood of the target's tokens where the first step leads, summed over all experts,
            nats per token, with `train_expert_choice="posterior"`.
        draft_loss: Cross-entropy of the encoder's decoded draft, nats per token, where there are answer slots for it
            and the encoder is trained.
        crf_loss: Negative log-likelihood of the target by the CRF, nats per token, if there is one (`crf_rank`).
        gate_entropy: Mean entropy of the gate, nats. load_balance_loss: KL(mean gate || uniform), nats;
            in evaluation the mean over rows of that of each.
        expert_usage: Mean probability of each expert (K,) by the gate, with `train_expert_choice="posterior"` by the
            experts' posterior.
        expert_information: KL divergence of the experts' posterior from the gate, nats per text: how much the target
            tells about its expert, 0 if all experts generate the same. With `train_expert_choice="posterior"` and
            several experts.
        mmd_loss, latent_norm_loss: Of the target latents, where the encoder is trained through them.
        logits: (B, L, V) of the canvas; if there are labels, those of every label in its position, and where there is
            none those of the EOS behind the target. With a graph they are those of the vertices on the most probable
            path, of the labels if there are any.
        latents: The solved latents (B, L, D) that they are decoded from.
        hidden_states, attentions: Of the encoded prompt, its padding moved to the end, when asked for.
    """

    loss: torch.Tensor | None = None
    nll_loss: torch.Tensor | None = None
    nll_loss_per_dim: torch.Tensor | None = None
    mse_loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    draft_loss: torch.Tensor | None = None
    crf_loss: torch.Tensor | None = None
    gate_entropy: torch.Tensor | None = None
    expert_usage: torch.Tensor | None = None
    expert_information: torch.Tensor | None = None
    load_balance_loss: torch.Tensor | None = None
    mmd_loss: torch.Tensor | None = None
    latent_norm_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
