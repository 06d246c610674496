"""The heads of the experts: every way to compute them gives one result, and heads of before are found in files."""

import contextlib
import copy
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from modeling_yan import YanForFlowGeneration, expert_heads_yan, experts_triton_yan
from modeling_yan.expert_heads_yan import EXPERTS_FUNCTIONS, every_head, sparse_heads
from modeling_yan.experts_yan import YanExperts

NAMES = [
    "auto",
    "eager",
    "all_heads",
    "batched_mm",
    "grouped_mm",
]
FIRST = "flow.experts.heads.0.up_proj.weight"


@pytest.fixture
def variant():
    return "attention"  # heads know no mixer


@pytest.fixture
def experts(make_config):
    return with_biases(YanExperts(make_config(num_experts=4, initializer_range=0.3)))


def with_biases(experts):
    for bias in experts.heads.weights()[1::2]:
        torch.nn.init.normal_(bias)
    return experts


def one_by_one(experts, states, chosen):
    """Outputs (B, L, D) of each token's own head, token by token."""
    layers = list(zip(*experts.heads.weights(), strict=True))

    def output(state, expert):
        up, up_bias, down, down_bias = layers[expert]
        return down @ F.gelu(up @ state + up_bias) + down_bias

    rows = [output(*pair) for pair in zip(states.flatten(0, 1), chosen.flatten().tolist(), strict=True)]
    return torch.stack(rows).view_as(states)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_used", [1, 3, 4])
def test_every_way_gives_each_token_its_own_heads_output_and_gradient(experts, name, num_used):
    states, weight = torch.randn(3, 5, 32, requires_grad=True), torch.randn(3, 5, 32)
    chosen = torch.arange(15).flip(0).view(3, 5) % num_used  # with fewer than four, some heads have no token
    experts.heads.config._experts_implementation = name
    inputs = [states, *experts.parameters()]
    results = []
    for output in (experts.combine(states, experts.dispatch(chosen)), one_by_one(experts, states, chosen)):
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs, materialize_grads=True)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        again = experts.combine(states, experts.dispatch(chosen))
    torch.testing.assert_close(again, results[0][0])


def test_all_heads_are_those_of_the_tokens(experts):
    states = torch.randn(3, 5, 32)
    every = experts(states)
    assert every.shape == (3, 5, 4, 32)
    for head in range(4):
        torch.testing.assert_close(every[:, :, head], one_by_one(experts, states, torch.full((3, 5), head)))


