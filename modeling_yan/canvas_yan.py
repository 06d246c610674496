"""One canvas of tokens: condition, start, velocity, solve, decode (arXiv 2604.15009).

`forward`, `generate`, compiled and exported generation all come here, to `solve_canvas`.

Letters of the shape comments: B prompts, R sequences a prompt, S prompt length, L canvas length, D hidden size,
K experts, N solver steps, C candidates of a token. With several vertices a token, points, latents and experts are
those of the vertices, and L is their number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from .chains_yan import rank_by_length
from .compilation_yan import is_exporting
from .configuration_yan import YanConfig
from .decoding_yan import YanDecodingMixin
from .experts_yan import YanExpertChoice, YanExpertPrior, choose_experts
from .flow_matching_yan import extrapolate, hashed_normal, solve_flow
from .graphs_yan import YanGraph
from .layers_yan import count_positions, select_positions
from .pretrained_yan import YanPretrainedMixin
from .velocity_yan import YanCondition, YanVelocity

OnDraft = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class CanvasPlan:
    """What is done with the tensors that a canvas is made from.

    Args:
        num_flow_steps, expert_choice, eos_strategy, crf_decoding, length_penalty: As in
            `YanGenerationConfig`.
        repeats: Sequences R per prompt.
        suppressed: Forbidden token ids. eos: Ids forbidden among the first `num_without_eos` tokens.
        keep_path: Whether the points of the path, the experts and their gate are wanted.
        temperature: Of what is drawn: experts, and tokens of a chain.
        wants_tokens: Whether the latents are decoded to token ids; else the canvas has the latents.
    """

    num_flow_steps: int
    expert_choice: str
    repeats: int
    suppressed: tuple[int, ...]
    eos: tuple[int, ...]
    num_without_eos: int
    keep_path: bool
    eos_strategy: str = "likeliest"
    crf_decoding: bool = True
    length_penalty: float = 1.0
    temperature: float = 1.0
    wants_tokens: bool = True

    @classmethod
    def of_config(
        cls, config: YanConfig, num_flow_steps: int, num_without_eos: int = 0, **options: Any
    ) -> "CanvasPlan":
        """The plan of a canvas without sampling and without further wishes."""
        eos = () if config.eos_token_id is None else (config.eos_token_id,)
        return cls(num_flow_steps, "argmax", 1, (), eos, num_without_eos, False, **options)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that nothing else follows in a decoded text."""
        return self.eos if self.eos_strategy == "likeliest" else ()

    @property
    def path_ends(self) -> tuple[int, ...]:
        """The ids that may end a path of a graph."""
        return tuple(token for token in self.eos if token not in self.suppressed)


class CanvasNoise(NamedTuple):
    """The numbers that a canvas is made from.

    Args:
        x_0: Start points (B R or 1, L, D). expert_uniform, expert_ranks: As in `choose_experts`, for B R rows.
        token_uniform: Numbers (B R, L, C) in (0, 1) to draw the tokens of the CRF with, or (B R, L, 2) for a path;
            None for the best text.
    """

    x_0: torch.Tensor
    expert_uniform: torch.Tensor | None = None
    expert_ranks: torch.Tensor | None = None
    token_uniform: torch.Tensor | None = None


@dataclass
class Canvas:
    """One canvas: its token ids (B R, L) or latents (B R, L, D), and how they came about where that is wanted."""

    tokens: torch.Tensor | None
    num_trunk_passes: int
    latents: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    gate: torch.Tensor | None = None


