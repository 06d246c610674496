"""Attention against torch's own, positions under padding, and blocks that start as plain pre-norm blocks."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask

from modeling_yan import YanModel, layers_yan
from modeling_yan.layers_yan import YanAttention, YanShortConvolution, YanTimeEmbedding, count_positions, modulate

PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.fixture
def make_attention(make_config):
    """Function from the name of an implementation to the same random attention layer."""

    def make(implementation="eager"):
        torch.manual_seed(0)
        config = make_config()
        config._attn_implementation = implementation
        return YanAttention(config).eval()

    return make


def attend(attention, queries, padding, source=None):
    """Output and weights of `queries` (B, L, D) attending to themselves or to `source` (B, S, D) without padding."""
    mask = create_bidirectional_mask(attention.config, queries, padding, encoder_hidden_states=source)
    key_values = None if source is None else (attention.k_proj(source), attention.v_proj(source))
    return attention(queries, mask, key_values)


def as_torch_attention(attention):
    """torch's attention layer with the same weights."""
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    layer.in_proj_weight.data = torch.cat([projection.weight.data for projection in projections])
    layer.in_proj_bias.data = torch.cat([projection.bias.data for projection in projections])
    layer.out_proj.load_state_dict(attention.o_proj.state_dict())
    return layer


@pytest.mark.parametrize("variant", ["attention"])
class TestAttention:
    @pytest.mark.parametrize("padding", [None, PADDING])
    @pytest.mark.parametrize("is_cross", [False, True])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_it_equals_torchs_multi_head_attention(self, make_attention, implementation, is_cross, padding):
        attention = make_attention(implementation)
        source = torch.randn(3, 6, 32)
        queries = torch.randn(3, 4, 32) if is_cross else source
        output, weights = attend(attention, queries, padding, source if is_cross else None)
        key_padding_mask = None if padding is None else padding == 0
        expected, expected_weights = as_torch_attention(attention)(
            queries, source, source, key_padding_mask=key_padding_mask, average_attn_weights=False
        )
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
        if implementation == "eager":
            torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_every_token_sees_the_ones_after_it(self, make_attention, implementation):
        attention, states = make_attention(implementation), torch.randn(1, 6, 32)
        changed = states.clone()
        changed[0, -1] += 1
        before, after = attend(attention, states, None)[0], attend(attention, changed, None)[0]
        assert ((after - before).abs().amax(-1) > 1e-4).all()

    def test_dropout_acts_in_training_only(self, make_attention):
        attention, states = make_attention(), torch.randn(1, 6, 32)
        attention.attention_dropout = 0.5
        first, second = (attend(attention, states, None)[0] for _ in range(2))
        assert torch.equal(first, second)
        attention.train()
        first, second = (attend(attention, states, None)[0] for _ in range(2))
        assert not torch.equal(first, second)

    def test_half_of_the_heads_begin_with_what_is_alike_and_half_with_everything(self, make_model):
        attention = make_model(YanModel).layers[0].mixer.attention
        attention.config._attn_implementation = "eager"
        _, weights = attend(attention, torch.randn(20, 10, 32), None)
        on_itself = weights.diagonal(dim1=2, dim2=3).mean((0, 2))
        assert (on_itself[:2] > 0.5).all()
        assert (on_itself[2:] < 0.2).all()


@pytest.mark.parametrize("variant", ["attention"])
def test_eager_and_sdpa_give_the_same_model(make_model):
    model = make_model()
    ids = torch.randint(4, 64, (3, 6))
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(model(ids, PADDING, labels=ids[:, :5]))
    for name in ("loss", "logits", "nll_loss"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-4, atol=1e-5)


def test_another_attention_is_set_without_a_warning(make_model, caplog):
    model = make_model()
    logging.getLogger("transformers").addHandler(caplog.handler)
    model.set_attn_implementation("eager")
    model.set_attn_implementation({"": "sdpa"})
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert model.config._attn_implementation == "sdpa"
    assert caplog.messages == []
    with pytest.raises(ValueError, match="fast"):
        model.set_attn_implementation("fast")
    assert model.config.objective._attn_implementation != "fast"


