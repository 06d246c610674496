"""`torch.compile` of both variants: one graph, few recompilations, the plain model's numbers; and its operators."""

import importlib.util
import sys
import typing
from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers.generation.configuration_utils import CompileConfig

from modeling_yan import (
    YanForAutoencoding,
    compilation_yan,
    expert_heads_yan,
    flow_matching_yan,
    layers_yan,
    linear_yan,
    mamba_yan,
)
from modeling_yan.compilation_yan import is_exporting, opaque_operator, select_rows, use_custom_ops
from modeling_yan.experts_yan import YanExperts

# Everything but the generation of code: traced, decomposed and split into forward and backward as inductor wants it.
TRACED = "aot_eager_decomp_partition"
STEPS = {"num_flow_steps": 2, "min_train_flow_steps": 2, "max_train_flow_steps": 2}
only_attention = pytest.mark.parametrize("variant", ["attention"])


def mostly_attention(**cases):
    """Cases of what knows nothing of mixers, by name: all with attention, and with Mamba, slow but the first."""
    first = next(iter(cases))
    return [
        pytest.param(variant, *case, marks=mark, id=f"{variant}-{name}")
        for variant, slow in (("attention", ()), ("mamba", pytest.mark.slow))
        for name, case in cases.items()
        for mark in [() if name == first else slow]
    ]


LIKELIHOOD = {"expert_scope": "sequence", "train_expert_choice": "posterior", "num_answer_slots": 16}
LIKELIHOOD |= {"copy_prompt_to_slots": True, "refine_draft": True}
LIKELIHOOD |= {"canvas_length": 16}
ONE_HEAD = {**LIKELIHOOD, "share_expert_head": True}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def lively_model(make_model):
    """A tiny model in evaluation mode, where nothing is random, without parts that start at zero."""

    def make(*args, **overrides):
        model = make_model(*args, **{"num_encoder_layers": 1, "num_flow_layers": 1, **STEPS, **overrides})
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        return model

    return make