@pytest.mark.parametrize("name", NAMES)
def test_sequences_with_one_head_each_are_computed(experts, name):
    states, chosen = torch.randn(3, 5, 32), torch.tensor([[2], [0], [3]]).expand(3, 5)  # not in one piece
    experts.heads.config._experts_implementation = name
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            actual = experts.combine(states, experts.dispatch(chosen))
        torch.testing.assert_close(actual, one_by_one(experts, states, chosen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_narrows_products_and_not_the_result(experts, name):
    states, chosen = torch.randn(3, 5, 32), torch.arange(15).view(3, 5) % 4
    experts.heads.config._experts_implementation = name
    with torch.autocast("cpu", torch.bfloat16):
        actual = experts.combine(states, experts.dispatch(chosen))
        actual.sum().backward()
    assert actual.dtype == experts.heads.up_proj.grad.dtype == torch.float32
    torch.testing.assert_close(actual, one_by_one(experts, states, chosen), rtol=0.1, atol=0.2)


def test_a_way_that_is_unknown_is_refused(tiny_model, tmp_path):
    known = "must be one of auto, eager, all_heads, batched_mm, grouped_mm, triton"
    tiny_model.save_pretrained(tmp_path)
    for name in ("fast", "sonicmoe", ["eager"]):
        with pytest.raises(ValueError, match=rf"experts_implementation=.*{known}"):
            tiny_model.set_experts_implementation(name)
    with pytest.raises(ValueError, match=rf"experts_implementation='fast': {known}"):
        YanForFlowGeneration.from_pretrained(tmp_path, experts_implementation="fast")


def test_the_way_is_chosen_where_a_model_is_loaded_and_later(tiny_model, tmp_path, monkeypatch):
    assert tiny_model.config._experts_implementation == "auto"
    tiny_model.save_pretrained(tmp_path)
    model = YanForFlowGeneration.from_pretrained(tmp_path, experts_implementation="batched_mm").eval()
    called = []
    for name in ("eager", "batched_mm"):
        function = EXPERTS_FUNCTIONS[name]
        monkeypatch.setitem(
            EXPERTS_FUNCTIONS._global_mapping, name, lambda *a, n=name, f=function: called.append(n) or f(*a)
        )
    prompts = torch.tensor([[5, 6, 7]])
    written = model.generate(prompts)
    assert set(called) == {"batched_mm"}
    model.set_experts_implementation("eager")
    assert torch.equal(model.generate(prompts), written)
    assert called[-1] == "eager"
    model.save_pretrained(tmp_path / "again")
    assert YanForFlowGeneration.from_pretrained(tmp_path / "again").config._experts_implementation == "auto"


# --- kernels


@pytest.mark.parametrize("num_used", [1, 3, 4])
def test_where_there_are_no_kernels_the_operator_computes_all_heads(experts, num_used):
    states, chosen = torch.randn(3, 5, 32), torch.arange(15).flip(0).view(3, 5) % num_used
    (order, _, sizes), weights = experts.dispatch(chosen).sort(), experts.heads.weights()
    with torch.no_grad():
        actual = sparse_heads(states.flatten(0, 1), chosen.flatten(), order, sizes, *weights)
        assert every_head(states[0], *weights).shape == (4, 5, 32)
    torch.testing.assert_close(actual.view_as(states), one_by_one(experts, states, chosen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "capability", "error", "has_kernels"),
    [
        ("cuda", (8, 0), None, True),
        ("cuda", (9, 0), RuntimeError("no C compiler"), False),
        ("cuda", (7, 5), None, False),
        ("cpu", (9, 0), None, False),
    ],
)
def test_a_device_has_kernels_if_it_is_new_enough_and_triton_works(
    monkeypatch, device, capability, error, has_kernels
):
    zeros = torch.zeros
    monkeypatch.setattr(experts_triton_yan, "triton", object())
    monkeypatch.setattr(experts_triton_yan, "triton_heads", Mock(side_effect=error))
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device, **kwargs: zeros(*sizes, **kwargs))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert experts_triton_yan.has_kernels_for.__wrapped__(torch.device(device)) == has_kernels


class SeeminglyOnGpu(torch.Tensor):
    is_cuda = True


def with_one_wide(experts):
    experts.heads.down_proj.data = experts.heads.down_proj.float()


@pytest.mark.parametrize(
    ("change", "has_kernels"),
    [
        (lambda experts: experts, True),
        (lambda experts: experts.half(), True),
        (lambda experts: experts.float(), False),
        (with_one_wide, False),
        (lambda experts: torch.set_grad_enabled(True), False),
    ],
    ids=["bfloat16", "float16", "float32", "mixed", "training"],
)
def test_only_16_bit_heads_on_a_gpu_have_kernels(experts, monkeypatch, change, has_kernels):
    called = []
    monkeypatch.setattr(expert_heads_yan, "sparse_heads", lambda tokens, *args: called.append(1) or tokens)
    experts = experts.to(torch.bfloat16)
    states, chosen = torch.randn(2, 3, 32), torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        change(experts)
        states = states.to(experts.heads.up_proj.dtype).as_subclass(SeeminglyOnGpu)
        with contextlib.suppress(RuntimeError):  # types that do not fit
            experts.combine(states, experts.dispatch(chosen))
    assert bool(called) == has_kernels


def test_kernels_that_can_not_run_are_an_error_where_they_were_asked_for(experts):
    experts.heads.config._experts_implementation = "triton"
    with pytest.raises(ValueError, match=r"'triton' \(torch.float32 on cpu, gradients on\): must be 16 bits on a GPU"):
        experts.combine(torch.randn(2, 5, 32), experts.dispatch(torch.zeros(2, 5, dtype=torch.long)))


# --- files


def single_heads(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as checkpoints of before have them: each head by itself."""
    state = dict(state)
    for name in ("up_proj", "down_proj"):
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            stack = state.pop(f"flow.experts.heads.{name}{suffix}")
            state |= {f"flow.experts.heads.{k}.{name}.{kind}": part.clone() for k, part in enumerate(stack)}
    return state


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def model(make_model):
    model = make_model(num_experts=12, initializer_range=0.3)  # 10 comes after 9, and not after 1
    with_biases(model.flow.experts)
    return model.eval()


def test_files_have_each_head_by_itself_and_are_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = single_heads(model.state_dict())
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert saved.keys() == expected.keys()
    loaded = YanForFlowGeneration.from_pretrained(tmp_path)
    assert same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == saved.keys()


def test_files_with_stacked_heads_are_read_too(model, tmp_path):
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "flow.experts.heads.up_proj" in load_file(tmp_path / "model.safetensors")
    assert same(YanForFlowGeneration.from_pretrained(tmp_path), model)


def test_sharded_files_and_offloaded_weights_are_read(model, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(YanForFlowGeneration.from_pretrained(tmp_path), model)
    places = {name: "disk" if name == "flow" else "cpu" for name, _ in model.named_children()}
    offloaded = YanForFlowGeneration.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    assert offloaded.flow.experts.heads.up_proj.device.type == "meta"
    prompts = torch.tensor([[5, 6, 7]])
    assert torch.equal(offloaded.generate(prompts), model.generate(prompts))


@pytest.mark.parametrize("as_they_were", [True, False])
def test_states_of_both_kinds_are_loaded(make_model, model, as_they_were):
    fresh = make_model(num_experts=12)
    state = single_heads(model.state_dict()) if as_they_were else model.state_dict()
    names = set(state)
    fresh.load_state_dict(state)
    assert same(fresh, model)
    assert set(state) == names


def test_a_head_that_is_missing_is_told(make_model, model, tmp_path):
    state = single_heads(model.state_dict())
    del state[FIRST]
    with pytest.raises(RuntimeError, match=r"Missing key.*flow.experts.heads.up_proj"):
        make_model(num_experts=12).load_state_dict(state)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    del saved[FIRST]
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        YanForFlowGeneration.from_pretrained(tmp_path)


def test_an_adapter_of_single_heads_is_refused(model):
    key = "flow.experts.heads.0.up_proj.lora_A.default.weight"
    with pytest.raises(ValueError, match=f"{key}: an adapter of single heads must be merged"):
        copy.deepcopy(model).load_state_dict({key: torch.zeros(2, 32)}, strict=False)