def test_positions_count_the_valid_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    expected = [[0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 2], [0, 0, 0, 0]]
    states = torch.zeros(5, 4, 8)
    assert count_positions(states, mask).tolist() == expected
    assert count_positions(states, mask.bool()).tolist() == expected
    assert count_positions(states).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("variant", ["attention"])
class TestTimeEmbedding:
    def test_it_tells_the_times_of_three_steps_apart(self, make_config):
        embedding = YanTimeEmbedding(make_config())(torch.tensor([0, 1 / 3, 2 / 3, 1]))
        assert embedding.shape == (4, 32)
        distances = torch.cdist(embedding, embedding) + 1e9 * torch.eye(4)
        assert distances.min() > 0.2 * embedding.norm(dim=-1).mean()

    def test_its_features_are_cosines_and_sines_of_falling_frequencies(self, make_config):
        layer, features = YanTimeEmbedding(make_config()), []
        layer.proj.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        layer(torch.tensor([0.0, 0.001]))
        cosines, sines = features[0].chunk(2, dim=-1)
        torch.testing.assert_close(cosines[0], torch.ones(16))
        torch.testing.assert_close(sines[0], torch.zeros(16))
        frequencies = 10000.0 ** (-torch.arange(16) / 16)
        torch.testing.assert_close(torch.atan2(sines[1], cosines[1]), frequencies)

    def test_its_angles_stay_exact_in_half_precision(self, make_config):
        layer, times = YanTimeEmbedding(make_config()), torch.linspace(0, 1, 50)
        exact = layer(times)
        torch.testing.assert_close(layer.to(torch.bfloat16)(times).float(), exact, atol=0.03, rtol=0)


class TestShortConvolution:
    def test_a_token_gets_its_neighbours_on_both_sides_and_itself(self):
        layer, states = YanShortConvolution(4, 3), torch.randn(2, 6, 4)
        before, here, after = layer.weight[:, 0].T
        padded = F.pad(states, (0, 0, 1, 1))
        expected = states + padded[:, :-2] * before + states * here + padded[:, 2:] * after
        torch.testing.assert_close(layer(states), expected)

    def test_padding_counts_as_nothing(self):
        layer, states = YanShortConvolution(4, 5), torch.randn(3, 6, 4)
        output = layer(states, PADDING)
        torch.testing.assert_close(output[1, 2:], layer(states[1:2, 2:])[0])
        torch.testing.assert_close(output[2, :3], layer(states[2:3, :3])[0])

    @pytest.mark.parametrize("variant", ["attention"])
    def test_the_model_uses_it_where_it_is_asked_for(self, make_model):
        ids = torch.randint(4, 64, (1, 9))
        model = make_model(YanModel, attention_conv_kernel=5)
        taps = [layer.mixer.convolution.weight for layer in model.layers]
        assert all(0.15 < tap.std() < 0.4 for tap in taps)  # uniform of variance 1 / 5 / 3, not `initializer_range`
        with_it = model(ids).last_hidden_state
        for tap in taps:
            nn.init.zeros_(tap)
        without_it = make_model(YanModel)
        model.load_state_dict(without_it.state_dict(), strict=False)
        torch.testing.assert_close(model(ids).last_hidden_state, without_it(ids).last_hidden_state)
        assert not torch.allclose(with_it, model(ids).last_hidden_state, atol=1e-2)


def test_modulation_scales_and_shifts_a_norm():
    norm, states = nn.LayerNorm(8, elementwise_affine=False), torch.randn(2, 3, 8)
    shift, scale = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    expected = F.layer_norm(states, (8,)) * (1 + scale) + shift
    torch.testing.assert_close(modulate(norm, states, shift, scale), expected)


def plain_block(layer, states, positions, key=None, value=None):
    """The layer without any time: pre-norm self-mixer, cross-attention where there is one, feed-forward."""

    def norm(states):
        return F.layer_norm(states, (32,), eps=layer.norm.eps)

    states = states + layer.mixer(norm(states))[0]
    if layer.cross_attention is not None:
        states = states + layer.cross_attention(norm(states) + positions, None, (key, value))[0]
    return states + layer.feed_forward(norm(states))


