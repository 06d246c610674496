"""What only a GPU can show; on a machine without one everything here is skipped."""

import copy
import gc
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.generation.configuration_utils import CompileConfig

from modeling_yan import (
    YanForFlowGeneration,
    cuda_graphs_yan,
    expert_heads_yan,
    generation_yan,
    layers_yan,
    linear_yan,
    mamba_yan,
)
from modeling_yan.canvas_yan import CanvasPlan, encode_and_solve
from modeling_yan.experts_yan import YanExperts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NUM_STEPS, LENGTH = 3, 8


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def model(make_model) -> YanForFlowGeneration:
    """A model in evaluation mode on the CPU whose tokens depend on prompt, noise and time."""
    model = make_model(initializer_range=0.3)
    torch.nn.init.normal_(model.flow.modulation.proj.weight, std=0.1)
    return model


@pytest.fixture
def prompts() -> torch.LongTensor:
    return torch.randint(4, 64, (5, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_gpu_writes_the_tokens_of_the_cpu(model, prompts, padding):
    mask = torch.ones_like(prompts)
    if padding != "none":
        mask[1, :4] = mask[3, :9] = 0
        mask = mask.flip(1) if padding == "right" else mask
    expected = model.generate(prompts, attention_mask=mask)
    actual = copy.deepcopy(model).cuda().generate(prompts.cuda(), attention_mask=mask.cuda())
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize(
    "way", [{"do_sample": True, "expert_choice": "sample", "seed": 5}, {"expert_choice": "ranked"}], ids=str
)
def test_several_sequences_are_the_same_on_both_devices(model, prompts, way):
    options = {**way, "num_return_sequences": 3}
    expected = model.generate(prompts, **options)
    actual = copy.deepcopy(model).cuda().generate(prompts.cuda(), **options)
    assert torch.equal(actual.cpu(), expected)


def test_the_loss_and_its_gradients_are_those_of_the_cpu(model, prompts):
    labels = prompts[:, :LENGTH]
    outputs = []
    for device in ("cpu", "cuda"):
        copied = copy.deepcopy(model).to(device).eval()  # fixed noise and times
        loss = copied(prompts.to(device), labels=labels.to(device), num_flow_steps=NUM_STEPS).loss
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in copied.named_parameters() if p.grad is not None}
        outputs.append((loss.detach().cpu(), gradients))
    (expected, expected_gradients), (actual, gradients) = outputs
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient / largest, expected_gradients[name] / largest, rtol=1e-3, atol=1e-4)


def test_nothing_in_a_canvas_waits_for_the_gpu(model, prompts):
    model = model.cuda()
    plan = CanvasPlan(NUM_STEPS, "euler", "argmax", 1, suppressed=(5, 6), eos=(2,), num_without_eos=3, keep_path=True)
    noise = model.start_noise((1, LENGTH), torch.empty(0, device="cuda"))
    prompts = prompts.cuda()
    with torch.no_grad():
        expected = encode_and_solve(model, prompts, None, noise, None, None, None, plan)  # kernels are built
        torch.cuda.set_sync_debug_mode("error")
        try:
            canvas = encode_and_solve(model, prompts, None, noise, None, None, None, plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(canvas.tokens, expected.tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_writes_most_of_the_same_tokens(model, prompts, dtype):
    model = model.cuda()
    expected = model.generate(prompts.cuda(), return_prompt=False, min_new_tokens=LENGTH)
    actual = model.to(dtype).generate(prompts.cuda(), return_prompt=False, min_new_tokens=LENGTH)
    assert (actual == expected).float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_cuda_graph_writes_the_plain_tokens(model, prompts, dtype):
    model, prompts = model.to("cuda", dtype), prompts.cuda()
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    for ids in (prompts, prompts.flip(1)):  # the second call replays the graph
        expected = model.generate(ids, attention_mask=mask, return_prompt=False, min_new_tokens=LENGTH)
        options = {"return_prompt": False, "min_new_tokens": LENGTH, "compile_config": CompileConfig()}
        actual = model.generate(ids, attention_mask=mask, **options)
        if dtype == torch.float32:
            assert torch.equal(actual, expected)
        else:
            assert (actual == expected).float().mean() > 0.8


RECORDED = {"compile_config": CompileConfig(backend="eager"), "min_new_tokens": LENGTH}


def check_recorded(model, prompts):
    """Tokens that a recording writes, which are the plain ones."""
    recorded = model.generate(prompts, **RECORDED)
    assert torch.equal(recorded, model.generate(prompts, min_new_tokens=LENGTH))
    return recorded


def test_a_recording_follows_whatever_changes_the_model(model, prompts):
    model, prompts = model.cuda(), prompts.cuda()
    heads, first = model.flow.experts.heads, check_recorded(model, prompts)
    kept = first.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    in_place = check_recorded(model, prompts)
    assert len(model._cuda_graphs.calls) == 1
    heads.up_proj = torch.nn.Parameter(torch.randn_like(heads.up_proj))
    replaced = check_recorded(model, prompts)
    hook = model.flow.norm.register_forward_hook(lambda module, arguments, output: -output)
    hooked = check_recorded(model, prompts)
    hook.remove()
    assert torch.equal(check_recorded(model, prompts), replaced)
    changed = [first, in_place, replaced, hooked]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(changed))
    assert torch.equal(first, kept)
    check_recorded(copy.deepcopy(model), prompts)


def test_a_model_is_compared_while_its_recording_is_replayed(model, prompts, monkeypatch):
    model, prompts, calls = model.cuda(), prompts.cuda(), []
    check_recorded(model, prompts)
    for owner, name in ((cuda_graphs_yan.Recording, "__call__"), (cuda_graphs_yan.ModelFingerprint, "matches")):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, call=call, name=name: calls.append(name) or call(*args))
    check_recorded(model, prompts)
    assert calls == ["__call__", "matches"]  # and not the other way round


