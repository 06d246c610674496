"""How probable a text is: the likelihood of what generation decodes, summed over the experts of a text.

Letters: B batch, S prompt length, L canvas length, D hidden size, K experts.
"""

from dataclasses import replace
from typing import cast

import torch

from .canvas_yan import CanvasNoise, CanvasPlan, YanPrompt, solve_canvas
from .checks_yan import check_labels, check_prompt, is_integer
from .generation_config_yan import YanGenerationConfig
from .layers_yan import with_valid_first
from .objective_yan import YanObjectiveMixin
from .stopping_yan import without_padding


class YanLikelihoodMixin(YanObjectiveMixin):
    """`log_likelihood` for flow models."""

    @torch.no_grad()
    def log_likelihood(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_flow_steps: int | None = None,
    ) -> torch.Tensor:
        """Log-probability (B,), in nats, of each target after its prompt.

        The start noise is fixed, as in generation without sampling. With `vertices_per_token` above 1 the probability
        of the text is summed over all its paths. Otherwise the probability is that of the canvas: of the target, and
        of EOS in all positions after it. The text itself is at least as probable.

        With `expert_scope="sequence"` the probability is summed over the experts:

            p(y) = sum_k pi_k p(y | x1_hat_k)

        With `"token"` it is conditional on the experts that `generate` chooses without sampling. Call
        `eval()` first: dropout would make the result random.

        Args:
            input_ids, attention_mask: Prompts (B, S), padding anywhere; without a mask, pad tokens are masked.
            labels: Target ids (B, up to L), -100 where there is none. EOS is added.
            num_flow_steps: Euler steps, at least 0; `config.num_flow_steps` if None. 0 decodes the encoder's draft.

        Returns:
            Log-probabilities (B,), at most 0.

        Raises:
            ValueError: Labels wider than the canvas, ids outside the vocabulary, or a number of steps below 0; of a
                graph, tokens after an EOS, where its texts end.

        Example:

            >>> import torch
            >>> from modeling_yan import YanConfig, YanForFlowGeneration
            >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
            >>> model = YanForFlowGeneration(YanConfig(vocab_size=100, canvas_length=8, **sizes)).eval()
            >>> model.log_likelihood(torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])).shape
            torch.Size([1])
        """
        num_flow_steps = self.config.num_flow_steps if num_flow_steps is None else num_flow_steps
        if not is_integer(num_flow_steps):
            raise ValueError(f"num_flow_steps={num_flow_steps!r}: must be an integer of at least 0")
        check_prompt(self, input_ids, attention_mask, None, None, self.config.num_answer_slots)
        labels = check_labels(labels, self, len(input_ids))
        if attention_mask is None:
            attention_mask = without_padding(input_ids, cast(YanGenerationConfig, self.generation_config))
        attention_mask, input_ids = with_valid_first(attention_mask, input_ids)
        prompt = self.encode_prompt(input_ids, attention_mask)
        canvas = self.labels_to_canvas(labels, self.config.canvas_length)
        self._check_draft(canvas.shape[1], num_flow_steps)
        if self.graph is not None:
            self._check_ends(canvas)
        if num_flow_steps == 0 or self.config.expert_scope != "sequence":
            plan = CanvasPlan.of_config(self.config, num_flow_steps, wants_tokens=False)
            noise = CanvasNoise(self.start_noise((1, self.config.num_vertices(canvas.shape[1])), prompt.latents))
            return self._log_likelihood_of(cast(torch.Tensor, solve_canvas(self, prompt, noise, plan).latents), canvas)
        joint = [self._joint(prompt, canvas, num_flow_steps, rank) for rank in range(self.config.num_experts)]
        return torch.stack(joint).logsumexp(0)

    def _check_ends(self, canvas: torch.Tensor) -> None:
        is_end = torch.isin(canvas, torch.tensor(self.config.end_ids, device=canvas.device))
        goes_on = ((is_end.cumsum(1) > 0) & ~is_end).any(1)
        if goes_on.any():
            raise ValueError(f"labels of row {int(goes_on.nonzero()[0])}: must have no tokens after an EOS")

    def _joint(self, prompt: YanPrompt, canvas: torch.Tensor, num_flow_steps: int, rank: int) -> torch.Tensor:
        """log pi_k p(y | x1_hat_k) (B,) of the expert whose probability has this rank, in every row."""
        plan = replace(
            CanvasPlan.of_config(self.config, num_flow_steps, wants_tokens=False),
            expert_choice="ranked",
            keep_path=True,
        )
        ranks = torch.full((len(canvas), 1), rank, device=canvas.device)
        x_0 = self.start_noise((1, self.config.num_vertices(canvas.shape[1])), prompt.latents)
        noise = CanvasNoise(x_0, expert_ranks=ranks)
        solved = solve_canvas(self, prompt, noise, plan)
        gate, experts = cast(torch.Tensor, solved.gate), cast(torch.Tensor, solved.experts)
        shares = gate[:, 0].gather(1, experts[:, :1]).squeeze(1)
        return shares.log() + self._log_likelihood_of(cast(torch.Tensor, solved.latents), canvas)

    def _log_likelihood_of(self, latents: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """log p(y | x1_hat) (B,) of the ids `canvas` (B, L), for latents (B, L, D)."""
        logits = self.decode(latents)
        if self.transitions is None:
            return self.text_log_likelihood(logits, latents, canvas).sum(1)
        return self.transitions.log_likelihood(self.get_input_embeddings(), logits, latents, canvas)
