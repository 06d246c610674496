"""Timings of generation: what is timed, and the table; never how long it took."""

import pytest
import torch

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.evaluation import format_timings, time_generation, timing

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_encoder_layers": 1, "num_flow_layers": 1}
SIZES |= {"num_decoder_layers": 1, "max_position_embeddings": 32, "canvas_length": 8}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return YanForFlowGeneration(YanConfig(**SIZES)).eval()


def test_every_cell_is_timed_in_rounds_and_no_text_ends_early(model, monkeypatch):
    written = []
    generate = YanForFlowGeneration.generate

    def watched(self, prompt, **options):
        sequences = generate(self, prompt, **options)
        written.append((*prompt.shape, sequences.shape[1] - prompt.shape[1], options["num_flow_steps"]))
        return sequences

    monkeypatch.setattr(YanForFlowGeneration, "generate", watched)
    results = time_generation(model, [4, 20], [1, 3], [1, 2], prompt_length=5, repeats=2)
    cells = {(batch, length, steps) for batch in (1, 3) for length in (4, 20) for steps in (1, 2)}
    assert {(batch, length, steps) for batch, _, length, steps in written} == cells
    assert len(written) == len(cells) * 3  # one warms up
    assert all(len(row["seconds"]["all"]) == 2 for row in results)
    assert {row["prompt_length"] for row in results} == {5}


def test_the_models_own_steps_and_its_longest_prompt_are_the_defaults(model):
    (row,) = time_generation(model, [4], repeats=1)
    assert (row["model"], row["prompt_length"]) == ("YAN, 3 steps", 32)


def test_the_ar_model_is_as_large_and_writes_as_much(model, monkeypatch):
    rivals = []
    make = timing._ar_model
    monkeypatch.setattr(timing, "_ar_model", lambda model: rivals.append(make(model)) or rivals[0])
    results = time_generation(model, [6], [2], [1], beside_ar=True, repeats=1)
    assert [row["model"] for row in results] == ["YAN, 1 step", "AR decoder"]
    assert rivals[0].num_parameters() == pytest.approx(model.num_parameters(), rel=0.01)
    prompt = torch.full((2, 4), 5)
    assert timing._ar_call(rivals[0], prompt, 6)().shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [0]}, r"lengths=\[0\]: must be whole numbers of at least 1"),
        ({"batch_sizes": []}, r"batch_sizes=\[\]: must be"),
        ({"steps": [2, -1]}, r"steps=\[2, -1\]: must be"),
        ({"repeats": 0}, r"repeats=\[0\]: must be"),
        ({"prompt_length": 33}, "prompt_length=33: must be 1 to 32"),
    ],
)
def test_numbers_that_are_not_allowed_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        time_generation(model, **options)


def test_the_table_has_every_row_and_how_many_times_as_fast_it_is():
    about = {"batch": 1, "length": 8, "prompt_length": 4, "tokens_per_s": 80.0}
    seconds = {"median": 0.1, "low": 0.09, "high": 0.2, "all": []}
    rows = [{"model": "YAN, 1 step", **about, "seconds": seconds}]
    head, _, line = format_timings(rows).splitlines()
    assert head == "| texts | tokens | model | ms (median) | range | tokens/s |"
    assert line == "| 1 | 8 | YAN, 1 step | 100.0 | 90.0 to 200.0 | 80 |"
    rows.append({"model": timing.AR, **about, "seconds": {**seconds, "median": 0.4}})
    lines = format_timings(rows).splitlines()
    assert [line.split(" | ")[-1] for line in (lines[0], *lines[2:])] == ["times AR |", "4.0 |", "1.0 |"]
