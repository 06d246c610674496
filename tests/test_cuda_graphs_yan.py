"""What decides whether a recorded generation still belongs to a model; the recording itself needs a GPU."""

import copy
import pickle
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from modeling_yan import cuda_graphs_yan
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


class FrozenResult:
    """Stands for a CUDA graph: it gives what the function gave when it was recorded, whatever has changed since."""

    def __init__(self, function, tensors, pool, stream):
        self.result, self.replays = function(*tensors), 0

    def __call__(self, *tensors):
        self.replays += 1
        return self.result


@pytest.fixture
def recordings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for name in ("graph_pool_handle", "Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(cuda_graphs_yan, "Recording", FrozenResult)
    return CudaGraphCache()


def norm_of_head(model):
    return lambda states: float(model.lm_head.weight.norm() * states.sum())


def test_a_model_is_compared_while_its_recording_is_replayed(model, recordings, monkeypatch):
    function, tensors, replays = norm_of_head(model), (torch.ones(2),), []
    expected = recordings.call(model, function, tensors, "about")
    (recording,) = recordings.calls.values()
    compare = recordings.parts.matches
    monkeypatch.setattr(recordings.parts, "matches", lambda: replays.append(recording.replays) or compare())
    assert recordings.call(model, function, tensors, "about") == expected
    assert replays == [2]  # the second call's replay came before


def test_results_of_a_model_that_has_changed_are_thrown_away(model, recordings):
    function, tensors = norm_of_head(model), (torch.ones(2),)
    recordings.call(model, function, tensors, "about")
    (stale,) = recordings.calls.values()
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert recordings.call(model, function, tensors, "about") == 0
    assert stale not in recordings.calls.values()
    assert recordings.call(model, function, (torch.ones(3),), "about") == 0
    assert len(recordings.calls) == 2


def test_a_model_that_may_change_unseen_runs_as_it_is(model, recordings):
    recordings.call(model, norm_of_head(model), (torch.ones(2),), "about")
    layer = model.decoder.layers[0].feed_forward
    layer.forward = layer.forward
    assert recordings.call(model, lambda states: "as it is", (torch.ones(2),), "about") == "as it is"
    assert not recordings.calls


def test_the_memory_that_a_recording_reads_is_kept_and_goes_with_the_model(model):
    parts = ModelFingerprint(model)
    weight, address = model.lm_head.weight, model.lm_head.weight.data_ptr()
    weight.data = torch.zeros_like(weight)
    assert any(storage.data_ptr() == address for storage in parts.storages)
    model._cuda_graphs = CudaGraphCache()
    model.to(torch.bfloat16)
    assert model._cuda_graphs is None