@dataclass
class YanPrompt:
    """An encoded prompt, the model's own answer slots before it.

    Args:
        latents: (B, S, D). attention_mask: (B, S), or None if all of it is valid.
        position_ids: (B or 1, S). input_ids: (B, S), None where embeddings were given.
        hidden_states, attentions: Of the encoder, when asked for.
    """

    latents: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    def repeat(self, number: int) -> "YanPrompt":
        """Every prompt so many times, one after the other: what a canvas needs of it."""
        if number == 1:
            return self

        def repeated(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(number, 0)

        is_common = self.position_ids is not None and self.position_ids.shape[0] == 1
        positions = self.position_ids if is_common else repeated(self.position_ids)
        return YanPrompt(self.latents.repeat_interleave(number, 0), repeated(self.attention_mask), positions)


def solve_canvas(
    model: "YanCanvasMixin", prompt: YanPrompt, noise: CanvasNoise, plan: CanvasPlan, on_draft: OnDraft | None = None
) -> Canvas:
    """Generate one canvas for encoded prompts: nothing but a function of tensors and the plan.

    Args:
        model: A `YanForFlowGeneration`. prompt: B rows. noise: For B R rows.
        on_draft: Called after every step with the tokens (B R, L) to which it would lead.
    """
    prompt, length = prompt.repeat(plan.repeats), noise.x_0.shape[1]
    if plan.num_flow_steps == 0:
        return _decoded(model, model.draft(prompt.latents, length), noise, plan)
    condition = model.condition(prompt.latents, prompt.attention_mask, length, prompt.position_ids)
    x_0 = noise.x_0.to(condition.mean.dtype).expand(condition.mean.shape[0], -1, -1)
    choice = model.expert_choice(plan, noise)
    velocity = model.velocity_field(condition, length, plan.num_flow_steps, choice)
    path = [x_0]

    def record(step: int, x: torch.Tensor) -> None:
        path.append(x)
        if not plan.keep_path:
            del path[:-2]  # a draft needs the last step alone
        if on_draft is not None:
            draft = extrapolate(path[-2], path[-1], step, plan.num_flow_steps)
            on_draft(model.decode_tokens(draft, plan, noise.token_uniform))

    x_1 = solve_flow(velocity, x_0, plan.num_flow_steps, record)
    canvas = _decoded(model, x_1, noise, plan)
    canvas.num_trunk_passes = velocity.num_trunk_passes
    if canvas.tokens is not None:  # a gate that is NaN still chooses an expert
        is_lost = cast(torch.Tensor, velocity.gate_log_probs).isnan().any(-1)
        is_lost = is_lost if model.graph is None else is_lost.any(1, keepdim=True)
        canvas.tokens = canvas.tokens.masked_fill(is_lost, -1)
    if plan.keep_path:
        canvas.trajectory, canvas.experts = torch.stack(path, 1), velocity.experts
        canvas.gate = cast(torch.Tensor, velocity.gate_log_probs).exp()
    return canvas


def _decoded(model: "YanCanvasMixin", latents: torch.Tensor, noise: CanvasNoise, plan: CanvasPlan) -> Canvas:
    if not plan.wants_tokens:
        return Canvas(None, 0, latents)
    return Canvas(model.decode_tokens(latents, plan, noise.token_uniform), 0)


def encode_and_solve(
    model: "YanCanvasMixin",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    x_0: torch.Tensor,
    expert_uniform: torch.Tensor | None,
    expert_ranks: torch.Tensor | None,
    token_uniform: torch.Tensor | None,
    plan: CanvasPlan,
    on_draft: OnDraft | None = None,
) -> Canvas:
    """One canvas for prompts (B, S): what is compiled, recorded and exported as a whole.

    Their valid tokens come first in every row; the mask may be None if all are valid. The other arguments are those of
    `CanvasNoise` and `solve_canvas`.
    """
    prompt = model.encode_prompt(input_ids, attention_mask, count_positions(input_ids, attention_mask))
    return solve_canvas(model, prompt, CanvasNoise(x_0, expert_uniform, expert_ranks, token_uniform), plan, on_draft)


class YanCanvasMixin(YanDecodingMixin, YanPretrainedMixin):
    """What `YanForFlowGeneration` makes a canvas of."""

    def encode_prompt(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> YanPrompt:
        """Encode prompts (B, S) whose valid tokens come first, after the model's own answer slots."""
        given = self.with_answer_slots(input_ids, attention_mask, position_ids, inputs_embeds)
        encode: Callable[..., Any] = self.model
        if encoder_outputs is not None:
            encode = partial(self.take_states, encoder_outputs)
        outputs = encode(**given, return_dict=True, **kwargs)
        about = {name: given[name] for name in ("attention_mask", "position_ids", "input_ids")}
        about |= {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return YanPrompt(outputs.last_hidden_state, **about)

    def with_answer_slots(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The prompt with the model's own answer slots before it, as arguments of `YanModel`.

        With `copy_prompt_to_slots` the valid tokens of `input_ids` must come first.
        """
        number = self.config.num_answer_slots
        if number and input_ids is not None and self.config.mask_token_id is None:
            input_ids, inputs_embeds = None, self.get_input_embeddings()(input_ids)
        if number and input_ids is not None:
            slots = input_ids.new_full((1, number), cast(int, self.config.mask_token_id))
            input_ids = torch.cat([self._fill_slots(slots, input_ids, attention_mask), input_ids], dim=1)
        if number and inputs_embeds is not None:
            slots = self._slot_embeddings(inputs_embeds.device).to(inputs_embeds.dtype)
            inputs_embeds = torch.cat([self._fill_slots(slots, inputs_embeds, attention_mask), inputs_embeds], dim=1)
        if number and attention_mask is not None:
            attention_mask = F.pad(attention_mask, (number, 0), value=1)
        if number and position_ids is not None:
            slots = torch.arange(number, device=position_ids.device).expand(position_ids.shape[0], -1)
            position_ids = torch.cat([slots, position_ids + number], dim=1)
        names = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
        return dict(zip(names, (input_ids, attention_mask, position_ids, inputs_embeds), strict=True))

    def _fill_slots(
        self, slots: torch.Tensor, prompt: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """What the answer slots of a prompt (B, S, ...) hold: `slots` (1, N, ...), or its own first tokens.

        Each of those is in as many slots as a token has vertices.
        """
        number = slots.shape[1]
        slots = slots.expand(prompt.shape[0], *slots.shape[1:])
        if not self.config.copy_prompt_to_slots:
            return slots
        if attention_mask is None:
            attention_mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        if self.config.vertices_per_token > 1:
            prompt, attention_mask = (
                each.repeat_interleave(self.config.vertices_per_token, 1) for each in (prompt, attention_mask)
            )
        is_token = F.pad(attention_mask, (0, number))[:, :number].bool()
        copied = F.pad(prompt, (0, 0) * (prompt.dim() - 2) + (0, number))[:, :number]
        return torch.where(is_token.view(*is_token.shape, *[1] * (prompt.dim() - 2)), copied, slots)

    def _slot_embeddings(self, device: torch.device) -> torch.Tensor:
        """Input embeddings (1, slots, E) of the answer slots: of mask tokens, or learned where there are none."""
        if self.config.mask_token_id is None:
            return self.model.embeddings.answer_slots(torch.arange(self.config.num_answer_slots, device=device)[None])
        ids = torch.full((1, self.config.num_answer_slots), self.config.mask_token_id, device=device)
        return self.get_input_embeddings()(ids)

    def logits_of_canvas(self, prompt: YanPrompt, canvas_length: int, num_flow_steps: int) -> dict[str, torch.Tensor]:
        """Latents (B, L, D) of the canvas that `generate` decodes without sampling, and their logits (B, L, V)."""
        noise = CanvasNoise(self.start_noise((1, self.config.num_vertices(canvas_length)), prompt.latents))
        plan = CanvasPlan.of_config(self.config, num_flow_steps, wants_tokens=False)
        latents = cast(torch.Tensor, solve_canvas(self, prompt, noise, plan).latents)
        terms = {"logits": self.decode(latents), "latents": latents}
        if self.graph is None:
            return terms
        _, vertices = self.graph.most_likely(
            self.get_input_embeddings(), terms["logits"], latents, canvas_length, plan.eos
        )
        return {name: select_positions(term, vertices) for name, term in terms.items()}

    def along_path(self, terms: dict[str, torch.Tensor], canvas: torch.Tensor) -> dict[str, torch.Tensor]:
        """Terms whose logits and latents are those of the tokens `canvas` (B, L), on their most probable path."""
        if self.graph is None:
            return terms
        vertices = self.vertices_of(terms["logits"], terms["latents"], canvas)
        return terms | {name: select_positions(terms[name], vertices) for name in ("logits", "latents")}

    @torch.no_grad()
    def vertices_of(self, logits: torch.Tensor, latents: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        """Where the tokens `canvas` (B, L) of a graph stand on their most probable path, (B, L)."""
        graph = cast(YanGraph, self.graph)
        return graph.align(self.get_input_embeddings(), logits, latents, canvas, self.config.end_ids)

    def _check_draft(self, canvas_length: int, num_flow_steps: int) -> None:
        """Raise ValueError if the encoder's draft is asked for and does not fill the canvas."""
        slots, per_token = self.config.num_answer_slots, self.config.vertices_per_token
        has_draft = slots >= self.config.num_vertices(canvas_length)
        shares = f"num_answer_slots={slots}" + f" / vertices_per_token={per_token}" * (per_token > 1)
        if not has_draft and self.config.refine_draft:
            raise ValueError(f"canvas_length={canvas_length}: must be at most {shares} with refine_draft=True")
        if not has_draft and num_flow_steps == 0:
            allowed = f"at least 1 with {shares} and canvas_length={canvas_length}: there is no draft"
            raise ValueError(f"num_flow_steps=0: must be {allowed}")

    def draft(self, latents: torch.Tensor | None, canvas_length: int) -> torch.Tensor:
        """The encoder's latents (B, canvas_length, D) in the first answer slots, from those of the prompt (B, S, D).

        With a graph, `canvas_length` counts vertices.

        Raises:
            ValueError: There are fewer slots than that.
        """
        slots = self.config.num_answer_slots
        if latents is None or canvas_length > slots:
            needed = f"at least canvas_length={canvas_length}, to read the encoder's draft"
            raise ValueError(f"num_answer_slots={slots}: must be {needed}")
        return latents[:, :canvas_length]

    def condition(
        self,
        latents: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        canvas_length: int = 1,
        position_ids: torch.Tensor | None = None,
    ) -> YanCondition:
        """What the flow needs of the encoded prompt, latents (B, S, D) with mask (B, S)."""
        if position_ids is None:
            position_ids = count_positions(latents, attention_mask)
        positions = self.model.embeddings.position_embeddings(position_ids)
        draft = latents[:, : self.config.num_answer_slots] if self.config.num_answer_slots else None
        return self.flow.condition(latents, positions, attention_mask, canvas_length, draft)

    def start_noise(self, shape: tuple[int, int], like: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """x0 (B, L, D) of deviation `init_noise`, a pure function of the seed and of each element's position."""
        noise = hashed_normal(seed, (*shape, self.config.hidden_size), like.device)
        return (self.config.init_noise * noise).to(like.dtype)

    def velocity_field(
        self,
        condition: YanCondition,
        canvas_length: int,
        num_flow_steps: int,
        choice: YanExpertChoice | None = None,
    ) -> YanVelocity:
        """The velocity of one solve over canvases of `canvas_length` tokens, for `solve_flow`."""
        positions = self._positions(canvas_length, condition.mean.device)
        return YanVelocity(self.flow, positions, condition, num_flow_steps, choice or YanExpertChoice())

    def _positions(self, canvas_length: int, device: torch.device | None = None) -> torch.Tensor:
        """Position embeddings (L, D) of a canvas; its device has to be named, as weights may be elsewhere."""
        return self.model.embeddings.position_embeddings(torch.arange(canvas_length, device=device))

    def expert_choice(self, plan: CanvasPlan, noise: CanvasNoise) -> YanExpertChoice:
        """How the experts of a canvas are chosen."""
        has_choice = self.config.num_experts > 1 and self.config.expert_scope == "sequence"
        by_text = has_choice and plan.expert_choice == "argmax"
        judge = partial(self.best_experts, plan=plan) if by_text else None
        draws_text = has_choice and plan.expert_choice == "sample" and noise.token_uniform is not None
        if draws_text and plan.temperature != 1:
            judge = partial(self.draw_experts, plan=plan, uniform=cast(torch.Tensor, noise.expert_uniform))
        temperature = plan.temperature if plan.expert_choice == "sample" and judge is None else 1.0
        return YanExpertChoice(plan.expert_choice, noise.expert_uniform, noise.expert_ranks, temperature, judge)

    @torch.no_grad()
    def draw_experts(
        self, ends: torch.Tensor, prior: YanExpertPrior, plan: CanvasPlan, uniform: torch.Tensor
    ) -> torch.Tensor:
        """The experts (B, L) of texts that are drawn at a temperature T other than 1, one expert for a text.

        Expert k counts by pi_k (pi_k p_k)^(1/T - 1), where p_k is the probability of its best text, as if the best
        texts were equally long. At T = 1 that is the gate. At T = 0 it is the expert of the best text, which the gate
        alone would not find. The sum of p_k(y)^(1/T) over all texts would be exact, and prefer experts of few texts.

        Args:
            ends: What every expert's head predicts, (B, L, K, D). uniform: Numbers (B, L, K) in (0, 1).
        """
        gate = prior.gate_log_probs[:, 0]
        scores, lengths = self._best_of_each(ends, plan)
        best = (gate + scores) * lengths.float().mean(1, keepdim=True) / lengths
        weights = gate + (1 / max(plan.temperature, 1e-4) - 1) * best
        chosen = cast(torch.Tensor, choose_experts(weights, "sample", uniform[:, 0]))
        return chosen.unsqueeze(-1).expand(prior.gate_log_probs.shape[:2])

    @torch.no_grad()
    def best_experts(self, ends: torch.Tensor, prior: YanExpertPrior, plan: CanvasPlan) -> torch.Tensor:
        """The experts (B, L) that are the most probable together with the text that they lead to.

        The gate alone does not know: of sixteen experts that are about as probable, some lead to far better texts. Of
        one expert a token that is the gate's choice. With one for a text, expert and best text together have the
        highest log-probability, divided by the text's length to the power `length_penalty`.

        Args:
            ends: What every expert's head predicts, (B, L, K, D). prior: A `YanExpertPrior`. plan: A `CanvasPlan`.
        """
        if prior.scope == "token":
            return cast(torch.Tensor, prior.choose("argmax"))
        scores, lengths = self._best_of_each(ends, plan)
        joint = scores + prior.gate_log_probs[:, 0]
        best = rank_by_length(joint, lengths.float(), plan.length_penalty).argmax(-1, keepdim=True)
        return best.expand(prior.gate_log_probs.shape[:2])

    def _rows_of_experts(self, ends: torch.Tensor) -> Sequence[torch.Tensor]:
        """The ends (B, L, K, D) as rows (K B, L, D), in parts whose logits fit into memory together."""
        by_expert = ends.unbind(2)
        return by_expert if is_exporting() else self.split_rows(torch.cat(by_expert))

    def _best_of_each(self, ends: torch.Tensor, plan: CanvasPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and length (B, K) of the most likely text of each expert, `ends` (B, L, K, D)."""
        scored = [self.score_tokens(part, plan) for part in self._rows_of_experts(ends)]
        scores, lengths = (torch.cat(each).view(ends.shape[2], -1).T for each in zip(*scored, strict=True))
        return scores, lengths