def batch(rows=3, length=11):
    """Ids, a mask with padding on the left, and labels."""
    ids, mask = torch.randint(4, 64, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[0, :3] = 0
    return ids, mask, torch.randint(4, 64, (rows, length))


def results(function, model, ids, mask, labels):
    """Loss, logits and all gradients."""
    model.zero_grad()
    output = function(ids, mask, labels=labels)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def check_training_steps(model, backend, shapes, num_labels):
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for shape in shapes:
        ids, mask, labels = batch(*shape)
        actual = results(compiled, model, ids, mask, labels[:, :num_labels])
        expected = results(model, model, ids, mask, labels[:, :num_labels])
        assert actual.keys() == expected.keys()
        for name, tensor in actual.items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


# --- what a program computes once


def merged(function, *inputs):
    """The function's graph and how many calls of each operator are left of it, once repetitions are merged."""
    graph = make_fx(function)(*inputs)
    compilation_yan.merge_repeated(graph.graph)
    graph.recompile()
    return graph, Counter(node.target for node in graph.graph.nodes if node.op == "call_function")


def test_what_is_repeated_is_computed_once():
    def steps(a, b, x):
        for _ in range(3):
            x = x @ torch.cat([a, b], dim=1)
        return x

    a, b, x = torch.randn(4, 2), torch.randn(4, 2), torch.randn(5, 4)
    graph, calls = merged(steps, a, b, x)
    assert calls[torch.ops.aten.cat.default] == 1
    assert calls[torch.ops.aten.mm.default] == 3
    torch.testing.assert_close(graph(a, b, x), steps(a, b, x), rtol=0, atol=0)


def test_only_what_is_the_same_is_merged():
    def function(x):
        return x.sum(0), x.sum(1), x + 1, x + 1.0, x + True

    _, calls = merged(function, torch.ones(2, 2, dtype=torch.long))
    assert calls[torch.ops.aten.sum.dim_IntList] == 2
    assert calls[torch.ops.aten.add.Tensor] == 3


def test_chance_and_updates_are_not_merged():
    def function(x):
        x = x.clone()
        x.add_(1)
        x.add_(1)
        return x + torch.rand_like(x) - torch.rand_like(x)

    graph, calls = merged(function, torch.zeros(5))
    assert calls[torch.ops.aten.add_.Tensor] == calls[torch.ops.aten.rand_like.default] == 2
    assert graph(torch.zeros(5)).unique().numel() == 5


def test_a_pass_of_the_user_s_stays():
    with compilation_yan.merging():
        own = torch._inductor.config.post_grad_custom_pre_pass
    assert own is not None
    assert torch._inductor.config.post_grad_custom_pre_pass is None
    with torch._inductor.config.patch(post_grad_custom_pre_pass=own.uuid), compilation_yan.merging():
        assert torch._inductor.config.post_grad_custom_pre_pass == own.uuid


@pytest.mark.compiler
@only_attention
def test_steps_of_compiled_generation_share_what_they_repeat(lively_model, monkeypatch):
    saved, merge = [], compilation_yan.merge_repeated

    def count(graph):
        before = len(graph.nodes)
        merge(graph)
        saved.append(before - len(graph.nodes))

    monkeypatch.setattr(compilation_yan, "merge_repeated", count)
    model, (ids, mask, _) = lively_model(), batch()
    with torch._inductor.config.patch(force_disable_caches=True):
        actual = model.generate(ids, attention_mask=mask, compile_config=CompileConfig())
    assert torch.equal(actual, model.generate(ids, attention_mask=mask))
    assert saved[0] > 0


# --- the whole model


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["flow", "autoencoder"])
def test_a_second_shape_is_the_last_recompilation(lively_model, model_class):
    model = lively_model() if model_class == "flow" else lively_model(YanForAutoencoding)
    num_labels = 6 if model_class == "flow" else None
    check_training_steps(model, "eager", [(3, 11), (4, 13), (5, 9)], num_labels)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "settings"),
    mostly_attention(
        plain=[{}],
        sequence=[{"expert_scope": "sequence", "train_expert_choice": "posterior"}],
        tokens=[{"crf_rank": 4}],
        chains=[{**LIKELIHOOD, "crf_rank": 4}],
        shared=[ONE_HEAD],
    ),
)
def test_a_step_in_training_mode_has_no_graph_break(lively_model, settings):
    model, (ids, mask, labels) = lively_model(**settings).train(), batch()
    torch.compile(model, backend="eager", fullgraph=True)(ids, mask, labels=labels[:, :6]).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "backend",
    [pytest.param(TRACED, marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.compiler)],
)
def test_compiled_gradients_equal_the_plain_ones(lively_model, backend):
    model = lively_model(num_encoder_layers=2, num_flow_layers=2)  # memory of the first layers is used again
    check_training_steps(model, backend, [(3, 11), (3, 11)], num_labels=6)


# --- generate as one program


def generated(model, ids, mask, **options):
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "return_dict_in_generate": True, **options}
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize(
    ("variant", "settings", "options"),
    mostly_attention(
        one=({}, {}),
        two=({}, {"do_sample": True, "seed": 3, "num_return_sequences": 2}),
        ranked=({}, {"expert_choice": "ranked", "num_return_sequences": 2}),
        one_a_text=({"expert_scope": "sequence"}, {}),
        chain=({"crf_rank": 4, "crf_candidates": 5}, {}),
        likelihood=(LIKELIHOOD, {}),
        one_head=(ONE_HEAD, {"do_sample": True, "seed": 3}),
        drawn=({**LIKELIHOOD, "crf_rank": 4}, {"do_sample": True, "seed": 3, "temperature": 0.7}),
    ),
)
@pytest.mark.slow
def test_generate_as_one_program_writes_the_plain_tokens(lively_model, settings, options):
    model, (ids, mask, _) = lively_model(num_experts=3, **settings), batch()
    whole = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode="default")
    compiled = generated(model, ids, mask, compile_config=whole, **options)
    plain = generated(model, ids, mask, **options)
    assert torch.equal(compiled.sequences, plain.sequences)
    torch.testing.assert_close(compiled.trajectory[0], plain.trajectory[0], rtol=1e-4, atol=1e-5)
    assert compiled.num_trunk_passes == plain.num_trunk_passes


