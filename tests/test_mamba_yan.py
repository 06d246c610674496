"""The Mamba mixer against transformers' own, its scan against the plain recurrence, and its cost against length."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from modeling_yan import mamba_yan
from modeling_yan.mamba_yan import YanBidirectionalMamba, YanMamba, chunk_length, doubling_scan, selective_scan

PADDINGS = {"left": slice(4, None), "right": slice(None, -4)}


@pytest.fixture
def variant():
    return "mamba"


def randomised(module, std=0.3):
    """The module with every parameter random, biases too, except for the decay rates."""
    for name, parameter in module.named_parameters():
        if "A_log" not in name:
            nn.init.normal_(parameter, std=std)
        else:
            nn.init.uniform_(parameter, -1, 1)
    return module


def scan_arguments(length, scans=2, batch=3, inner=4, state=3):
    """x, dt, a_matrix, b, c as leaves that take a gradient."""
    x, dt = torch.randn(scans, batch, length, inner), torch.rand(scans, batch, length, inner) + 0.05
    a_matrix = -torch.rand(scans, inner, state) - 0.1
    b, c = torch.randn(scans, batch, length, state), torch.randn(scans, batch, length, state)
    return [tensor.requires_grad_() for tensor in (x, dt, a_matrix, b, c)]


def naive_scan(x, dt, a_matrix, b, c):
    """The recurrence step by step, in float64, with autograd's own backward."""
    x, dt, a_matrix, b, c = (tensor.double() for tensor in (x, dt, a_matrix, b, c))
    state, outputs = 0, []
    for step in range(x.shape[2]):
        decay = torch.exp(dt[:, :, step, :, None] * a_matrix[:, None])
        state = decay * state + b[:, :, step, None, :] * (dt[:, :, step] * x[:, :, step])[..., None]
        outputs.append((state * c[:, :, step, None, :]).sum(-1))
    return torch.stack(outputs, dim=2)


class OneDirection(YanMamba):
    """A causal mixer, with the scan that both directions otherwise share."""

    def forward(self, hidden_states):
        inputs, skip, gate = super().forward(hidden_states)
        y = selective_scan(*(tensor.unsqueeze(0) for tensor in inputs))[0]
        return self.output(y, skip, gate)


def output_and_gradients(function, inputs, weight):
    output = function(*inputs)
    return [output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)]


# --- the scan


@pytest.mark.parametrize("chunk", [1, 16, None])
@pytest.mark.parametrize("length", [1, 7, 16, 37])
def test_the_scan_and_its_gradients_equal_the_plain_recurrence(length, chunk, monkeypatch):
    arguments = scan_arguments(length)
    if chunk is not None:  # in elements of one chunk's states; 8 steps are the least that a chunk has
        monkeypatch.setattr(mamba_yan, "SCAN_CHUNK_ELEMENTS", chunk * 2 * 3 * 4 * 3)
        assert chunk_length(torch.empty(length, 2, 3, 4), 3) == min(length, max(8, chunk))
    weight = torch.randn(2, 3, length, 4)
    actual = output_and_gradients(selective_scan, arguments, weight)
    expected = output_and_gradients(naive_scan, arguments, weight)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [2, 7, 16, 37])
def test_the_scan_by_doubling_and_its_gradients_equal_the_plain_recurrence(length):
    arguments, weight = scan_arguments(length), torch.randn(2, 3, length, 4)

    def by_doubling(x, dt, a_matrix, b, c):
        x, dt, b, c = (tensor.double().permute(2, 0, 1, 3) for tensor in (x, dt, b, c))
        return doubling_scan(x, dt, a_matrix.double().transpose(1, 2), b, c).permute(1, 2, 0, 3)

    actual = output_and_gradients(by_doubling, arguments, weight)
    for a, b in zip(actual, output_and_gradients(naive_scan, arguments, weight)):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def test_two_scans_together_equal_two_scans_alone():
    arguments, weight = scan_arguments(13), torch.randn(2, 3, 13, 4)
    together = output_and_gradients(selective_scan, arguments, weight)
    for index in range(2):
        part = [tensor[index : index + 1].detach().requires_grad_() for tensor in arguments]
        alone = output_and_gradients(selective_scan, part, weight[index : index + 1])
        for a, b in zip(together, alone):
            torch.testing.assert_close(a[index : index + 1], b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_is_kept_in_float32_whatever_the_inputs(dtype):
    arguments = [tensor.detach().to(dtype) for tensor in scan_arguments(37)]
    output = selective_scan(*arguments)
    assert output.dtype == dtype
    exact = naive_scan(*arguments)
    torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_the_scan_is_in_float32_under_autocast_too():
    arguments, weight = scan_arguments(37), torch.randn(2, 3, 37, 4)
    expected = output_and_gradients(selective_scan, arguments, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = selective_scan(*arguments)
    actual = [output, *torch.autograd.grad((output * weight).sum(), arguments)]
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_scan_survives_decays_that_underflow():
    x, dt, a_matrix, b, c = scan_arguments(20)
    dt = (1000 * dt).detach().requires_grad_()
    for tensor in output_and_gradients(selective_scan, [x, dt, a_matrix, b, c], torch.ones(2, 3, 20, 4)):
        assert tensor.isfinite().all()


# --- one direction


def test_it_equals_transformers_mixer_in_output_and_gradients(make_config):
    config = make_config()
    sizes = ("hidden_size", "state_size", "conv_kernel", "expand", "time_step_rank")
    theirs = MambaMixer(MambaConfig(num_hidden_layers=1, **{name: getattr(config, name) for name in sizes}), 0)
    ours = randomised(OneDirection(config))
    theirs.load_state_dict(ours.state_dict())
    states, weight = torch.randn(2, 11, 32, requires_grad=True), torch.randn(2, 11, 32)

    def results(mixer):
        output = mixer(states)
        inputs = {"states": states, **dict(mixer.named_parameters())}
        gradients = torch.autograd.grad((output * weight).sum(), list(inputs.values()))
        return {"output": output, **dict(zip(inputs, gradients))}

    expected = results(theirs)
    for name, tensor in results(ours).items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_one_direction_is_causal(make_config):
    mamba, states = randomised(OneDirection(make_config())), torch.randn(1, 10, 32)
    changed = states.clone()
    changed[0, 6] += 1
    difference = (mamba(changed) - mamba(states)).abs().amax(-1)[0]
    assert (difference[:6] == 0).all()
    assert (difference[6:] > 1e-5).all()


def test_a_fresh_model_has_the_papers_initialisation(make_model):
    model = make_model()
    mambas = [module for module in model.modules() if isinstance(module, YanMamba)]
    assert len(mambas) == 2 * 4
    for mamba in mambas:
        torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 5).expand(64, 4))
        assert (mamba.D == 1).all()
        steps = nn.functional.softplus(mamba.dt_proj.bias)
        assert steps.min() >= 0.001 * (1 - 1e-4)
        assert steps.max() <= 0.1 * (1 + 1e-4)
        assert steps.max() > 5 * steps.min()  # spread over the range, not all alike


