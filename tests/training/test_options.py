"""Options of the training loop: each does what it says, and what is shown on the way can be read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_yan import YanForFlowGeneration
from modeling_yan.data.rows import read_rows, write_rows
from modeling_yan.training import pretrain
from modeling_yan.training.models import choose_attention
from modeling_yan.training.optimization import MovingAverage
from modeling_yan.training.validation import Sample, Samples


class TestMovingAverage:
    def test_it_is_the_weighted_sum_of_all_weights(self):
        model = torch.nn.Linear(1, 1, bias=False)
        average = MovingAverage(model, decay=0.6)
        expected = model.weight.item()
        for number, value in enumerate([1.0, 3.0, -2.0, 5.0], start=1):
            model.weight.data.fill_(value)
            average.update()
            decay = min(0.6, (1 + number) / (10 + number))
            expected = decay * expected + (1 - decay) * value
        with average.applied():
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == 5.0

    def test_a_restored_one_goes_on_alike(self):
        model = torch.nn.Linear(2, 2)
        average = MovingAverage(model, decay=0.9)
        average.update()
        copy = MovingAverage(model, decay=0.9)
        copy.load_state_dict(average.state_dict())
        for one in (average, copy):
            one.update()
        torch.testing.assert_close(average.state_dict(), copy.state_dict(), rtol=0, atol=0)

    def test_a_run_saves_the_average_and_trains_the_weights(self, arguments, runs, fresh):
        weights = []
        for decay in (0.0, 0.9):
            fresh()
            settings = replace(arguments(stage="flow", max_steps=4), ema_decay=decay)
            settings.output_dir += str(decay)
            pretrain(settings)
            weights.append(runs.weights(settings.output_dir))
        assert not runs.equal(*weights)
        losses = [[line["loss"] for line in runs.log(settings.output_dir[:-3] + name)] for name in ("0.0", "0.9")]
        assert losses[0] == losses[1]


class TestTheSameResult:
    @pytest.mark.slow
    @pytest.mark.parametrize("stage", ["autoencoder", "flow"])
    def test_with_gradient_checkpointing(self, arguments, runs, fresh, stage):
        plain = arguments(stage=stage)
        pretrain(plain)
        fresh()
        saving = replace(plain, gradient_checkpointing=True, output_dir=plain.output_dir + "-saving")
        pretrain(saving)
        for name, value in runs.weights(plain.output_dir).items():
            torch.testing.assert_close(runs.weights(saving.output_dir)[name], value, atol=1e-5, rtol=1e-4)

    @pytest.mark.slow
    def test_compiled(self, arguments, runs, fresh):
        plain = arguments(stage="flow", max_steps=2)
        pretrain(plain)
        fresh()
        compiled = replace(plain, dynamo_backend="eager", output_dir=plain.output_dir + "-compiled")
        pretrain(compiled)
        assert runs.weights(plain.output_dir).keys() == runs.weights(compiled.output_dir).keys()
        # Adam makes a whole step of rounding where there is no gradient: a bias of all keys changes no attention.
        weights = {n: w for n, w in runs.weights(plain.output_dir).items() if not n.endswith("k_proj.bias")}
        for name, value in weights.items():  # two updates of up to 1e-2 each
            torch.testing.assert_close(runs.weights(compiled.output_dir)[name], value, atol=5e-4, rtol=1e-3)

    def test_from_arrow_as_from_json(self, arguments, runs, fresh, data, tmp_path):
        rows = read_rows(data / "pairs.jsonl")
        Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
        weights = []
        for name, file in {"json": data / "pairs.jsonl", "parquet": tmp_path / "pairs.parquet"}.items():
            fresh()
            settings = arguments(train_file=[str(file)], output_dir=str(tmp_path / name))
            pretrain(settings)
            weights.append(runs.weights(settings.output_dir))
        assert runs.equal(*weights)


class TestData:
    def test_a_stream_resumes_where_it_was(self, arguments, runs, fresh, data):
        options = {"streaming": True, "shuffle_buffer": 7, "bucket_batches": 2, "save_steps": 2, "max_steps": 6}
        settings = arguments(stage="flow", train_file=[str(data / "pairs.jsonl")], **options)
        pretrain(settings)
        broken = replace(settings, output_dir=settings.output_dir + "-broken")
        for steps in (4, 6):
            fresh()
            pretrain(replace(broken, max_steps=steps, resume=True))
        assert runs.equal(runs.weights(settings.output_dir), runs.weights(broken.output_dir))

    def test_a_data_set_of_the_registry(self, arguments, runs, tmp_path):
        settings = arguments(stage="flow", train_file=[], dataset=["stories"], streaming=True, dataset_rows=50)
        pretrain(settings)
        assert runs.log(settings.output_dir)[-1]["step"] == 3

    def test_nothing_to_train_on(self, arguments):
        with pytest.raises(ValueError, match="nothing to train on: give train_file or dataset"):
            pretrain(arguments(train_file=[]))

    def test_a_run_goes_on_with_the_same_rows_alone(self, arguments, runs, fresh, tmp_path):
        rows = [{"source": "Where is Mary?", "target": f"in room {number}"} for number in range(4)]
        write_rows(tmp_path / "own.jsonl", rows)
        settings = arguments(stage="flow", train_file=[str(tmp_path / "own.jsonl")], max_steps=2, save_steps=2)
        pretrain(settings)
        write_rows(tmp_path / "own.jsonl", rows[::-1])
        fresh()
        with pytest.raises(ValueError, match=r"cannot go on .* with other contents of train_file=.*own\.jsonl"):
            pretrain(replace(settings, max_steps=4, resume=True))
        write_rows(tmp_path / "own.jsonl", rows)
        fresh()
        pretrain(replace(settings, max_steps=4, resume=True))
        assert runs.log(settings.output_dir)[-1]["step"] == 4

    @pytest.mark.parametrize("field", ["vocab_size=10", "eos_token_id=5"])
    def test_what_is_the_tokenizers_can_not_be_overridden(self, arguments, field):
        with pytest.raises(ValueError, match=f"config_overrides='{field}': .* is that of the tokenizer"):
            pretrain(replace(arguments(stage="flow"), config_overrides=field))

    def test_names_and_folders_that_can_not_be(self, arguments, tmp_path):
        settings = arguments(stage="flow")
        for name in ("tokenizer", "config"):
            with pytest.raises(ValueError, match=f"--{name} 'nowhere': must be a folder or a name on the hub"):
                pretrain(replace(settings, **{name: "nowhere"}))
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match="output_dir must be a folder, and is a file"):
            pretrain(replace(settings, output_dir=str(tmp_path / "file")))

    def test_what_does_not_fit_is_counted(self, arguments, runs, tmp_path):
        row = {"source": "Mary went to the garden. " * 20 + "Where?", "target": "in the garden"}
        write_rows(tmp_path / "long.jsonl", [row])
        settings = arguments(stage="flow", train_file=[str(tmp_path / "long.jsonl")], max_source_length=16)
        pretrain(settings)
        line = runs.log(settings.output_dir)[-1]
        assert line["cut_sources"] == 3 * 4
        assert "cut_targets" not in line
        assert "skipped_rows" not in line


class TestWhatIsShown:
    def test_samples_of_every_task(self, arguments, data, capsys):
        settings = arguments(stage="flow", validation_file=[str(data / "pairs.jsonl")], save_steps=2, num_samples=2)
        pretrain(settings)
        lines = (Path(settings.output_dir) / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        assert [sample["step"] for sample in samples] == [2, 2, 3, 3]
        sources = {row["source"] for row in read_rows(data / "pairs.jsonl")}
        assert all(sample["source"].strip() in sources for sample in samples)
        assert "| task | source | target | prediction |" in capsys.readouterr().out

    def test_a_table_can_hold_anything(self):
        table = Samples([Sample("pairs", "a | b\nc", "x" * 100, "")]).as_table()
        assert table.splitlines()[-1] == f"| pairs | a \\| b c | …{'x' * 59} |  |"

    def test_tensorboard_has_every_term(self, arguments, data, runs):
        settings = arguments(stage="flow", report_to=["tensorboard"], validation_file=[str(data / "pairs.jsonl")])
        pretrain(settings)
        files = [EventAccumulator(str(path)) for path in (Path(settings.output_dir) / "runs").rglob("events*")]
        (events,) = [file for file in files if "loss" in file.Reload().Tags()["scalars"]]
        logged = {name for line in runs.log(settings.output_dir) for name in line} - {"step"}
        assert logged <= set(events.Tags()["scalars"])
        assert "samples/text_summary" in events.Tags()["tensors"]

    def test_a_tracker_that_is_not_installed(self, arguments):
        with pytest.raises(ValueError, match=r"report_to=\['aim'\]: aim is not installed"):
            pretrain(arguments(report_to=["aim"]))


@pytest.mark.parametrize(("mixed_precision", "expected"), [("bf16", "eager"), ("no", "sdpa")])
def test_bfloat16(arguments, runs, monkeypatch, mixed_precision, expected):
    """On a CPU its attention is the faster one; weights and config are saved as ever."""
    settings, found = arguments(stage="flow", mixed_precision=mixed_precision), set()
    forward = YanForFlowGeneration.forward

    def watch(model, *given, **named):
        found.add(model.config._attn_implementation)
        return forward(model, *given, **named)

    monkeypatch.setattr(YanForFlowGeneration, "forward", watch)
    pretrain(settings)
    assert found == {expected}
    assert YanForFlowGeneration.from_pretrained(settings.output_dir).config._attn_implementation == "sdpa"
    assert all(value.dtype == torch.float32 for value in runs.weights(settings.output_dir).values())


@pytest.mark.parametrize(
    ("device", "mixed_precision", "longest", "expected"),
    [
        ("cpu", "bf16", 256, "eager"),
        ("cpu", "bf16", 257, "sdpa"),
        ("cpu", "no", 8, "sdpa"),
        ("cuda", "bf16", 8, "sdpa"),
    ],
)
def test_short_sequences_in_bfloat16_on_a_cpu_attend_by_plain_products(
    tiny_model, device, mixed_precision, longest, expected
):
    choose_attention(tiny_model, torch.device(device), mixed_precision, longest)
    assert tiny_model.config._attn_implementation == expected