@pytest.mark.slow
@only_attention
def test_prompts_of_a_bucket_share_a_program(lively_model):
    model = lively_model(max_position_embeddings=160)
    whole = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode="default")
    options = {"compile_config": whole, "max_new_tokens": 8, "min_new_tokens": 8}
    graphs = []
    for length in (5, 9, 64, 70):
        ids, mask, _ = batch(2, length)
        tokens = generated(model, ids, mask, **options).sequences
        assert torch.equal(tokens, generated(model, ids, mask, max_new_tokens=8, min_new_tokens=8).sequences)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 2]


def update_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def add_hook(model):
    model.flow.norm.register_forward_hook(lambda module, arguments, output: -output)


@pytest.mark.slow
@only_attention
def test_a_compiled_program_follows_its_weights_and_hooks(lively_model):
    model, (ids, mask, _) = lively_model(num_flow_steps=1), batch()
    settings = CompileConfig(dynamic=False, backend="eager", mode="default")
    options = {"compile_config": settings}
    before = generated(model, ids, mask, **options).sequences
    for change in (update_weights, add_hook):
        change(model)
        after = generated(model, ids, mask, **options).sequences
        assert not torch.equal(before, after)
        assert torch.equal(after, generated(model, ids, mask).sequences)
        before = after


def test_a_compiled_program_is_told_from_an_exported_one():
    function = torch.compile(lambda: (use_custom_ops(), is_exporting()), backend="eager", fullgraph=True)
    assert (*function(), use_custom_ops()) == (True, False, False)


def test_joined_products_write_the_plain_tokens(lively_model, monkeypatch):
    model, (ids, mask, _) = lively_model(num_flow_layers=3, cross_attention_layers=[0, 2]), batch()
    plain, joined = generated(model, ids, mask), []
    monkeypatch.setattr(linear_yan, "joins_products", lambda layers, states: joined.append(len(layers)) or True)
    actual = generated(model, ids, mask)
    assert set(joined) == ({2, 3} if model.config.encoder_mixer == "attention" else {2})
    assert torch.equal(actual.sequences, plain.sequences)
    torch.testing.assert_close(actual.trajectory, plain.trajectory, rtol=1e-4, atol=1e-5)


@pytest.mark.compiler
def test_machine_code_of_generate_writes_the_plain_tokens(lively_model):
    model, (ids, mask, _) = lively_model(num_experts=3), batch()
    compiled = generated(model, ids, mask, compile_config=CompileConfig())
    assert torch.equal(compiled.sequences, generated(model, ids, mask).sequences)


# --- parts


def output_and_gradients(function, inputs):
    output = function(*inputs)
    weight = torch.arange(output.numel()).view_as(output).sin()
    return [output, *torch.autograd.grad((output * weight).sum(), inputs, materialize_grads=True)]


