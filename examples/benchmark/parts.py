"""Each part of YAN's generation as a call of its own, to be timed."""

from collections.abc import Callable

import torch

from modeling_yan.flow_matching_yan import solver_times


def part_calls(model, prompt: torch.LongTensor, length: int, num_steps: int) -> dict[str, Callable[[], object]]:
    """Calls that do what one generation of `length` tokens for prompts (B, S) does in each of its parts.

    The names and what belongs to them are those of `costs.part_costs`.
    """
    flow = model.flow
    positions = model.model.embeddings.position_embeddings.weight[:length]
    times = torch.tensor(solver_times(num_steps), device=prompt.device)

    def encoder():
        return model.model(prompt, return_dict=True).last_hidden_state

    latents = encoder()
    x = model.start_noise((1, length), latents).expand(len(prompt), -1, -1)

    def prepare():
        return flow.modulation(times), model.condition(latents, canvas_length=length)

    def trunk():
        modulation, condition = prepare()
        return [flow.trunk(x, positions, modulation[step : step + 1], condition) for step in range(num_steps)]

    modulation, condition = prepare()
    states = flow.trunk(x, positions, modulation[:1], condition)

    def experts():
        chosen = flow.gate_log_probs(states, modulation[:1], condition).argmax(-1)
        groups = flow.experts.dispatch(chosen)
        return [flow.experts.combine(states, groups) for _ in range(num_steps)]

    def decoder():
        return model.most_likely(model.decode(x), x)

    return {"encoder": encoder, "trunk": trunk, "experts": experts, "decoder": decoder}
