"""The count of operations, against what PyTorch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_yan import YanForAutoencoding, YanForFlowGeneration
from modeling_yan.baselines import INPUT_ADAPTERS, make_baseline
from modeling_yan.training.throughput import baseline_flops, measure_peak, training_flops

# wide enough that what grows with the width outweighs the rest
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512, "canvas_length": 16, "num_experts": 2}


# PyTorch counts the backward pass of a depthwise convolution as if it were a full one
CONVOLUTIONS = {torch.ops.aten.convolution_backward: lambda *args, **kwargs: 0}


def counted(model, **batch) -> int:
    if isinstance(model, YanForFlowGeneration):
        model.set_experts_implementation("eager")  # of grouped products PyTorch counts nothing
    counter = FlopCounterMode(display=False, custom_mapping=CONVOLUTIONS)
    with counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_flow(make_model, variant, freeze, steps):
    frozen = dict.fromkeys(["freeze_encoder", "freeze_decoder", "freeze_embeddings"], freeze)
    model = make_model(YanForFlowGeneration, **SIZES, **frozen).train()
    ids, labels = torch.randint(4, 500, (4, 32)), torch.randint(4, 500, (4, 16))
    expected = counted(model, input_ids=ids, labels=labels, num_flow_steps=steps)
    # frozen weights still pass gradients on; the modulation, once a batch, and the scan are not counted
    assert training_flops(model, 4, 32, 16, steps) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [{"mse_weight": 0.0}, {"mse_weight": 0.0, "num_experts": 1}, {"num_answer_slots": 8, "draft_weight": 0.0}],
)
def test_likelihood_of_the_text(make_model, fields, steps):
    fields = {**SIZES, **fields, "train_expert_choice": "posterior"}
    model = make_model(YanForFlowGeneration, **fields).train()
    ids, labels = torch.randint(4, 500, (4, 32)), torch.randint(4, 500, (4, 16))
    expected = counted(model, input_ids=ids, labels=labels, num_flow_steps=steps)
    assert training_flops(model, 4, 32, 16, steps) == pytest.approx(expected, rel=0.1)


def test_one_pass(make_model):
    fields = {"num_answer_slots": 16, "train_expert_choice": "posterior"}
    model = make_model(YanForFlowGeneration, **SIZES, **fields).train()
    ids, labels = torch.randint(4, 500, (4, 32)), torch.randint(4, 500, (4, 16))
    expected = counted(model, input_ids=ids, labels=labels, num_flow_steps=0)
    assert training_flops(model, 4, 32, 16, 0) == pytest.approx(expected, rel=0.1)


def test_transitions_of_a_finished_model(make_model):
    """Of a model of which all else is frozen there is no backward pass to speak of."""
    frozen = dict.fromkeys(["freeze_encoder", "freeze_decoder", "freeze_embeddings", "freeze_flow"], True)
    model = make_model(YanForFlowGeneration, **SIZES, **frozen, crf_rank=4).train()
    ids, labels = torch.randint(4, 500, (4, 32)), torch.randint(4, 500, (4, 16))
    expected = counted(model, input_ids=ids, labels=labels, num_flow_steps=3)
    assert training_flops(model, 4, 32, 16, 3) == pytest.approx(expected, rel=0.1)


def test_autoencoder(make_model):
    model = make_model(YanForAutoencoding, **SIZES).train()
    ids = torch.randint(4, 500, (4, 32))
    expected = counted(model, input_ids=ids, labels=ids)
    assert training_flops(model, 4, 32) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", INPUT_ADAPTERS)
def test_baselines(make_config, kind):
    model = make_baseline(kind, make_config(**SIZES, attention_conv_kernel=9)).train()
    ids, labels = torch.randint(4, 500, (4, 32)), torch.randint(4, 500, (4, 16))
    inputs = INPUT_ADAPTERS[kind]({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, 0)
    shape = (48, 0) if kind.startswith("decoder") else (32, 16)
    # the scores of attention are left out
    assert baseline_flops(model, 4, *shape) == pytest.approx(counted(model, **inputs), rel=0.15)


def test_the_peak_is_that_of_a_machine():
    peak = measure_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e16
