"""LoRA of the peft library on the flow: training, saving, loading, merging."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from modeling_yan import YanForFlowGeneration
from modeling_yan.configuration_yan import LORA_PARAMETERS
from modeling_yan.data import train_tokenizer

peft = pytest.importorskip("peft")

PROJECTIONS = {
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    "mamba": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    | {"in_proj", "x_proj", "dt_proj", "out_proj"},
}
TEXTS = ["Where is the dog?", "The cat sat on the mat.", "John has the red apple."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=280)


@pytest.fixture
def base(make_model, tokenizer, tmp_path) -> YanForFlowGeneration:
    """A model that was loaded from a folder, as an adapter has to name its base."""
    folder = tmp_path / "base"
    make_model(vocab_size=len(tokenizer), num_encoder_layers=1, initializer_range=0.2).save_pretrained(folder)
    return YanForFlowGeneration.from_pretrained(folder)


@pytest.fixture
def batch(tokenizer):
    rows = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"][:6]} for text in TEXTS]
    return DataCollatorForSeq2Seq(tokenizer)(rows)


EVERYTHING = {"target_parameters": LORA_PARAMETERS}


def adapt(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def lively(model):
    """The same adapter with random weights in place of its zeros, so that it does something."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.filterwarnings("error::FutureWarning")
def test_every_lora_weight_gets_a_gradient(base, batch, variant):
    model = lively(adapt(base, **EVERYTHING)).train()
    assert {name.rsplit(".", 1)[-1] for name in model.targeted_module_names} == PROJECTIONS[variant]
    assert model.targeted_parameter_names == [f"flow.{name}" for name in LORA_PARAMETERS]
    model(**batch).loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * (len(model.targeted_module_names) + len(model.targeted_parameter_names))
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.abs().sum() > 0] == []


def test_the_encoder_can_be_adapted_too(base, batch, variant):
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"] if variant == "mamba" else ["q_proj", "k_proj"]
    model = lively(peft.get_peft_model(base, peft.LoraConfig(target_modules=names)))
    model(**batch).loss.backward()
    adapted = {name: weight for name, weight in model.named_parameters() if "lora" in name}
    assert any(".model.layers.0." in name for name in adapted)
    assert all(weight.grad.abs().sum() > 0 for weight in adapted.values())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [{}, EVERYTHING], ids=["layers", "layers and experts"])
def test_lora_trains_under_the_trainer_and_comes_back_from_its_folder(base, batch, tokenizer, tmp_path, targets):
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = adapt(base, **targets)
    options = {"max_steps": 6, "logging_steps": 1, "learning_rate": 2e-2, "use_cpu": True, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path / "run"), **options, save_strategy="no", disable_tqdm=True)
    rows = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"][:6]} for text in TEXTS]
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "ce_loss" in log]
    assert len(logged) == 6
    assert logged[-1]["ce_loss"] < logged[0]["ce_loss"]
    weights = {name.replace(".base_layer", ""): weight for name, weight in base.state_dict().items()}
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())

    trainer.save_model(tmp_path / "adapter")
    del batch["labels"]
    model.eval()
    expected, tokens = model(**batch).logits, model.generate(**batch)
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    plain = YanForFlowGeneration.from_pretrained(tmp_path / "base")
    for loaded in (
        peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(),
    ):
        assert [name for name, weight in loaded.named_parameters() if weight.requires_grad] == []
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)  # memory alignment
        assert torch.equal(loaded.generate(**batch), tokens)


def test_a_merged_adapter_writes_the_same(base, batch, tmp_path):
    model = lively(adapt(base, **EVERYTHING)).eval()
    del batch["labels"]
    expected, tokens = model(**batch).logits, model.generate(**batch)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    for written in (merged, YanForFlowGeneration.from_pretrained(tmp_path / "merged").eval()):
        torch.testing.assert_close(written(**batch).logits, expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(written.generate(**batch), tokens)


@pytest.mark.parametrize("fields", [{"num_experts": 1}, {"share_expert_head": True}], ids=["one expert", "one head"])
def test_an_adapter_of_a_single_head_trains_and_is_merged(make_model, fields):
    model = lively(peft.get_peft_model(make_model(**fields), peft.LoraConfig(target_parameters=LORA_PARAMETERS)))
    prompts = torch.tensor([[5, 6, 7]])
    model(prompts, labels=prompts + 3).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in model.named_parameters() if "lora" in name)
    expected = model.eval()(prompts).logits
    torch.testing.assert_close(model.merge_and_unload()(prompts).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["DoRA", "IA3", "AdaLoRA"])
def test_other_adapters_of_layers_train_and_come_back(base, batch, tmp_path, kind):
    layers = {"target_modules": ["v_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = {
        "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, task_type="CAUSAL_LM"),
        "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **layers),
        "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **layers),
    }[kind]()
    model = peft.get_peft_model(base, config).train()
    trained = [weight for _, weight in model.named_parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the first update leaves a product of zero and something as it is
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    del batch["labels"]
    model.eval().save_pretrained(tmp_path / "adapter")
    plain = YanForFlowGeneration.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.generate(**batch), model.generate(**batch))
    with model.disable_adapter():
        assert not torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_learned_prompts_are_refused(base, batch, tmp_path, kind):
    model = peft.get_peft_model(base, getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"peft_type=.*LoRA"):
        Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    if kind == "PrefixTuningConfig":
        with pytest.raises(ValueError, match="past_key_values"):
            model(**batch)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"peft_type=.*LoRA"):
        model.generate(**batch)
    with model.disable_adapter():
        assert torch.equal(model.generate(**batch), base.generate(**batch))
