"""The least work that a generation is: FLOPs, and bytes of weights and activations, of each part of YAN.

Counted from the sizes in the config: products of matrices, attention, convolutions and scans. Norms, activation
functions, look-ups and the start noise are left out, so the time that they take counts as distance from the floor.
"""

from dataclasses import dataclass

SCAN_FLOPS = (
    7  # per inner channel and state: dt A, its exponential, B (dt x), a multiply-add each for state and output
)
SCAN_ITEMSIZE = 4  # the scan is float32 always


@dataclass(frozen=True)
class Cost:
    """FLOPs, and bytes that have to be read or written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other):
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times):
        return Cost(times * self.flops, times * self.bytes)

    def floor_s(self, bandwidth: float, peak: float) -> float:
        """The least seconds on a machine that moves `bandwidth` bytes/s and computes `peak` FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / peak)


def linear(tokens: int, inputs: int, outputs: int, itemsize: int, num_weights: int = 1) -> Cost:
    """A linear layer on that many tokens; `num_weights` of them where the tokens are divided among several."""
    elements = num_weights * (inputs + 1) * outputs + tokens * (inputs + outputs)
    return Cost(2 * tokens * inputs * outputs, itemsize * elements)


def feed_forward(config, tokens, itemsize):
    return feed_forwards(config.hidden_size, config.intermediate_size, tokens, itemsize)


def feed_forwards(width, inner, tokens, itemsize, num_weights=1):
    """One of them or, where the tokens are divided among several, all."""
    up = linear(tokens, width, inner, itemsize, num_weights)
    return up + linear(tokens, inner, width, itemsize, num_weights)


def attention(config, batch, length, source_length, itemsize):
    """Scores and their sum over values, where neither is written to memory."""
    width = config.hidden_size
    flops = 4 * batch * length * source_length * width
    return Cost(flops, itemsize * 2 * batch * (length + source_length) * width)


def self_attention(config, batch, length, itemsize):
    projection = linear(batch * length, config.hidden_size, config.hidden_size, itemsize)
    return 4 * projection + attention(config, batch, length, length, itemsize)


def cross_attention(config, batch, length, source_length, itemsize):
    """Without keys and values, which are computed once."""
    projection = linear(batch * length, config.hidden_size, config.hidden_size, itemsize)
    return 2 * projection + attention(config, batch, length, source_length, itemsize)


def bidirectional_mamba(config, batch, length, itemsize):
    tokens, width, inner = batch * length, config.hidden_size, config.mamba_intermediate_size
    rank, states = config.time_step_rank, config.state_size
    one_way = linear(tokens, width, 2 * inner, itemsize) + linear(tokens, inner, width, itemsize)
    one_way += linear(tokens, inner, rank + 2 * states, itemsize) + linear(tokens, rank, inner, itemsize)
    one_way += Cost(2 * tokens * inner * config.conv_kernel, 2 * itemsize * tokens * inner)
    one_way += Cost(SCAN_FLOPS * tokens * inner * states, SCAN_ITEMSIZE * tokens * (3 * inner + 2 * states))
    return 2 * one_way + linear(tokens, 2 * width, width, itemsize)


MIXERS = {"attention": self_attention, "mamba": bidirectional_mamba}


def part_costs(
    config, batch: int, prompt_length: int, length: int, num_steps: int, itemsize: int = 4
) -> dict[str, Cost]:
    """The cost of each part of a generation of one canvas.

    Args:
        config: A `YanConfig`. prompt_length, length: In tokens a row. itemsize: Bytes of a weight or activation.

    Returns:
        `encoder`: the prompt's. `trunk`: keys and values of the prompt once, then one pass a step. `experts`: the gate
        once, then one head for every token and step. `decoder`: with the head over the vocabulary.
    """
    width, source_tokens, tokens = config.hidden_size, batch * prompt_length, batch * length
    encoder_layer = MIXERS[config.encoder_mixer](config, batch, prompt_length, itemsize)
    encoder_layer += feed_forward(config, source_tokens, itemsize)
    num_cross = len(config.flow_layers_with_cross_attention)
    layer = MIXERS[config.flow_mixer](config, batch, length, itemsize) + feed_forward(config, tokens, itemsize)
    one_pass = config.num_flow_layers * layer
    one_pass += num_cross * cross_attention(config, batch, length, prompt_length, itemsize)
    num_modulations = 4 * config.num_flow_layers + 2 * num_cross
    once = 2 * num_cross * linear(source_tokens, width, width, itemsize)
    once += linear(num_steps, width, num_modulations * width, itemsize)
    once += linear(num_steps, 2 * (width // 2), width, itemsize)
    gate = linear(tokens, 3 * width, width, itemsize) + linear(tokens, width, config.num_experts, itemsize)
    num_heads = 1 if config.share_expert_head else min(config.num_experts, tokens)
    heads = feed_forwards(width, config.expert_intermediate_size, tokens, itemsize, num_heads)
    decoder = config.num_decoder_layers * feed_forward(config, tokens, itemsize)
    return {
        "encoder": config.num_encoder_layers * encoder_layer,
        "trunk": once + num_steps * one_pass,
        "experts": gate + num_steps * heads,
        "decoder": decoder + linear(tokens, width, config.vocab_size, itemsize),
    }
