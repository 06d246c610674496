"""A YAN that wastes what the fast one saves, one waste at a time or all of them; its tokens are the same."""

import torch

from modeling_yan.flow_matching_yan import solve_flow, solver_times

WASTES = {
    "gate": "an extra trunk pass at t = 0 to choose the experts",
    "experts": "all heads for every token",
    "keys": "keys and values of the prompt anew in every step",
    "modulations": "shifts and scales of the time anew in every step",
}


class NaiveVelocity:
    """The velocity field of one solve, in the manner of `YanVelocity`, with the wastes that are named."""

    def __init__(self, model, latents, mask, length, num_steps, wastes):
        self.model, self.flow, self.wastes = model, model.flow, wastes
        self.latents, self.mask, self.length = latents, mask, length
        self.positions = model.model.embeddings.position_embeddings.weight[:length]
        self.condition = model.condition(latents, mask, length)
        self.times = solver_times(num_steps)
        self.modulations = self.flow.modulation(torch.tensor(self.times, device=latents.device))
        self.experts = self.groups = None

    def __call__(self, x, time):
        if self.experts is None and "gate" in self.wastes:
            self._choose(self._states(x, time), time)
        states = self._states(x, time)
        if self.experts is None:
            self._choose(states, time)
        if "experts" not in self.wastes:
            return self.flow.experts.combine(states, self.groups) - x
        index = self.experts[..., None, None].expand(*self.experts.shape, 1, x.shape[-1])
        return self.flow.velocities(states, x).gather(2, index).squeeze(2)

    def _choose(self, states, time):
        self.experts = self.flow.gate_log_probs(states, self._modulation(time), self.condition).argmax(-1)
        self.groups = self.flow.experts.dispatch(self.experts)

    def _states(self, x, time):
        condition = self.condition
        if "keys" in self.wastes:
            condition = self.model.condition(self.latents, self.mask, self.length)
        return self.flow.trunk(x, self.positions, self._modulation(time), condition)

    def _modulation(self, time):
        if "modulations" in self.wastes:
            return self.flow.modulation(torch.tensor([time], device=self.latents.device))
        index = self.times.index(time)
        return self.modulations[index : index + 1]


@torch.no_grad()
def naive_generate(model, input_ids, length, num_steps, wastes=tuple(WASTES)):
    """One canvas of `length` new tokens (B, length) for prompts without padding, deterministic as `generate` is."""
    mask = torch.ones_like(input_ids)
    latents = model.model(input_ids, mask, return_dict=True).last_hidden_state
    velocity = NaiveVelocity(model, latents, mask, length, num_steps, wastes)
    x_0 = model.start_noise((1, length), latents).expand(len(latents), -1, -1)
    x_1 = solve_flow(velocity, x_0, num_steps)
    logits = model.decode(x_1)
    logits[..., model.config.eos_token_id] = -torch.inf
    return model.most_likely(logits, x_1)