def test_a_model_that_leaves_the_gpu_leaves_no_memory_there(model, prompts):
    before = torch.cuda.memory_allocated()
    check_recorded(model.cuda(), prompts.cuda())
    model.cpu()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    generation_yan._shared_noise.cache_clear()
    assert torch.cuda.memory_allocated() - before < 2**16
    check_recorded(model.cuda(), prompts.cuda())


def test_a_recording_outlives_the_memory_that_others_free(make_model, prompts):
    # wide enough for products that need memory to work in
    model, prompts = make_model(hidden_size=512, intermediate_size=2048, num_attention_heads=8).cuda(), prompts.cuda()
    recorded = check_recorded(model, prompts)
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile does before it records a graph of its own
    torch.cuda.empty_cache()
    filled = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(16)]
    assert torch.equal(check_recorded(model, prompts), recorded)
    assert all(tensor.isnan().all() for tensor in filled)


def test_recordings_share_their_memory(model, prompts):
    model, prompts = model.cuda(), prompts.cuda()
    check_recorded(model, prompts)
    before = torch.cuda.memory_reserved()
    for num_rows in (4, 3, 2, 1):
        check_recorded(model, prompts[:num_rows])
    assert torch.cuda.memory_reserved() <= before + 2**22
    assert len(model._cuda_graphs.calls) == 5


def test_a_recording_made_under_autocast_converts_its_weights_itself(model, prompts):
    model, prompts, written = model.cuda(), prompts.cuda(), []
    for _ in range(2):  # the second context knows nothing of what the first has converted
        with torch.autocast("cuda", torch.bfloat16):
            written.append(model.generate(prompts, **RECORDED))
        torch.cuda.empty_cache()
        torch.full((2**22,), torch.nan, device="cuda")
    assert torch.equal(*written)


def test_what_a_recorded_call_costs_is_measured(tmp_path):
    command = [sys.executable, "examples/benchmark/recording.py", "--preset", "tiny", "--backend", "eager"]
    subprocess.run([*command, "--output", str(tmp_path / "r.json")], cwd=Path(__file__).parents[1], check=True)
    seconds = json.loads((tmp_path / "r.json").read_text())["seconds"]
    assert 0 < seconds["replay"]["median"] < seconds["call"]["median"]


def test_there_are_no_more_recordings_than_allowed(model, prompts, monkeypatch):
    monkeypatch.setattr(cuda_graphs_yan, "MAX_RECORDINGS", 2)
    model, prompts = model.cuda(), prompts.cuda()
    for num_rows in (1, 2, 1, 3, 1):  # that of one row is asked for again and stays
        check_recorded(model, prompts[:num_rows])
    rows = [shapes[0][0][0] for _, shapes, *_ in model._cuda_graphs.calls]
    assert rows == [3, 1]


