"""Every way of computing the experts that is timed has the same outputs."""

import json
from pathlib import Path

import experts
import pytest
import torch

from modeling_yan import YanConfig


def test_all_forms_have_the_same_outputs(small_presets):
    config = YanConfig.from_pretrained(small_presets / "yan-transformer-tiny")
    calls = experts.make_calls(config, 37, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        results = {name: torch.stack(call()) for name, call in calls.items()}
    assert len(set(map(float, results["all"].flatten(1).sum(1)))) == experts.NUM_SETS
    for name, outputs in results.items():
        torch.testing.assert_close(
            outputs, results["all"], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_another_checkout_is_measured_with_the_same_weights(small_presets, tmp_path, monkeypatch):
    config, root = YanConfig.from_pretrained(small_presets / "yan-transformer-tiny"), Path(__file__).parents[2]
    before = experts.experts_of(root)
    assert before is not experts.YanExperts
    calls = experts.make_calls(config, 37, torch.device("cpu"), torch.float32, before)
    with torch.no_grad():
        for outputs in zip(*(calls[name]() for name in ("before", "package")), strict=True):
            torch.testing.assert_close(*outputs)
    monkeypatch.setattr(experts, "PRESETS", small_presets)
    output = tmp_path / "experts.json"
    words = ["--preset", "tiny", "--tokens", "5", "--repeats", "3", "--num_experts", "1", "--backward"]
    experts.main([*words, "--before", str(root), "--output", str(output)])
    content = json.loads(output.read_text())
    assert content["tokens"]["5"].keys() == {"before", "package"}
    assert content["package / before"]["5"] > 0


def test_the_command_writes_every_form(small_presets, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "PRESETS", small_presets)
    arguments = [
        "--preset",
        "tiny",
        "--tokens",
        "5",
        "9",
        "--repeats",
        "2",
        "--output",
        str(tmp_path / "experts.json"),
    ]
    experts.main(arguments)
    content = json.loads((tmp_path / "experts.json").read_text())
    assert list(content["tokens"]) == ["5", "9"]
    for results in content["tokens"].values():
        assert results.keys() == experts.FORMS.keys()
        assert all(len(seconds["all"]) == 2 for seconds in results.values())


def test_an_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit):
        experts.main(["--preset", "huge"])
    assert "huge" in capsys.readouterr().err
