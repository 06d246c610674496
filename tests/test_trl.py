"""TRL's own SFTTrainer trains the flow on rows of prompt and completion."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from modeling_yan.clients_yan import token_output
from modeling_yan.configuration_yan import LORA_PARAMETERS
from modeling_yan.data import CompletionCollator, FlowCollator, train_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "Where is Mary?", "completion": " Mary is in the kitchen."},
    {"prompt": "Where is the apple?", "completion": " In the garden."},
    {"prompt": "Who has the milk?", "completion": " John."},
]
SMALL = {"num_encoder_layers": 1, "num_flow_layers": 1, "canvas_length": 12}


@pytest.fixture
def variant():
    """TRL knows nothing of mixers."""
    return "both"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["prompt"] + row["completion"] for row in ROWS] * 4, vocab_size=320)


@pytest.fixture
def model(make_model, tokenizer):
    return make_model(vocab_size=len(tokenizer), **SMALL)


def make_trainer(model, tokenizer, tmp_path, collator=CompletionCollator, **options):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1, "learning_rate": 1e-2}
    defaults |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    peft_config, rows = options.pop("peft_config", None), datasets.Dataset.from_list(options.pop("rows", ROWS))
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), **{**defaults, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator and collator(tokenizer, max_source_length=16, canvas_length=12),
        peft_config=peft_config,
    )


def test_the_collator_gives_the_pairs_that_the_trainer_was_given(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path, shuffle_dataset=False)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(ROWS))])
    pairs = [{"source": row["prompt"], "target": row["completion"]} for row in ROWS]
    for row in pairs:  # a completion's first word begins with a space, as it does inside a text
        row["target"] = tokenizer("." + row["target"])["input_ids"][len(tokenizer(".")["input_ids"]) :]
    expected = FlowCollator(tokenizer, max_source_length=16, canvas_length=12)(pairs)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.slow
def test_sft_minimises_the_objective_of_the_flow(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path, max_steps=30)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        expected = model.eval()(**batch)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert metrics["eval_ce_loss"] == pytest.approx(expected.ce_loss.item(), rel=1e-4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    moved = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {"model", "flow", "decoder", "lm_head"}


def test_batches_for_causal_models_are_refused(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path, collator=None)
    with pytest.raises(ValueError, match="CompletionCollator"):
        trainer.train()


@pytest.mark.slow
def test_sft_makes_the_updates_of_the_plain_trainer(make_model, tokenizer, tmp_path):
    sft = make_trainer(make_model(vocab_size=len(tokenizer), **SMALL), tokenizer, tmp_path)
    sft.train()
    plain = Trainer(make_model(vocab_size=len(tokenizer), **SMALL), sft.args, sft.data_collator, sft.train_dataset)
    plain.train()
    weights = sft.model.state_dict()
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight)


def test_a_saved_model_writes_the_same(model, tokenizer, tmp_path):
    trainer = make_trainer(model, tokenizer, tmp_path)
    trainer.train()
    trainer.save_model()
    prompts = tokenizer([row["prompt"] for row in ROWS], return_tensors="pt", padding=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**prompts).logits, model.eval()(**prompts).logits)
    assert torch.equal(loaded.generate(**prompts), model.generate(**prompts))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulation_leaves_the_logged_loss_alone(make_model, tokenizer, tmp_path, accumulation):
    model = make_model(vocab_size=len(tokenizer), **SMALL)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trainer = make_trainer(model, tokenizer, tmp_path, **options)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["ce_loss"] + log["mse_loss"] + log["nll_loss_per_dim"], rel=0.02)


def test_sft_trains_a_lora_adapter(model, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = peft.LoraConfig(target_parameters=LORA_PARAMETERS, init_lora_weights=False)
    trainer = make_trainer(model, tokenizer, tmp_path, peft_config=config)
    start = {name: weight.clone() for name, weight in trainer.model.named_parameters() if "lora" in name}
    trainer.train()
    assert "nll_loss_per_dim" in trainer.state.log_history[0]
    weights = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())
    assert sum("experts" in name for name in start) == 2 * 2
    assert not any(weight.equal(start[name]) for name, weight in trainer.model.named_parameters() if "lora" in name)


def test_token_scores_follow_the_targets_wherever_their_padding_is():
    loss = torch.tensor(1.5)
    for labels, first in (([[3, 1, -100], [2, -100, -100]], [0, 0]), ([[-100, 3, 1], [-100, -100, 2]], [1, 2])):
        logits, mask = torch.zeros(2, 3, 4), torch.tensor(labels) != -100
        logits[range(2), first, 3] = 100.0  # the first token is certain, the others are uniform over four
        scores = token_output(loss, logits, torch.tensor(labels))
        assert torch.equal(scores.label_mask, mask)
        assert scores.is_top1[mask].tolist() == [True, False, False]
        assert (-scores.log_probs.sum() / scores.label_mask.sum()).item() == pytest.approx(1.5)
        torch.testing.assert_close(scores.entropy[mask], torch.tensor([0.0, 1.3863, 0.0]), atol=1e-4, rtol=0)
        assert not scores.entropy[~mask].any()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"input_ids": [5, 6], "labels": [5]}, "of one length"),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}, "has no label"),
        ({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, "assistant_only_loss=True"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        CompletionCollator(tokenizer, max_source_length=8, canvas_length=8)([row])


def test_a_row_without_prompt_gets_a_bos(tokenizer):
    collator = CompletionCollator(tokenizer, max_source_length=8, canvas_length=8, allow_no_prompts=True)
    (target,) = tokenizer(["a cat"])["input_ids"]
    ids = [*target, tokenizer.eos_token_id]
    batch = collator([{"input_ids": ids, "labels": ids}])
    assert batch["input_ids"][batch["attention_mask"].bool()].tolist() == [tokenizer.bos_token_id]
    assert batch["labels"][batch["labels"] != -100].tolist() == ids


@pytest.mark.parametrize("space", ["", " "])
def test_a_completion_has_the_tokens_that_its_text_has_alone(model, tokenizer, tmp_path, space):
    rows = [{**row, "completion": space + row["completion"].strip()} for row in ROWS]
    trainer = make_trainer(model, tokenizer, tmp_path, rows=rows, shuffle_dataset=False)
    batch = trainer.data_collator(list(trainer.train_dataset))
    pairs = [{"source": row["prompt"], "target": row["completion"].strip()} for row in rows]
    expected = FlowCollator(tokenizer, max_source_length=16, canvas_length=12)(pairs)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_half_a_character_stays_as_it_is(tokenizer):
    """As where TRL cuts a row at its `max_length`."""
    half = tokenizer.convert_tokens_to_ids("Ã")
    batch = CompletionCollator(tokenizer, 8, 8)([{"input_ids": [9, half], "labels": [-100, half]}])
    assert batch["labels"].tolist() == [[half, tokenizer.eos_token_id, -100, -100]]


CHAT = (
    "{% for message in messages %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% else %}{{ ' ' + message['content'] + ' ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def chat(*contents) -> dict:
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_chats_are_one_pair_a_turn_or_refused(model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    rows = [
        chat("Where is Mary?", "In the garden.", "Who has the milk?", "John."),
        chat("Who has the apple?", "Mary."),
    ]
    options = {"rows": rows, "shuffle_dataset": False}
    trainer = make_trainer(model, tokenizer, tmp_path, **options, assistant_only_loss=True)
    trainer.data_collator = CompletionCollator(tokenizer, max_source_length=40, canvas_length=12)
    batch = trainer.data_collator(list(trainer.train_dataset))
    first = "user: Where is Mary? assistant:"
    sources = [
        first,
        first + " In the garden.</s>user: Who has the milk? assistant:",
        "user: Who has the apple? assistant:",
    ]
    targets = ["In the garden.", "John.", "Mary."]
    pairs = [{"source": source, "target": target} for source, target in zip(sources, targets, strict=True)]
    expected = FlowCollator(tokenizer, max_source_length=40, canvas_length=12)(pairs)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="assistant_only_loss=True"):
        make_trainer(model, tokenizer, tmp_path, **options).train()
