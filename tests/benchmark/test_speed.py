"""The benchmark of generation: what it runs, what it writes down, and that the naive YAN writes the same tokens."""

import json
from functools import partial

import contenders
import pytest
import speed
import timing
import torch
from contenders import Contender, Models, all_contenders, choose_contenders
from costs import Cost, linear, part_costs
from naive import WASTES, naive_generate
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


@pytest.fixture
def lively_model(make_model):
    """A tiny model without parts that start at zero."""
    model = make_model(num_experts=4)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# --- the naive YAN


@pytest.mark.parametrize("wastes", [(), *((waste,) for waste in WASTES), tuple(WASTES)], ids=lambda w: "-".join(w))
@pytest.mark.parametrize("steps", [1, 3])
def test_the_naive_yan_writes_what_generate_writes(lively_model, wastes, steps):
    prompt = torch.randint(4, 64, (2, 7))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "num_flow_steps": steps, "return_prompt": False}
    expected = lively_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(naive_generate(lively_model, prompt, 8, steps, wastes), expected)


def count_calls(modules):
    counts = []
    for module in modules:
        module.register_forward_hook(lambda *_: counts.append(1))
    return counts


def calls_of_layers(model, wastes):
    """Calls of the last trunk layer, of the experts' heads, of a key projection and of the modulations."""
    layer = model.flow.layers[-1]
    parts = [[layer], [model.flow.experts.heads], [layer.cross_attention.k_proj], [model.flow.modulation]]
    counts = [count_calls(part) for part in parts]
    naive_generate(model, torch.randint(4, 64, (1, 5)), 8, 3, wastes)
    return [len(count) for count in counts]


@pytest.mark.parametrize("variant", ["attention"])
@pytest.mark.parametrize(("waste", "index"), [("gate", 0), ("keys", 2), ("modulations", 3)])
def test_each_waste_costs_what_it_says(lively_model, waste, index):
    assert calls_of_layers(lively_model, ())[index] < calls_of_layers(lively_model, (waste,))[index]


# --- the contenders


@pytest.mark.parametrize("contender", all_contenders(), ids=lambda contender: contender.name)
def test_every_contender_writes_exactly_the_asked_tokens(small_presets, contender):
    models = Models("tiny", 6, 12, CPU, torch.float32)
    model = models.get(contender.model)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= 100  # of the EOS, which must not end the text
    for length in (5, 12):
        tokens = contender.write(model, torch.randint(4, 64, (2, 6)), length)
        assert tokens.shape == (2, length)
        assert not (tokens == 2).any()


def test_the_models_are_of_equal_size(small_presets):
    models = Models("tiny", 6, 12, CPU, torch.float32)
    sizes = {c.model: models.get(c.model).num_parameters() for c in all_contenders()}
    of_yan = sizes.pop("yan-transformer")
    assert sizes.pop("yan-transformer-chains") > of_yan
    del sizes["yan-mamba"]  # a preset of its own
    assert all(size == pytest.approx(of_yan, rel=0.02) for size in sizes.values())


def test_names_are_chosen_by_their_beginning():
    assert [c.name for c in choose_contenders(["yan-mamba", "decoder"])] == [
        *(f"yan-mamba-{steps}" for steps in (1, 2, 3, 4)),
        "decoder",
    ]
    with pytest.raises(ValueError, match=r"models='gpt'.*yan-transformer-1.*masked_diffusion-T"):
        choose_contenders(["gpt"])


def test_int8_weights_write_and_leave_the_model_alone(small_presets):
    models = Models("tiny", 6, 8, CPU, torch.float32)
    prompt = torch.randint(4, 64, (2, 6))
    before = contenders.write_with_yan(models.get("yan-transformer"), prompt, 8, 3)
    for variant in contenders.VARIANTS:
        model = models.get(f"yan-{variant}-int8")
        assert contenders.write_with_yan(model, prompt, 8, 3).shape == (2, 8)
        assert model.lm_head.weight().dtype == torch.qint8
    assert torch.equal(contenders.write_with_yan(models.get("yan-transformer"), prompt, 8, 3), before)


def test_chains_of_fresh_transitions_write_the_same_tokens(small_presets):
    models, prompt = Models("tiny", 6, 8, CPU, torch.float32), torch.randint(4, 64, (2, 6))
    plain, chained = models.get("yan-transformer"), models.get("yan-transformer-chains")
    assert plain.transitions is None
    assert chained.transitions is not None
    written = [contenders.write_with_yan(model, prompt, 8, 3) for model in (plain, chained)]
    assert torch.equal(*written)


def test_optional_contenders_come_when_asked_for():
    names = {
        contender.name for contender in choose_contenders([], with_compiled=True, with_int8=True, with_packed=True)
    }
    plain = {contender.name for contender in choose_contenders([])}
    variants = contenders.VARIANTS
    kinds = ("compiled", "recorded", "int8", "packed")
    assert names - plain == {
        *(f"yan-{variant}-3-{kind}" for variant in variants for kind in kinds),
        "decoder-packed",
        "masked_diffusion-eager-T",
    }


# --- the command


