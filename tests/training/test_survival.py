"""Runs that are killed at any moment go on, and end bit for bit as a run that was never broken."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from modeling_yan.training import pretrain
from modeling_yan.training.checkpoints import LOCK, list_checkpoints

NUM_KILLS = 20


@pytest.fixture
def variant():
    """Files know nothing of mixers."""
    return "both"


def state_of(folder) -> dict:
    """Optimizer, schedule and average of the newest checkpoint."""
    state = list_checkpoints(folder)[-1] / "state"
    names = ("optimizer.bin", "custom_checkpoint_0.pkl", "average_0.pt")
    return {name: torch.load(state / name, weights_only=True) for name in names}


def losses_of(runs, folder) -> list[tuple]:
    return [(line["step"], line.get("loss"), line.get("grad_norm")) for line in runs.log(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "stage"), [("attention", "flow"), ("mamba", "autoencoder")])
def test_a_run_that_is_killed_twenty_times(arguments, runs, stage, tmp_path):
    options = {"max_steps": 150, "save_steps": 3, "logging_steps": 5, "ema_decay": 0.9}
    unbroken = arguments(stage=stage, gradient_accumulation_steps=2, **options)
    pretrain(unbroken)
    workers = {"dataloader_num_workers": 1 if stage == "flow" else 0}  # which a kill leaves behind, to end themselves
    killed = replace(unbroken, output_dir=str(tmp_path / "killed"), resume=True, **workers)
    (tmp_path / "settings.json").write_text(json.dumps(asdict(killed)))
    script = Path(__file__).with_name("kill_runs.py")
    result = runs.command(script, tmp_path / "settings.json", NUM_KILLS, home=tmp_path)
    kills = json.loads(result.stdout)
    assert len(kills["steps"]) == NUM_KILLS
    assert kills["steps"] == sorted(kills["steps"])  # nothing that was saved is ever lost
    assert kills["num_in_save"] >= 3
    assert runs.equal(runs.weights(unbroken.output_dir), runs.weights(killed.output_dir))
    torch.testing.assert_close(state_of(unbroken.output_dir), state_of(killed.output_dir), rtol=0, atol=0)
    assert losses_of(runs, unbroken.output_dir) == losses_of(runs, killed.output_dir)


@pytest.fixture
def interrupted(arguments):
    """Settings of a run of 6 updates that has come to its checkpoint after 4."""
    settings = arguments(stage="flow", max_steps=6, save_steps=2, ema_decay=0.9)
    pretrain(replace(settings, max_steps=4))
    return settings


class TestResuming:
    def test_what_a_checkpoint_holds_loads_like_a_model(self, interrupted, runs):
        folder = Path(interrupted.output_dir)
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
        assert runs.equal(runs.weights(folder), runs.weights(folder / "checkpoint-4"))
        assert not runs.equal(runs.weights(folder), runs.weights(folder / "checkpoint-2"))

    def test_only_the_newest_checkpoints_are_kept(self, arguments):
        settings = arguments(max_steps=5, save_steps=1, save_total_limit=3)
        pretrain(settings)
        names = [path.name for path in list_checkpoints(settings.output_dir)]
        assert names == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]

    def test_a_longer_run_goes_on_from_a_shorter_one(self, interrupted, runs, fresh):
        fresh()
        pretrain(replace(interrupted, resume=True))
        fresh()
        unbroken = replace(interrupted, output_dir=interrupted.output_dir + "-unbroken")
        pretrain(unbroken)
        assert runs.equal(runs.weights(interrupted.output_dir), runs.weights(unbroken.output_dir))
        assert losses_of(runs, interrupted.output_dir) == losses_of(runs, unbroken.output_dir)

    def test_the_halves_of_a_checkpoint_are_not_taken_for_one(self, interrupted, fresh):
        fresh()
        folder = Path(interrupted.output_dir)
        (folder / ".unfinished-6").mkdir()
        (folder / ".unfinished-6" / "model.safetensors").write_bytes(b"half")
        (folder / ".unfinished-9-config.json").write_bytes(b"half")
        pretrain(replace(interrupted, resume=True))
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]
        assert not list(folder.glob(".unfinished-*"))

    def test_a_run_with_nothing_to_go_on_from_starts(self, arguments):
        settings = arguments(resume=True)
        pretrain(settings)
        assert list_checkpoints(settings.output_dir)

    def test_another_run_is_not_overwritten(self, interrupted, fresh):
        fresh()
        with pytest.raises(FileExistsError, match=r"holds checkpoint-4: go on with --resume, or choose another"):
            pretrain(interrupted)

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"per_device_train_batch_size": 2}, {"max_words": 5}, {"config_overrides": "init_noise=0.5"}],
    )
    def test_other_batches_are_refused(self, interrupted, fresh, change):
        fresh()
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=rf"with {name}={value} \(was .*the batches or the model would be others"):
            pretrain(replace(interrupted, resume=True, **change))

    def test_other_files_of_a_pattern_are_refused(self, arguments, fresh, tmp_path):
        (tmp_path / "a.txt").write_text("The dog slept.\n")
        settings = arguments(train_file=[str(tmp_path / "*.txt")], max_steps=1, save_steps=1)
        pretrain(settings)
        fresh()
        (tmp_path / "b.txt").write_text("It was dark.\n")
        with pytest.raises(ValueError, match=r"other contents of train_file=.*\*\.txt"):
            pretrain(replace(settings, resume=True, max_steps=2))


class TestFolder:
    def test_one_that_another_process_trains_into_is_refused(self, interrupted, fresh, runs, tmp_path):
        fresh()
        code = (
            "import fcntl, sys\n"
            "with open(sys.argv[1], 'a') as lock:\n"
            "    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB); print('claimed', flush=True); sys.stdin.read()"
        )
        words = [sys.executable, "-c", code, Path(interrupted.output_dir) / LOCK]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"claimed\n"
            with pytest.raises(OSError, match="another process is training into this folder"):
                pretrain(replace(interrupted, resume=True))
            other.kill()  # a process that is dead claims nothing
        fresh()
        pretrain(replace(interrupted, resume=True))
        assert list_checkpoints(interrupted.output_dir)[-1].name == "checkpoint-6"

    def test_one_that_cannot_be_written_to_is_refused_before_training(self, interrupted, monkeypatch, fresh):
        fresh()
        monkeypatch.setattr(Path, "open", refuse_to_write)  # the tests may run as root, who can write anywhere
        with pytest.raises(PermissionError, match=interrupted.output_dir):
            pretrain(replace(interrupted, resume=True))


def refuse_to_write(path, mode="r", *args, **kwargs):
    if set(mode) & set("wax"):
        raise PermissionError(13, "Permission denied", str(path))
    return open(path, mode, *args, **kwargs)


class TestFullDisk:
    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [20_000, 200_000])
    def test_the_last_good_checkpoint_stays(self, interrupted, runs, tmp_path, limit):
        """Files may not grow beyond `limit` bytes, as if the disk were full: some writer fails for real."""
        settings = replace(interrupted, resume=True)
        (tmp_path / "settings.json").write_text(json.dumps(asdict(settings)))
        code = (
            "import json, resource, sys; from modeling_yan.training import *; from pathlib import Path;"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
            "pretrain(PretrainingArguments(**json.loads(Path(sys.argv[1]).read_text())))"
        )
        result = runs.command("-c", code, tmp_path / "settings.json", home=tmp_path, check=False)
        assert "checkpoint-6 could not be written" in result.stderr
        assert "checkpoint-4 is the last good one" in result.stderr
        folder = Path(settings.output_dir)
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
        assert not list(folder.glob(".unfinished-*"))
        assert runs.weights(folder / "checkpoint-4")