# --- both directions


@pytest.mark.parametrize("side", PADDINGS)
def test_padding_changes_nothing_and_learns_nothing(make_config, side):
    mamba = randomised(YanBidirectionalMamba(make_config()))
    valid = PADDINGS[side]
    states, mask = torch.randn(2, 11, 32, requires_grad=True), torch.zeros(2, 11)
    mask[:, valid] = 1
    weight = torch.randn(2, 7, 32)

    def results(output):
        return [output, *torch.autograd.grad((output * weight).sum(), [states, *mamba.parameters()])]

    for padded, alone in zip(results(mamba(states, mask)[:, valid]), results(mamba(states[:, valid]))):
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mamba(states)[:, valid], mamba(states[:, valid]))  # the mask is what does it


def test_rows_of_different_padding_can_share_a_batch(make_config):
    mamba, states = randomised(YanBidirectionalMamba(make_config())), torch.randn(3, 11, 32)
    mask = torch.ones(3, 11)
    mask[0, :4] = mask[1, 7:] = 0
    output = mamba(states, mask)
    for row in range(3):
        valid = mask[row].bool()
        torch.testing.assert_close(output[row : row + 1, valid], mamba(states[row : row + 1, valid]))


def test_reversing_the_sequence_and_swapping_the_directions_reverses_the_output(make_config):
    mamba = randomised(YanBidirectionalMamba(make_config()))
    swapped = YanBidirectionalMamba(make_config())
    swapped.forward_mamba.load_state_dict(mamba.backward_mamba.state_dict())
    swapped.backward_mamba.load_state_dict(mamba.forward_mamba.state_dict())
    first, second = mamba.out_proj.weight.chunk(2, dim=1)
    swapped.out_proj.load_state_dict({"weight": torch.cat([second, first], 1), "bias": mamba.out_proj.bias})
    states = torch.randn(2, 9, 32)
    output = mamba(states)
    torch.testing.assert_close(swapped(states.flip(1)).flip(1), output, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mamba(states.flip(1)).flip(1), output)


def test_both_directions_reach_every_token(make_config):
    mamba, states = randomised(YanBidirectionalMamba(make_config())), torch.randn(1, 9, 32, requires_grad=True)
    for token in (0, 4, 8):
        reach = torch.autograd.grad(mamba(states)[0, token].square().sum(), states)[0].abs().sum(-1)
        assert (reach > 0).all()


# --- cost


class CountWork(TorchDispatchMode):
    """Counts the operations that run, and the elements that they write."""

    def __init__(self):
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        self.elements += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def work_of(mamba, length):
    """Operations, elements written, and elements kept for the backward pass, of one forward and backward pass."""
    states, kept = torch.randn(2, length, 32), []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with CountWork() as count, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mamba(states).sum().backward()
    return count.operations, count.elements, sum(kept)


@pytest.mark.parametrize("chunk_elements", [1, 2**20])
def test_work_and_memory_of_a_training_pass_are_linear_in_length(make_config, monkeypatch, chunk_elements):
    monkeypatch.setattr(mamba_yan, "SCAN_CHUNK_ELEMENTS", chunk_elements)
    mamba = randomised(YanBidirectionalMamba(make_config()))
    for name, short, long in zip(("operations", "elements", "memory"), work_of(mamba, 64), work_of(mamba, 128)):
        assert 0 < short <= long <= 2.2 * short, name


def test_the_measure_of_work_notices_a_quadratic_backward(make_config):
    config = make_config()
    sizes = {name: getattr(config, name) for name in ("hidden_size", "state_size", "time_step_rank")}
    theirs = MambaMixer(MambaConfig(num_hidden_layers=1, **sizes), 0).train()
    assert work_of(theirs, 128)[1] > 2.8 * work_of(theirs, 64)[1]
