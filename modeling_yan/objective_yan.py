"""What YAN is trained on: the objective of the paper, and the likelihood of whole texts (arXiv 2604.15009, section 3).

Letters of the shape comments: B batch, L canvas length, D hidden size, K experts, V vocabulary.
"""

from collections.abc import Iterable
from functools import reduce
from typing import cast

import torch
from torch.nn import functional as F

from .base_yan import YanBaseMixin
from .canvas_yan import CanvasPlan, YanCanvasMixin, YanPrompt
from .checks_yan import IGNORE_INDEX
from .experts_yan import YanExpertChoice, YanExpertPrior
from .flow_matching_yan import (
    as_one_token,
    extrapolate,
    gate_entropy,
    gaussian_mmd,
    hash_tokens,
    hashed_normal,
    hashed_uniform,
    interpolate,
    load_balance,
    load_balance_of_rows,
    masked_mean,
    mixture_nll,
    sample_times,
    solve_flow,
    token_cross_entropy,
)
from .layers_yan import count_positions
from .objective_config_yan import YanObjectiveConfig
from .velocity_yan import YanCondition

PRIOR_TEMPERATURE = 4.0  # of the gate in the posterior that experts are drawn from


def latent_regularisers(
    model: YanBaseMixin, latents: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Mean square of the valid latents and, where its weight is above 0, their MMD to N(0, I)."""
    terms = {"latent_norm_loss": masked_mean(latents.float().square().mean(-1), attention_mask)}
    if model.config.objective.mmd_weight > 0:
        tokens = latents.flatten(0, 1) if attention_mask is None else latents[attention_mask.bool()]
        if len(tokens):
            terms["mmd_loss"] = gaussian_mmd(tokens, seed=None if model.training else 0)
    return terms


def add_up(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of one or more tensors, in order."""
    return reduce(torch.add, terms)


def weighted_sum(objective: YanObjectiveConfig, terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the terms `x_loss`, each with the objective's `x_weight`."""
    return add_up(getattr(objective, name.removesuffix("_loss") + "_weight") * term for name, term in terms.items())


class YanObjectiveMixin(YanCanvasMixin):
    """The loss terms of `YanForFlowGeneration`."""

    def _solve(
        self, x_0: torch.Tensor, condition: YanCondition, num_flow_steps: int, expert_choice: str = "argmax"
    ) -> torch.Tensor:
        """The latents x1_hat (B, L, D) that Euler steps reach from x0, with gradients."""
        choice = YanExpertChoice(expert_choice)
        velocity = self.velocity_field(condition, x_0.shape[1], num_flow_steps, choice=choice)
        return solve_flow(velocity, x_0, num_flow_steps)

    def _most_probable(self, ends: torch.Tensor, prior: YanExpertPrior) -> torch.Tensor:
        """The experts that `generate` chooses without sampling."""
        return self.best_experts(ends, prior, CanvasPlan.of_config(self.config, self.config.num_flow_steps))

    @torch.no_grad()
    def _expert_log_likelihood(self, ends: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """log p_k(y) (B, L, K) of the target ids `canvas` where each expert leads, `ends` (B, L, K, D)."""
        # one by one: the logits of all experts at once would be K vocabularies wide
        each = []
        for end in ends.detach().unbind(-2):
            each.append(self.text_log_likelihood(self.lm_head(self.decoder(end, dropout=False)), end, canvas))
        stacked = torch.stack(each, dim=-1)
        # of a whole text as if its first token had all of it
        return F.pad(stacked, (0, 0, 0, ends.shape[1] - stacked.shape[1]))

    def _number_rows(
        self, canvas: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """A number (B,) for the prompt and the target of each row, which decide what evaluation draws for it.

        So a row's loss depends neither on its position in the batch nor on its padding. None in training.
        """
        if self.training:
            return None
        numbers = hash_tokens(canvas, count_positions(canvas), canvas != self._end_id())
        if input_ids is None:
            return numbers
        is_valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return (3 * numbers + hash_tokens(input_ids, count_positions(input_ids, attention_mask), is_valid)) % 2**32

    def _draw_path(self, x_1: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Start points and times of a training batch; in evaluation mode those of the `rows` (B,)."""
        if self.training:
            x_0 = self.config.init_noise * torch.randn_like(x_1)
            alpha, beta = self.config.objective.time_alpha, self.config.objective.time_beta
            return x_0, sample_times(len(x_1), alpha, beta, device=x_1.device)
        x_0 = self.config.init_noise * hashed_normal(0, tuple(x_1.shape), x_1.device, rows)
        return x_0.to(x_1.dtype), hashed_uniform(1, (len(x_1),), x_1.device, rows)

    def _nll(self, target: torch.Tensor, velocities: torch.Tensor, gate_log_probs: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood per token of the velocities `target` (B, L, D)."""
        sigma, length = self.config.objective.flow_sigma, target.shape[1]
        if self.config.expert_scope == "token":
            return mixture_nll(target, velocities, gate_log_probs, sigma)
        return mixture_nll(*as_one_token(target, velocities, gate_log_probs), sigma) / length

    def _objective(self, canvas: torch.Tensor, prompt: YanPrompt, num_flow_steps: int) -> dict[str, torch.Tensor]:
        """All loss terms and the logits (B, L, V) for the target ids `canvas` (B, L) of an encoded prompt.

        In evaluation mode they are the means of what every row has by itself.
        """
        config, objective = self.config, self.config.objective
        rows = self._number_rows(canvas, prompt.input_ids, prompt.attention_mask)
        num_vertices = config.num_vertices(canvas.shape[1])
        condition = self.condition(prompt.latents, prompt.attention_mask, num_vertices, prompt.position_ids)
        if config.train_expert_choice == "posterior":
            return self._text_objective(canvas, condition, num_flow_steps, rows)
        x_1 = self._encode_target(canvas)
        x_0, time = self._draw_path(x_1, rows)
        modulation = self.flow.modulation(time)
        positions = self._positions(canvas.shape[1], canvas.device)
        x_t = interpolate(x_0, x_1, time)
        states = self.flow.trunk(x_t, positions, modulation, condition)
        gate_log_probs = self.flow.gate_log_probs(states, modulation, condition)
        nll = self._nll(x_1 - x_0, self.flow.velocities(states, x_t), gate_log_probs)
        choice = config.train_expert_choice if self.training else "argmax"
        x_1_hat = self._solve(x_0, condition, num_flow_steps, choice)
        logits = self.decode(x_1_hat)
        terms = {
            "mse_loss": (x_1_hat.float() - x_1.float()).square().mean(),
            "ce_loss": token_cross_entropy(logits, canvas),
            "load_balance_loss": load_balance(gate_log_probs)
            if self.training
            else load_balance_of_rows(gate_log_probs),
        }
        terms |= self._draft_loss(condition, canvas)
        if self.transitions is not None:
            embedding = self.get_input_embeddings()
            terms["crf_loss"] = self.transitions.loss(embedding, logits, x_1_hat, canvas)
        if x_1.requires_grad:
            terms |= latent_regularisers(self, x_1)
        entropy, nll_per_dim = gate_entropy(gate_log_probs), nll / config.hidden_size
        loss = weighted_sum(objective, terms) + objective.nll_weight * nll_per_dim
        loss = loss - objective.gate_entropy_weight * entropy
        terms |= {"nll_loss": nll, "nll_loss_per_dim": nll_per_dim, "gate_entropy": entropy}
        self._keep_terms(terms, len(canvas))
        expert_usage = gate_log_probs.exp().mean((0, 1)).detach()
        return {"loss": loss, **terms, "logits": logits, "latents": x_1_hat, "expert_usage": expert_usage}

    def _text_objective(
        self, canvas: torch.Tensor, condition: YanCondition, num_flow_steps: int, rows: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The same for `train_expert_choice="posterior"`: the likelihood of the text, summed over its experts.

        -log sum_k pi(k) prod_i p(y_i | D(x1_hat_k)), over the experts k of all tokens

        Where would each expert lead, and how probable does that make the target's tokens? The gate learns to make the
        sum as large as it can be (`text_loss`). Each step of the solver learns to lead to the target (`ce_loss`), with
        experts drawn from their posterior. For that posterior the gate is flattened: an expert that is a little ahead
        would otherwise get every text, and the others would never learn to generate one.
        """
        config, objective = self.config, self.config.objective
        terms: dict[str, torch.Tensor] = {}
        if num_flow_steps == 0:
            return self._one_pass_objective(canvas, condition)
        num_tokens = canvas.numel()

        def choose(ends: torch.Tensor, prior: YanExpertPrior) -> torch.Tensor:
            log_likelihood = self._expert_log_likelihood(ends, canvas)
            terms["text_loss"] = -prior.log_evidence(log_likelihood).sum() / num_tokens
            terms["expert_information"] = prior.information(log_likelihood).mean().detach()
            posterior = prior.tempered(PRIOR_TEMPERATURE).posterior(log_likelihood)
            terms["expert_usage"] = posterior.gate_log_probs.exp().mean((0, 1)).detach()
            if not self.training:
                return self._most_probable(ends, prior)
            return cast(torch.Tensor, posterior.choose("sample"))

        num_vertices = config.num_vertices(canvas.shape[1])
        x_0, _ = self._draw_path(condition.mean.new_empty(len(canvas), num_vertices, config.hidden_size), rows)
        choice = YanExpertChoice(judge=choose if config.num_experts > 1 else None)
        velocity = self.velocity_field(condition, num_vertices, num_flow_steps, choice=choice)
        ends, path = [], [x_0]

        def collect(step: int, x: torch.Tensor) -> None:
            ends.append(extrapolate(path[-1], x, step, num_flow_steps))
            path.append(x)

        x_1_hat = solve_flow(velocity, x_0, num_flow_steps, callback=collect)
        all_logits = [self.decode(end) for end in ends]
        pairs = zip(all_logits, ends, strict=True)
        ce_losses = [self.text_cross_entropy(logits, end, canvas) for logits, end in pairs]
        terms["ce_loss"] = add_up(ce_losses) / num_flow_steps
        if config.num_experts == 1:  # its likelihood is known, and there is nothing to choose
            terms |= {"text_loss": ce_losses[0].detach(), "expert_usage": torch.ones(1, device=canvas.device)}
        terms |= self._draft_loss(condition, canvas)
        if objective.mse_weight:
            x_1 = self._encode_target(canvas)
            terms["mse_loss"] = add_up((end.float() - x_1.float()).square().mean() for end in ends) / num_flow_steps
            if x_1.requires_grad:
                terms |= latent_regularisers(self, x_1)
        if self.transitions is not None:
            embedding = self.get_input_embeddings()
            terms["crf_loss"] = self.transitions.loss(embedding, all_logits[-1], x_1_hat, canvas)
        loss = weighted_sum(objective, {name: term for name, term in terms.items() if name.endswith("_loss")})
        self._keep_terms({name: term for name, term in terms.items() if term.dim() == 0}, len(canvas))
        return {"loss": loss, **terms, "logits": all_logits[-1], "latents": x_1_hat}

    def _one_pass_objective(self, canvas: torch.Tensor, condition: YanCondition) -> dict[str, torch.Tensor]:
        """The same without a flow: the likelihood of the text where the encoder's answer slots stand."""
        draft = self.draft(condition.draft, self.config.num_vertices(canvas.shape[1]))
        logits = self.decode(draft)
        terms = {"ce_loss": self.text_cross_entropy(logits, draft, canvas)}
        if self.transitions is not None:
            embedding = self.get_input_embeddings()
            terms["crf_loss"] = self.transitions.loss(embedding, logits, draft, canvas)
        loss = weighted_sum(self.config.objective, terms)
        self._keep_terms(terms, len(canvas))
        return {"loss": loss, **terms, "logits": logits, "latents": draft}

    def labels_to_canvas(self, labels: torch.Tensor, canvas_length: int) -> torch.Tensor:
        """Target ids at the start of a canvas (B, canvas_length), followed by EOS to its end.

        Raises:
            ValueError: `labels` are wider than the canvas, or the config has no EOS to fill it with.
        """
        if labels.shape[1] > canvas_length:
            raise ValueError(
                f"labels are {labels.shape[1]} tokens wide: must be at most canvas_length={canvas_length}"
            )
        valid = labels != IGNORE_INDEX
        position = torch.where(valid, valid.cumsum(1) - 1, canvas_length)  # what is no target goes to a column beyond
        canvas = labels.new_full((len(labels), canvas_length + 1), self._end_id())
        return canvas.scatter(1, position, labels)[:, :canvas_length]

    def _end_id(self) -> int:
        if self.config.eos_token_id is None:
            raise ValueError("eos_token_id=None: must be the id of a token, which fills the canvas behind a target")
        return self.config.eos_token_id

    def _draw_num_steps(self) -> int:
        if not self.training:
            return self.config.num_flow_steps
        fewest, most = self.config.objective.min_train_flow_steps, self.config.objective.max_train_flow_steps
        if fewest == most:  # a draw would break a compiled graph
            return fewest
        return int(torch.randint(fewest, most + 1, ()))

    def _encode_target(self, canvas: torch.Tensor) -> torch.Tensor:
        is_constant = self.config.objective.detach_target_latents
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_constant):
            return self.model(canvas, return_dict=True, output_hidden_states=False).last_hidden_state

    def _draft_loss(self, condition: YanCondition, canvas: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy of the encoder's draft, where there is one to train."""
        number, objective = self.config.num_vertices(canvas.shape[1]), self.config.objective
        has_draft = self.config.num_answer_slots >= number
        if not has_draft or objective.freeze_encoder or not objective.draft_weight:
            return {}
        draft = self.draft(condition.draft, number)
        return {"draft_loss": self.text_cross_entropy(self.decode(draft), draft, canvas)}