def test_the_command_writes_all_cells_with_their_spread(small_presets, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "machine_limits", partial(timing.machine_limits, repeats=1))
    output = tmp_path / "out" / "speed.json"
    names = ["yan-transformer-3", "yan-mamba-1", "naive-transformer-all", "decoder"]
    arguments = ["--preset", "tiny", "--models", *names, "--lengths", "4", "8", "--prompt_length", "5"]
    speed.main([*arguments, "--repeats", "3", "--batch_sizes", "1", "2", "--output", str(output)])
    content = json.loads(output.read_text())
    assert len(content["cells"]) == 4 * 2 * 2
    assert {cell["model"] for cell in content["cells"]} == set(names)
    for cell in content["cells"]:
        seconds = cell["seconds"]
        assert len(seconds["all"]) == 3
        assert seconds["low"] <= seconds["median"] <= seconds["high"]
        assert cell["tokens_per_s"] == pytest.approx(cell["batch"] * cell["length"] / seconds["median"])
    assert content["machine"]["bandwidth"] > 0
    assert content["machine"]["peak"] > 0
    assert len(content["parts"]) == 2 * 4
    assert {"encoder", "trunk", "experts", "decoder"} <= set(content["parts"][0])


def test_cells_that_would_take_too_long_are_marked_and_not_run(small_presets):
    called = []
    slow = Contender("slow", "decoder", lambda model, prompt, length: called.append(length), growth=2)
    predictor = speed.Predictor(CPU)
    predictor.record(slow, 1, 4, 2.0)
    options = speed.parse_arguments(["--budget_s", "7", "--prompt_length", "5"])
    cell = speed.prepare_cell([slow], Models("tiny", 5, 8, CPU, torch.float32), predictor, 1, 8, options)
    assert not called
    assert speed.measure_cell(cell, CPU, 5) == [
        {"model": "slow", "batch": 1, "length": 8, "prompt_length": 5, "skipped": "predicted to take 8 s a call"}
    ]


@pytest.mark.parametrize(("device", "batch_growth", "at_batch_3"), [("cpu", 1, 24), ("cpu", 0, 8), ("cuda", 1, 8)])
def test_predictions_grow_from_smaller_cells(device, batch_growth, at_batch_3):
    contender = Contender("any", "decoder", None, growth=2, batch_growth=batch_growth)
    predictor = speed.Predictor(torch.device(device))
    assert predictor.predict(contender, 1, 4) == 0
    predictor.record(contender, 1, 4, 2.0)
    predictor.record(contender, 1, 16, 1000.0)  # longer: says nothing of what is shorter
    assert predictor.predict(contender, 1, 4) == 2
    assert predictor.predict(contender, 1, 8) == 8
    assert predictor.predict(contender, 3, 8) == at_batch_3


def test_a_contender_that_writes_too_little_is_no_contender():
    with pytest.raises(RuntimeError, match=r"lazy wrote tokens of shape \(1, 3\) instead of \(1, 4\)"):
        speed.warm_up(lambda: torch.zeros(1, 3), CPU, (1, 4), "lazy")


@pytest.mark.parametrize("option", [["--lengths", "0"], ["--prompt_length", "0"], ["--repeats", "-1"]])
def test_options_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option[0][2:]}=.*at least 1"):
        speed.parse_arguments(option)


# --- the clock


def test_rounds_are_interleaved_and_slow_calls_repeated_less():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.interleave(calls, {"a": 3, "b": 1}, CPU)
    assert order == ["a", "b", "a", "a"]
    assert [len(seconds[name]) for name in "ab"] == [3, 1]


def test_a_budget_bounds_the_repeats():
    assert timing.num_repeats(0.0, 7, 60) == 7
    assert timing.num_repeats(20.0, 7, 60) == 3
    assert timing.num_repeats(100.0, 7, 60) == 1


def test_the_summary_is_the_median_and_the_range():
    assert timing.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "all": [3.0, 1.0, 2.0]}


def test_a_stopped_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    timing.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        timing.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


# --- the floor


@pytest.mark.parametrize("variant", ["attention"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_counted_flops_are_those_of_a_generation(make_model, steps):
    model = make_model(num_experts=4, cross_attention_layers=[1])
    model.set_attn_implementation("eager")
    model.requires_grad_(False)  # torch's counter follows gradients
    prompt = torch.randint(4, 64, (2, 7))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contenders.write_with_yan(model, prompt, 8, steps)
    costs = part_costs(model.config, 2, 7, 8, steps)
    assert sum(cost.flops for cost in costs.values()) == counter.get_total_flops()


def test_the_weights_of_a_linear_layer_are_read_once():
    cost = linear(tokens=3, inputs=4, outputs=5, itemsize=2)
    assert cost == Cost(2 * 3 * 4 * 5, 2 * (5 * 4 + 5 + 3 * 4 + 3 * 5))
    assert linear(3, 4, 5, 2, num_weights=2).bytes - cost.bytes == 2 * (5 * 4 + 5)


def test_the_floor_is_the_slower_of_moving_and_computing():
    assert Cost(flops=10, bytes=4).floor_s(bandwidth=2, peak=10) == 2
    assert Cost(flops=40, bytes=4).floor_s(bandwidth=2, peak=10) == 4


def test_solver_passes_grow_the_trunk_alone(make_config):
    one, three = (part_costs(make_config(), 1, 7, 8, steps) for steps in (1, 3))
    assert one["encoder"] == three["encoder"]
    assert one["decoder"] == three["decoder"]
    assert 2 < three["trunk"].flops / one["trunk"].flops < 3