def test_a_model_with_an_adapter_runs_as_it_is(model, prompts):
    peft = pytest.importorskip("peft")
    model, prompts = model.cuda(), prompts.cuda()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with_adapter = check_recorded(adapted.base_model.model, prompts)
    with adapted.disable_adapter():
        assert not torch.equal(check_recorded(adapted.base_model.model, prompts), with_adapter)
    assert not model._cuda_graphs.calls


def test_what_waits_for_the_gpu_is_not_recorded_and_does_no_harm(model, prompts, monkeypatch):
    model, prompts = model.cuda(), prompts.cuda()
    decode_tokens = model.decode_tokens

    def wait_and_decode(*arguments):
        arguments[0].sum().item()
        return decode_tokens(*arguments)

    monkeypatch.setattr(model, "decode_tokens", wait_and_decode)
    check_recorded(model, prompts)
    assert not any(isinstance(call, cuda_graphs_yan.Recording) for call in model._cuda_graphs.calls.values())
    monkeypatch.undo()
    torch.cuda.empty_cache()
    assert torch.randn(1, device="cuda").isfinite()
    check_recorded(model, prompts[:2])
    assert isinstance(list(model._cuda_graphs.calls.values())[-1], cuda_graphs_yan.Recording)


def test_joined_products_write_the_plain_tokens(model, prompts, monkeypatch):
    model, prompts, joined, joins = model.cuda(), prompts.cuda(), [], linear_yan.joins_products
    monkeypatch.setattr(linear_yan, "joins_products", lambda *args: joined.append(joins(*args)) or joined[-1])
    check_recorded(model, prompts)
    assert set(joined) == {True, False}  # recorded, plain


@pytest.mark.parametrize("name", ["eager", "all_heads", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_is_recorded_or_runs_as_it_is(model, prompts, name):
    model, prompts = model.cuda(), prompts.cuda()
    expected = check_recorded(model, prompts)
    model.set_experts_implementation(name)
    assert torch.equal(check_recorded(model, prompts), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_of_the_experts_equal_all_heads_and_a_choice(make_config, dtype, monkeypatch):
    config = make_config(num_experts=4, hidden_size=64, intermediate_size=256, initializer_range=0.2)
    experts, called = YanExperts(config).to("cuda", dtype), []
    for bias in experts.heads.weights()[1::2]:
        torch.nn.init.normal_(bias)
    sparse_heads = expert_heads_yan.sparse_heads
    monkeypatch.setattr(expert_heads_yan, "sparse_heads", lambda *args: called.append(1) or sparse_heads(*args))
    states, chosen = torch.randn(3, 50, 64, device="cuda", dtype=dtype), torch.randint(0, 3, (3, 50), device="cuda")
    with torch.no_grad():
        actual = experts.combine(states, experts.dispatch(chosen))
        index = chosen[..., None, None].expand(3, 50, 1, 64)
        expected = experts.double()(states.double()).gather(2, index).squeeze(2)
    assert called
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_with_its_gelu_equals_the_two(dtype):
    states, layer = torch.randn(3, 40, 64, device="cuda", dtype=dtype), torch.nn.Linear(64, 256).to("cuda", dtype)
    actual = layers_yan._gelu_operator(states, layer.weight, layer.bias)
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(states.double(), *layer.double().parameters()))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(mamba_yan.selective_scan_fn is None, reason="needs mamba-ssm")
@pytest.mark.parametrize("length", [1, 37, 300])
def test_the_kernel_of_mamba_ssm_equals_the_package_s_own(length, monkeypatch):
    torch.manual_seed(length)
    shape = (2, 3, length)
    x, dt = torch.randn(*shape, 20, device="cuda"), torch.rand(*shape, 20, device="cuda")
    a_matrix = -torch.rand(2, 20, 16, device="cuda") - 0.1
    b, c = torch.randn(*shape, 16, device="cuda"), torch.randn(*shape, 16, device="cuda")
    inputs = [tensor.requires_grad_() for tensor in (x, dt, a_matrix, b, c)]
    weight = torch.randn(*shape, 20, device="cuda")
    outputs = []
    for kernel in (mamba_yan.selective_scan_fn, None):
        monkeypatch.setattr(mamba_yan, "selective_scan_fn", kernel)
        y = mamba_yan.selective_scan(*inputs)
        outputs.append((y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)))
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