@only_attention
@pytest.mark.parametrize("num_used", [1, 4])
def test_compiled_experts_equal_plain_ones(make_config, num_used):
    experts, states = YanExperts(make_config(num_experts=4)), torch.randn(3, 5, 32, requires_grad=True)
    chosen = torch.arange(15).view(3, 5) % num_used

    def run(states, *parameters):
        return experts.combine(states, experts.dispatch(chosen))

    inputs = [states, *experts.parameters()]
    compiled = torch.compile(run, backend=TRACED, fullgraph=True)
    for a, b in zip(output_and_gradients(compiled, inputs), output_and_gradients(run, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Doubled(nn.Module):
    """Stands for an adapter: the weight alone does not say what is computed."""

    def forward(self, weight):
        return 2 * weight


@only_attention
def test_compiled_experts_have_the_weights_that_an_adapter_makes(make_config):
    experts, states = YanExperts(make_config(num_experts=3, initializer_range=0.3)), torch.randn(2, 6, 32)
    plain = deepcopy(experts)
    parametrize.register_parametrization(experts.heads, "up_proj", Doubled())
    plain.heads.up_proj.data *= 2
    chosen = torch.arange(12).view(2, 6) % 3
    compiled = torch.compile(lambda x: experts.combine(x, experts.dispatch(chosen)), backend="eager")
    torch.testing.assert_close(compiled(states), plain.combine(states, plain.dispatch(chosen)))


def test_selected_rows_and_their_gradient_equal_an_embeddings():
    table, index = torch.randn(7, 5, requires_grad=True), torch.tensor([[1, 1, 6], [0, 1, 6]])
    compiled = torch.compile(select_rows, backend=TRACED, fullgraph=True)
    expected = output_and_gradients(lambda weight: F.embedding(index, weight), [table])
    for function in (compiled, select_rows):
        for a, b in zip(output_and_gradients(lambda weight, f=function: f(weight, index), [table]), expected):
            torch.testing.assert_close(a, b)


def test_compiled_noise_is_the_plain_noise():
    compiled = torch.compile(flow_matching_yan.hashed_normal, backend=TRACED, fullgraph=True)
    for shape in [(1, 4, 6), (1, 5, 6)]:
        torch.testing.assert_close(compiled(3, shape), flow_matching_yan.hashed_normal(3, shape))


def scan_arguments():
    x, dt, a_matrix = torch.randn(11, 2, 3, 4), torch.rand(11, 2, 3, 4) + 0.05, -torch.rand(2, 5, 4)
    return [
        tensor.requires_grad_() for tensor in (x, dt, a_matrix, torch.randn(11, 2, 3, 5), torch.randn(11, 2, 3, 5))
    ]


def grouped_arguments():
    tokens, sizes = torch.randn(6, 3, requires_grad=True), torch.tensor([2, 0, 4])
    return [tokens, sizes, torch.randn(3, 5, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)]


def heads_arguments():
    layers = [torch.randn(shape) for shape in ((2, 5, 3), (2, 5), (2, 3, 5), (2, 3))]
    chosen, order = torch.tensor([0, 1, 1, 1, 0, 1]), torch.tensor([0, 4, 1, 2, 3, 5])
    return [torch.randn(6, 3), chosen, order, torch.tensor([2, 4]), *layers]


@pytest.mark.parametrize(
    ("operator", "make_arguments"),
    [
        (mamba_yan._scan_operator, scan_arguments),
        (expert_heads_yan.grouped_linear, grouped_arguments),
        (expert_heads_yan.sparse_heads, heads_arguments),
        (expert_heads_yan.sparse_heads, lambda: [torch.randn(3, 6).T, *heads_arguments()[1:]]),
        (layers_yan._gelu_operator, lambda: [torch.randn(2, 6, 3), torch.randn(5, 3), torch.randn(5)]),
    ],
    ids=["scan", "grouped_linear", "sparse_heads", "transposed", "gelu_linear"],
)
def test_the_operators_keep_the_rules_of_torch(operator, make_arguments):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, tuple(make_arguments()), test_utils=tests)


def test_code_that_is_loaded_again_leaves_the_first_operators_alone(monkeypatch):
    copies = [compilation_yan]
    # as remote code: a module of its own, named after a folder, whose name need not be one of Python's
    for folder in ("yan-copy", "yan-copy", "Übung", "模型", "样本", "it's a copy"):
        name = f"{folder}.compilation_yan"
        spec = importlib.util.spec_from_file_location(name, compilation_yan.__file__)
        copies.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, name, copies[-1])
        spec.loader.exec_module(copies[-1])
    table, index = torch.randn(7, 5), torch.tensor([1, 6])
    for copy in (copies[2], copies[-1], compilation_yan):
        compiled = torch.compile(copy.select_rows, backend=TRACED, fullgraph=True)
        assert torch.equal(compiled(table, index), table[index])
    assert len({copy._select_operator._qualname for copy in copies}) == 6


def test_an_operator_has_hints_that_torch_2_6_knows():
    def split(parts: list[torch.Tensor], sizes: list[int], scale: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return parts[0] * scale, [part[: sizes[0]] for part in parts]

    opaque_operator(split, split)
    assert split.__annotations__["sizes"] == typing.List[int]  # noqa: UP006
    assert repr(split.__annotations__["return"]) == "typing.Tuple[torch.Tensor, typing.List[torch.Tensor]]"
