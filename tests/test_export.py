"""The exported generation writes generate's tokens, alone in a process that has nothing but torch."""

import subprocess
import sys

import pytest
import torch

from modeling_yan.export import export_generation, save_program, with_packed_weights

only_attention = pytest.mark.parametrize("variant", ["attention"])
DRAFTED = {"train_expert_choice": "posterior", "num_answer_slots": 8, "attention_conv_kernel": 3}
DRAFTED |= {"copy_prompt_to_slots": True, "refine_draft": True}
ONE_EXPERT = {"expert_scope": "sequence", **DRAFTED}
LOAD = {
    "graph": "torch.export.load(sys.argv[1]).module()",
    "native": "torch._inductor.aoti_load_package(sys.argv[1])",
}
RUN = """
import sys
sys.modules["modeling_yan"] = sys.modules["transformers"] = None
import torch
program = {load}
ids, mask = torch.load(sys.argv[2])
torch.save(program(ids, mask), sys.argv[3])
"""


@pytest.fixture
def make_lively_model(make_model):
    """Function from overrides to a tiny model without parts that start at zero."""

    def make(**overrides):
        model = make_model(num_experts=3, num_encoder_layers=1, **overrides)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture
def lively_model(make_lively_model):
    return make_lively_model()


@pytest.fixture
def inputs():
    """Prompts (2, 7) and their mask; one is padded on the left."""
    ids, mask = torch.randint(4, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return ids, mask


@pytest.mark.slow
def test_a_program_has_the_options_of_the_models_generation_config(make_lively_model, inputs):
    model, options = make_lively_model(), {"return_prompt": False, "max_new_tokens": 8}
    first = model.generate(*inputs[:1], attention_mask=inputs[1], **options)
    for name, value in (("suppress_tokens", first.unique().tolist()), ("min_new_tokens", 8)):
        setattr(model.generation_config, name, value)
        tokens = model.generate(*inputs[:1], attention_mask=inputs[1], **options)
        program = export_generation(model, 2, 7).module()(*inputs)
        assert torch.equal(program[:, : tokens.shape[1]], tokens), name
    assert not torch.equal(tokens, first)


@pytest.mark.slow
def test_a_program_has_the_seed_of_the_models_generation_config(make_lively_model, inputs):
    model = make_lively_model(init_noise=3.0)
    programs = [export_generation(model, 2, 7).module()(*inputs)]
    model.generation_config.seed = 3
    expected = model.generate(*inputs[:1], attention_mask=inputs[1], return_prompt=False, max_new_tokens=8)
    programs += [export_generation(model, 2, 7, seed=seed).module()(*inputs) for seed in (None, 0)]
    assert torch.equal(programs[1][:, : expected.shape[1]], expected)
    assert torch.equal(programs[2], programs[0])
    assert not torch.equal(programs[1], programs[0])


def test_a_program_has_the_steps_and_the_canvas_of_the_generation_config(make_lively_model, monkeypatch):
    model, made = make_lively_model(), []
    monkeypatch.setattr(torch.export, "export", lambda program, *_, **__: made.append(program))
    model.generation_config.num_flow_steps, model.generation_config.canvas_length = 1, 4
    for options in ({}, {"num_flow_steps": 2, "canvas_length": 8}):
        export_generation(model, 2, 7, **options)
    assert [(each.plan.num_flow_steps, each.start_noise.shape[1]) for each in made] == [(1, 4), (2, 8)]
    with pytest.raises(
        ValueError, match="a model with packed or int8 weights: must be the model that it was made from"
    ):
        export_generation(with_packed_weights(model))


@pytest.mark.parametrize("choice", ["sample", "ranked"])
def test_a_program_draws_nothing(make_lively_model, choice):
    model = make_lively_model()
    model.generation_config.expert_choice = choice
    with pytest.raises(ValueError, match=f"expert_choice='{choice}': must be 'argmax' or 'mixture' in a program"):
        export_generation(model, 2, 7)


def generated(model, ids, mask, steps, **options):
    options = {"min_new_tokens": 8, "max_new_tokens": 8, "num_flow_steps": steps, "return_prompt": False, **options}
    return model.generate(ids, attention_mask=mask, **options)


def run_alone(path, inputs, folder, kind):
    torch.save(inputs, folder / "inputs.pt")
    arguments = [path, folder / "inputs.pt", folder / "tokens.pt"]
    subprocess.run([sys.executable, "-c", RUN.format(load=LOAD[kind]), *map(str, arguments)], cwd=folder, check=True)
    return torch.load(folder / "tokens.pt")


def of_other_shapes(longest: int):
    """Prompts and masks: one short, one longest, one of a single token, and several of which one is padded."""
    for shape in ((1, 5), (1, longest), (3, 1), (4, 11)):
        ids, mask = torch.randint(4, 64, shape), torch.ones(shape, dtype=torch.long)
        mask[-1, : shape[1] // 2] = 0
        yield ids, mask


@only_attention
def test_an_exported_program_writes_what_generate_writes(lively_model, inputs):
    program = export_generation(lively_model, 2, 7, num_flow_steps=3, min_new_tokens=8).module()
    assert torch.equal(program(*inputs), generated(lively_model, *inputs, 3))
    other = torch.randint(4, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    assert torch.equal(program(*other), generated(lively_model, *other, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "fields"), [("attention", ONE_EXPERT), ("mamba", {})])
def test_a_program_takes_any_number_of_prompts_of_any_length(make_lively_model, fields):
    model = make_lively_model(**fields)
    exported = export_generation(model, None, None, num_flow_steps=1, min_new_tokens=8)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets
    assert not [target for target in targets if target.startswith("yan")]  # all operators are torch's own
    program = exported.module()
    longest = model.config.max_prompt_length
    for other in of_other_shapes(longest):
        assert torch.equal(program(*other), generated(model, *other, 1))
    too_long = torch.ones(1, longest + 1, dtype=torch.long)
    with pytest.raises(AssertionError, match=rf"input_ids.*{longest}"):
        program(too_long, too_long)


@only_attention
def test_padding_is_not_between_answer_slots_and_prompt_in_it_either(make_lively_model, inputs):
    model = make_lively_model(num_answer_slots=8, initializer_range=0.3, attention_conv_kernel=3)
    tokens = export_generation(model, 2, 7, num_flow_steps=1, min_new_tokens=8).module()(*inputs)
    assert torch.equal(tokens, generated(model, *inputs, 1))


@pytest.mark.slow
@only_attention
def test_chains_are_read_off_in_it_too(make_lively_model, inputs):
    model = make_lively_model(crf_rank=4, crf_candidates=5)
    tokens = export_generation(model, 2, 7, num_flow_steps=3, min_new_tokens=8).module()(*inputs)
    assert torch.equal(tokens, generated(model, *inputs, 3))
    assert not torch.equal(tokens, generated(model, *inputs, 3, crf_decoding=False))


@pytest.mark.slow
def test_it_runs_without_the_package(lively_model, inputs, tmp_path):
    path = tmp_path / "yan.pt2"
    torch.export.save(export_generation(lively_model, 2, 7, num_flow_steps=2, min_new_tokens=8), path)
    expected = generated(lively_model, *inputs, 2)
    assert torch.equal(run_alone(path, inputs, tmp_path, "graph"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"crf_rank": 4}, ONE_EXPERT], ids=["tokens", "chains", "one expert"])
def test_it_runs_as_onnx_in_any_shape(make_lively_model, tmp_path, fields):
    lively_model = make_lively_model(**fields)
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "yan.onnx"
    save_program(export_generation(lively_model, None, None, num_flow_steps=2, min_new_tokens=8), path, "onnx")
    session = onnxruntime.InferenceSession(path)
    for ids, mask in of_other_shapes(lively_model.config.max_prompt_length):
        (tokens,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        assert tokens.tolist() == generated(lively_model, ids, mask, 2).tolist()


@pytest.mark.compiler
@pytest.mark.parametrize("shape", [(2, 7), (None, None)], ids=["its shape", "any shape"])
def test_its_machine_code_runs_without_the_package(lively_model, inputs, tmp_path, shape):
    path = tmp_path / "yan.pt2"
    program = export_generation(lively_model, *shape, num_flow_steps=2, min_new_tokens=8)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    expected = generated(lively_model, *inputs, 2)
    assert torch.equal(run_alone(path, inputs, tmp_path, "native"), expected)


@only_attention
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"num_flow_steps": 0}, "num_flow_steps=0: must be at least 1"),
        ({"prompt_length": 49}, "prompt_length=49: must be 1 to max_prompt_length=48"),
        ({"prompt_length": 7, "canvas_length": 0}, "canvas_length=0: must be 1 to max_position_embeddings=48"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make_model, sizes, message):
    with pytest.raises(ValueError, match=message):
        export_generation(make_model(), **sizes)
