"""Every baseline sees the rows of the flow stage, in its own layout, and its prompt is that of generation."""

import pytest
import torch

from modeling_yan.baselines import INPUT_ADAPTERS, make_baseline, write_targets

PAD, EOS = 0, 2


@pytest.fixture
def batch():
    return {
        "input_ids": torch.tensor([[5, 6, 7, PAD], [8, 9, PAD, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "labels": torch.tensor([[20, EOS, -100, -100], [21, 22, 23, EOS]]),
        "canvas_length": 4,
    }


def test_the_decoder_reads_source_target_and_end_without_a_gap(batch):
    inputs = INPUT_ADAPTERS["decoder"](batch, PAD)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 20, EOS, PAD, PAD, PAD], [8, 9, 21, 22, 23, EOS, PAD, PAD]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert inputs["labels"].tolist() == [
        [-100, -100, -100, 20, EOS, -100, -100, -100],
        [-100, -100, 21, 22, 23, EOS, -100, -100],
    ]


@pytest.mark.parametrize("kind", ["decoder", "decoder_conv"])
def test_the_decoders_loss_is_the_mean_over_targets_and_ends_alone(kind, batch, make_config):
    model = make_baseline(kind, make_config(attention_conv_kernel=3)).eval()
    loss = model(**INPUT_ADAPTERS[kind](batch, PAD)).loss
    rows = [([5, 6, 7], [20, EOS]), ([8, 9], [21, 22, 23, EOS])]
    terms = []
    for source, target in rows:
        log_probs = model(torch.tensor([source + target])).logits.log_softmax(-1)[0]
        terms += [-log_probs[len(source) - 1 + place, token] for place, token in enumerate(target)]
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder_decoder_conv"])
def test_the_encoder_decoders_loss_does_not_depend_on_padding(kind, batch, make_config):
    model = make_baseline(kind, make_config(attention_conv_kernel=3)).eval()
    loss = model(**INPUT_ADAPTERS[kind](batch, PAD)).loss
    logits = [
        model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0]
        for source, target in (([5, 6, 7], [20, EOS]), ([8, 9], [21, 22, 23, EOS]))
    ]
    targets = torch.tensor([20, EOS, 21, 22, 23, EOS])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(torch.cat(logits), targets))


@pytest.mark.parametrize("kind", INPUT_ADAPTERS)
def test_a_batch_trains_every_baseline(kind, batch, make_config):
    model = make_baseline(kind, make_config(attention_conv_kernel=3)).train()
    model(**INPUT_ADAPTERS[kind](batch, PAD)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", INPUT_ADAPTERS)
def test_what_a_baseline_writes_does_not_depend_on_the_padding_of_the_source(kind, batch, make_config):
    model = make_baseline(kind, make_config(initializer_range=0.3, attention_conv_kernel=3)).eval()
    written = write_targets(model, batch)
    assert written.shape == batch["labels"].shape
    for row, length in enumerate((3, 2)):
        alone = {"input_ids": batch["input_ids"][row : row + 1, :length], "labels": batch["labels"][row : row + 1]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        assert torch.equal(write_targets(model, alone)[0], written[row])
