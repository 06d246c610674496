"""What decides whether a recorded generation still belongs to a model; the recording itself needs a GPU."""

import copy
import pickle

import pytest
import torch
from torch import nn

from modeling_yan.cuda_graphs_yan import CudaGraphCache, ModelFingerprint


@pytest.fixture
def model(make_model):
    return make_model(num_encoder_layers=1, num_flow_layers=1)


def update_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)


def replace_weight(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


def move_weight(model):
    model.flow.norm.weight.data = model.flow.norm.weight.data.clone()


def wrap_module(model):
    model.decoder.layers[0].feed_forward = nn.Sequential(model.decoder.layers[0].feed_forward)


def add_module(model):
    model.extra = nn.Identity()


def add_hook(model):
    model.model.norm.register_forward_hook(lambda module, arguments, output: output)


def add_buffer(model):
    model.flow.register_buffer("shift", torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (lambda model: model.zero_grad(), True),
        (update_in_place, True),
        (lambda model: model.flow.train(), False),
        (replace_weight, False),
        (move_weight, False),
        (wrap_module, False),
        (add_module, False),
        (add_hook, False),
        (add_buffer, False),
    ],
)
def test_a_changed_model_is_told_from_an_updated_one(model, change, is_same):
    parts = ModelFingerprint(model)
    assert parts.matches()
    change(model)
    assert parts.matches() == is_same


def test_a_model_that_may_change_unseen_is_not_recorded(model):
    assert ModelFingerprint(model).can_be_recorded
    parts, layer = ModelFingerprint(model), model.decoder.layers[0].feed_forward
    layer.forward = layer.forward  # as accelerate does, which calls it between moving weights
    assert not parts.matches()
    assert not ModelFingerprint(model).can_be_recorded


def test_a_model_with_an_adapter_is_not_recorded(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).base_model.model
    assert not ModelFingerprint(adapted).can_be_recorded


def test_a_model_on_two_devices_is_not_recorded(model):
    model.lm_head.to("meta")
    assert not ModelFingerprint(model).can_be_recorded


def test_a_model_with_quantized_weights_is_not_recorded(model):
    class Quantized(torch.Tensor):
        """As torchao's, which have no address of their own."""

        def data_ptr(self):
            raise RuntimeError("no address")

    weight = model.lm_head.weight.detach().as_subclass(Quantized)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    assert not ModelFingerprint(model).can_be_recorded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_begins_without_recordings(model, copied):
    model._cuda_graphs = CudaGraphCache()
    model._cuda_graphs.calls["a key"] = lambda: None
    assert not copied(model)._cuda_graphs.calls
    assert model._cuda_graphs.calls


def test_the_memory_that_a_recording_reads_is_kept_and_goes_with_the_model(model):
    parts = ModelFingerprint(model)
    weight, address = model.lm_head.weight, model.lm_head.weight.data_ptr()
    weight.data = torch.zeros_like(weight)
    assert any(storage.data_ptr() == address for storage in parts.storages)
    model._cuda_graphs = CudaGraphCache()
    model.to(torch.bfloat16)
    assert model._cuda_graphs is None
