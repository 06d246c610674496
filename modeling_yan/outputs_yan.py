"""What the models return.

Letters of the shape comments: B batch, L canvas length, D hidden size, K experts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class YanAutoencodingOutput(ModelOutput):
    """Output of `YanForAutoencoding`; the loss and its terms, scalars, are there when `labels` were given.

    Args:
        loss: Weighted sum of the terms below.
        ce_loss: Cross-entropy of the decoded latents against the labels, nats per token.
        mmd_loss: Squared maximum mean discrepancy between latents and N(0, I), if `mmd_weight` > 0.
        latent_norm_loss: Mean square of the latents.
        logits: (B, L, V).
        last_hidden_state: The latents (B, L, D).
        hidden_states: With `output_hidden_states`, the encoder's states (B, L, D), one before each layer and the last.
        attentions: With `output_attentions`, the weights (B, heads, L, L) of each encoder layer.
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
    """Output of `YanForFlowGeneration`; the loss and its unweighted terms are scalars, there when `labels` were given.

    Args:
        loss: Weighted sum of the terms below, with `nll_loss_per_dim` for `nll_loss`, and the entropy subtracted.
        nll_loss: Negative log-likelihood of the target velocity, nats per token.
        nll_loss_per_dim: The same divided by D, comparable across widths.
        mse_loss: Squared error of the solved latents, per token and dimension.
        ce_loss: Cross-entropy of the decoded solved latents, nats per token of the canvas. With
            `train_expert_choice="posterior"` it is the mean over the end points that each step leads to. With a graph
            (`vertices_per_token`), `ce_loss`, `text_loss` and `draft_loss` are the negative log-likelihood of the
            text, summed over its paths.
        text_loss: With `train_expert_choice="posterior"`, negative log-likelihood of the target by the end points of
            the first step, summed over all experts, nats per token.
        draft_loss: Cross-entropy of the encoder's decoded draft, nats per token, where there are answer slots for it
            and the encoder is trained.
        crf_loss: Negative log-likelihood of the target by the CRF, nats per token, if there is one (`crf_rank`).
        gate_entropy: Mean entropy of the gate, nats; at least 0.
        load_balance_loss: KL(mean gate || uniform), nats. In training the gate is averaged over the batch. In
            evaluation the KL of each row is computed, and then averaged.
        expert_usage: Mean probability of each expert (K,) by the gate, with `train_expert_choice="posterior"` by the
            experts' posterior.
        expert_information: KL divergence of the experts' posterior from the gate, nats per text: how much the target
            tells about its expert, 0 if all experts generate the same. With `train_expert_choice="posterior"` and
            several experts.
        mmd_loss, latent_norm_loss: As in `YanAutoencodingOutput`, of the target latents, if the encoder is trained
            through them.
        logits: (B, L, V) of the canvas. With labels, they have the width and order of the labels. A label of -100 has
            the logits of the EOS after the target. With a graph, they are those of the vertices on the most
            probable path, of the labels if there are any.
        latents: The solved latents (B, L, D) that the logits are decoded from; (B, G, D) of G vertices with a graph.
        hidden_states, attentions: Of the encoder for the prompt, as in `YanAutoencodingOutput`. The prompt's padding
            is moved to its end.

    Example:

        >>> import torch
        >>> from modeling_yan import YanConfig, YanForFlowGeneration
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
        >>> model = YanForFlowGeneration(YanConfig(vocab_size=100, canvas_length=8, **sizes))
        >>> output = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[8, 9]]))
        >>> output.loss.shape, output.logits.shape
        (torch.Size([]), torch.Size([1, 2, 100]))
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
