"""The naive training step has the loss and the gradients of the shared one, at a higher price."""

import json

import pytest
import torch
import training_step


@pytest.fixture
def batch():
    return torch.randint(4, 64, (2, 6)), torch.randint(4, 64, (2, 8))


def loss_and_gradients(function, model, batch):
    model.zero_grad()
    loss = function(model, *batch, 3)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def test_both_forms_have_the_same_loss_and_gradients(tiny_model, batch):
    shared, naive = (loss_and_gradients(f, tiny_model, batch) for f in training_step.FORMS.values())
    assert shared.keys() == naive.keys()
    for name, tensor in shared.items():
        torch.testing.assert_close(naive[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_naive_form_encodes_the_prompt_at_every_pass_and_keeps_more(tiny_model, batch):
    calls = []
    tiny_model.model.register_forward_hook(lambda *_: calls.append(1))
    kept = {}
    for name, function in training_step.FORMS.items():
        calls.clear()
        kept[name] = training_step.kept_bytes(function, tiny_model, batch, 3)
        # once for the prompt and once for the target, and again for each of three steps and the likelihood
        assert len(calls) == {"shared": 2, "naive": 2 + 4}[name]
    assert kept["naive"] > kept["shared"] > 0


def test_the_command_writes_both_forms_of_both_variants(small_presets, tmp_path, monkeypatch):
    monkeypatch.setattr(training_step, "PRESETS", small_presets)
    output = tmp_path / "step.json"
    sizes = ["--batch_size", "2", "--prompt_length", "5", "--repeats", "2"]
    training_step.main(["--preset", "tiny", *sizes, "--output", str(output)])
    models = json.loads(output.read_text())["models"]
    assert set(models) == {"yan-transformer", "yan-mamba"}
    for forms in models.values():
        assert set(forms) == {"shared", "naive"}
        for form in forms.values():
            assert form["tokens_per_s"] == pytest.approx(2 * 13 / form["seconds"]["median"])