def test_every_flow_layer_starts_as_a_plain_pre_norm_block(make_model):
    flow = make_model(cross_attention_layers=[1]).flow
    modulation = flow.modulation(torch.tensor([0.0, 0.4]))
    states, latents = torch.randn(2, 8, 32), torch.randn(2, 5, 32)
    positions = torch.randn(8, 32)
    key_values = flow.condition(latents, torch.randn(5, 32), canvas_length=8).key_values
    assert [keys is None for keys, _ in key_values] == [True, False]
    for layer, shifts_and_scales, key_value in zip(flow.layers, modulation.layers, key_values):
        output = layer(states, shifts_and_scales, positions, *key_value)
        torch.testing.assert_close(output, plain_block(layer, states, positions, *key_value))


def test_cross_attention_starts_as_a_copy_of_the_prompt_place_by_place(make_model):
    model = make_model(hidden_size=128, intermediate_size=128, num_attention_heads=4)
    latents = torch.randn(2, 20, 128)
    condition = model.condition(latents, canvas_length=8)
    positions = model.flow.position_norm(model.model.embeddings.position_embeddings.weight[:8])
    noise = F.layer_norm(torch.randn(2, 8, 128) + positions, (128,))
    attended, _ = model.flow.layers[0].cross_attention(noise + positions, None, condition.key_values[0])
    similarity = torch.einsum("bld,bsd->bls", attended, latents) / 128
    nearest = similarity.argmax(-1)
    assert ((nearest - torch.arange(8)).abs() <= 2).float().mean() > 0.9
    assert similarity[:, torch.arange(8), torch.arange(8)].mean() > 5 * similarity.mean()


def test_once_trained_every_norm_of_a_flow_layer_hears_of_the_time(make_model):
    flow = make_model().flow
    condition = flow.condition(torch.randn(1, 5, 32), torch.randn(5, 32), canvas_length=8)
    layer, (key, value), positions = flow.layers[0], condition.key_values[0], torch.randn(8, 32)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    states = torch.randn(1, 8, 32)
    plain = layer(states, torch.zeros(1, 6, 32), positions, key, value)
    for index in range(6):
        modulation = torch.zeros(1, 6, 32)
        modulation[:, index] = 0.5
        changed = layer(states, modulation, positions, key, value)
        assert (changed - plain).abs().max() > 0.01, f"modulation {index} has no effect"


def test_hidden_dropout_acts_in_training_only(make_model):
    model = make_model(hidden_dropout=0.5, decoder_dropout=0.0)
    layer = model.model.layers[0]
    states = torch.randn(1, 6, 32)
    assert torch.equal(layer(states), layer(states))
    layer.train()
    assert not torch.equal(layer(states), layer(states))


@pytest.mark.parametrize(
    ("change", "is_fused"),
    [
        (lambda layer: None, True),
        (lambda layer: layer.half(), True),
        (lambda layer: layer.float(), False),
        (lambda layer: layer.register_forward_hook(lambda *args: None), False),
        (lambda layer: setattr(layer, "forward", lambda x: x), False),
        (lambda layer: (delattr(layer, "weight"), setattr(layer, "__class__", nn.Identity)), False),  # as if packed
        (lambda layer: torch.set_grad_enabled(True), False),
    ],
    ids=["bfloat16", "float16", "float32", "hook", "patched", "other", "training"],
)
def test_a_product_computes_its_gelu_in_compiled_16_bit_layers_on_a_gpu(monkeypatch, change, is_fused):
    layer = nn.Linear(4, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        change(layer)
        states = SimpleNamespace(is_cuda=True, dtype=getattr(layer, "weight", torch.empty(0)).dtype)
        for compiles in (False, True):
            monkeypatch.setattr(layers_yan, "use_custom_ops", lambda compiles=compiles: compiles)
            assert layers_yan.fuses_gelu(layer, states) == (is_fused and compiles)
        states.is_cuda = False
        assert not layers_yan.fuses_gelu(layer, states)
