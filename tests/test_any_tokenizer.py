"""Tokenizers of other makes: what they lack is added, a model is fitted to them, and all of it runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, T5Tokenizer, pipeline

from modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel
from modeling_yan.data import AutoencoderCollator, FlowCollator, prepare_tokenizer
from modeling_yan.training import fit_to_tokenizer
from modeling_yan.training.sampler import TaskSampler

BUNDLED = Path(__file__).parents[1] / "examples" / "checkpoints" / "yan-transformer-tiny"
TEXTS = [
    f"{name} went to the {place}. The dog saw {name} there."
    for name in ("Mary", "John", "Ann")
    for place in ("kitchen", "garden", "red house")
]
PAIRS = [{"source": f"{text} Who went there?", "target": text.split()[0]} for text in TEXTS]
ROLES = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")


def train(model, splitter, trainer, texts=TEXTS):
    """The trained part of a backend tokenizer, as a dictionary."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())["model"]


def make_gpt2():
    """Byte-level BPE with one special token, neither pad nor mask."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained = train(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    return GPT2Tokenizer(vocab=trained["vocab"], merges=[tuple(merge) for merge in trained["merges"]])


def make_bert():
    """WordPiece, which puts [CLS] before a prompt and [SEP] behind it, and has neither BOS nor EOS."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    splitter = pre_tokenizers.BertPreTokenizer()
    trained = train(models.WordPiece(unk_token="[UNK]"), splitter, trainer, [text.lower() for text in TEXTS])
    return BertTokenizer(vocab=trained["vocab"])


def make_t5():
    """SentencePiece's Unigram, which puts an EOS behind a prompt and has neither BOS nor mask."""
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained = train(models.Unigram(), pre_tokenizers.Metaspace(), trainer)
    return T5Tokenizer(vocab=[tuple(piece) for piece in trained["vocab"]], extra_ids=0)


MAKES = {"gpt2": make_gpt2, "bert": make_bert, "t5": make_t5}
NUM_ADDED = {"gpt2": 2, "bert": 0, "t5": 2}


@pytest.fixture(scope="module", params=MAKES)
def make(request):
    return request.param


@pytest.fixture(scope="module")
def plain(make):
    """The tokenizer as it comes."""
    return MAKES[make]()


@pytest.fixture(scope="module")
def tokenizer(plain):
    """The same, prepared."""
    tokenizer = copy.deepcopy(plain)
    prepare_tokenizer(tokenizer)
    return tokenizer


class TestPrepareTokenizer:
    def test_what_is_missing_is_added_once(self, make, plain):
        tokenizer, size = copy.deepcopy(plain), len(plain)
        assert prepare_tokenizer(tokenizer) == NUM_ADDED[make] == len(tokenizer) - size
        assert prepare_tokenizer(tokenizer) == 0
        ids = {role: getattr(tokenizer, role) for role in ROLES}
        assert None not in ids.values()
        assert ids["mask_token_id"] not in (ids["pad_token_id"], ids["eos_token_id"], ids["bos_token_id"])
        assert set(ids.values()) <= set(tokenizer.all_special_ids)

    def test_a_separator_serves_as_eos(self):
        tokenizer = make_bert()
        prepare_tokenizer(tokenizer)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("[CLS]", "[SEP]")

    def test_texts_are_encoded_as_before(self, plain, tokenizer):
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == [plain(text)["input_ids"] for text in TEXTS]
        assert set(tokenizer(TEXTS[0])) == {"input_ids", "attention_mask"}

    def test_masks_are_single_tokens_inside_a_text(self, tokenizer):
        ids = tokenizer(f"the {tokenizer.mask_token} dog {tokenizer.mask_token * 2}.")["input_ids"]
        assert ids.count(tokenizer.mask_token_id) == 3
        assert tokenizer.mask_token not in tokenizer.decode(ids, skip_special_tokens=True)

    def test_it_survives_saving(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert [getattr(loaded, role) for role in ROLES] == [getattr(tokenizer, role) for role in ROLES]
        text = f"{TEXTS[0]} {tokenizer.mask_token}"
        assert dict(loaded(text)) == dict(tokenizer(text))

    def test_the_projects_own_needs_nothing(self):
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        before = tokenizer(TEXTS[0])["input_ids"]
        assert prepare_tokenizer(tokenizer) == 0
        assert tokenizer(TEXTS[0])["input_ids"] == before


class TestBatches:
    def test_the_source_is_encoded_as_the_prompt_is(self, tokenizer):
        batch = FlowCollator(tokenizer, 96, 16)(PAIRS)
        for row, ids, mask, labels in zip(PAIRS, batch["input_ids"], batch["attention_mask"], batch["labels"]):
            assert ids[mask.bool()].tolist() == tokenizer(row["source"])["input_ids"]
            target = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
            assert labels[labels != -100].tolist() == [*target, tokenizer.eos_token_id]

    def test_the_answer_slot_may_stand_behind_a_bos(self, make, tokenizer):
        source = tokenizer.mask_token * 6 + " " + TEXTS[0]
        batch = AutoencoderCollator(tokenizer, 96)([{"source": source, "target": "Mary"}])
        target = tokenizer("Mary", add_special_tokens=False)["input_ids"]
        answer = target + [tokenizer.eos_token_id] * (6 - len(target))
        start = 1 if make == "bert" else 0
        labels = batch["labels"][0].tolist()
        assert labels == [-100] * start + answer + [-100] * (len(labels) - start - 6)
        prompt = tokenizer(source)["input_ids"]
        assert batch["input_ids"][0, : len(prompt)].tolist() == prompt


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
class TestFitToTokenizer:
    @pytest.fixture
    def fit(self, make_model, plain, tokenizer, tie_word_embeddings):
        """Function from a model class to a model of the plain tokenizer's size, its copy before, and the new rows."""

        def fit(model_class=YanForFlowGeneration, **overrides):
            overrides = {"vocab_size": len(plain), "tie_word_embeddings": tie_word_embeddings, **overrides}
            model = make_model(model_class, **overrides)
            if model_class is not YanModel:
                torch.nn.init.normal_(model.lm_head.bias)
            before = copy.deepcopy(model)
            return model, before, fit_to_tokenizer(model, tokenizer)

        return fit

    @pytest.fixture
    def variant(self):
        return "attention"

    @pytest.mark.parametrize("model_class", [YanModel, YanForAutoencoding, YanForFlowGeneration])
    def test_old_rows_stay_and_new_ones_are_average(self, fit, make, model_class, tokenizer):
        model, before, num_new = fit(model_class)
        assert num_new == NUM_ADDED[make]
        assert model.config.vocab_size == len(tokenizer)
        assert tokenizer.model_max_length == model.config.max_prompt_length
        matrices = [(model.get_input_embeddings().weight, before.get_input_embeddings().weight)]
        if model_class is not YanModel:
            matrices.append((model.lm_head.weight, before.lm_head.weight))
            assert torch.equal(model.lm_head.bias[: len(before.lm_head.bias)], before.lm_head.bias)
            assert model.lm_head.bias[len(before.lm_head.bias) :].tolist() == pytest.approx(
                [before.lm_head.bias.mean().item()] * num_new
            )
            assert model.lm_head.out_features == len(model.lm_head.bias) == len(tokenizer)
        for weight, old in matrices:
            assert torch.equal(weight[: len(old)], old)
            new = (weight[len(old) :] - old.mean(0)) / old.std(0)
            assert not num_new or 0.7 < new.std() < 1.3
            assert len(weight) == len(tokenizer)

    def test_ties_and_freezes_stay(self, fit, tie_word_embeddings):
        for frozen in (True, False):
            switches = dict.fromkeys(("freeze_encoder", "freeze_decoder", "freeze_embeddings"), frozen)
            model, before, _ = fit(**switches)
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie_word_embeddings
            flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
            assert flags == {name: parameter.requires_grad for name, parameter in before.named_parameters()}

    def test_configs_know_the_special_tokens(self, fit, tokenizer):
        model, _, _ = fit()
        assert [getattr(model.config, role) for role in ROLES] == [getattr(tokenizer, role) for role in ROLES]
        for role in ("pad_token_id", "bos_token_id", "eos_token_id"):
            assert getattr(model.generation_config, role) == getattr(tokenizer, role)

    def test_outputs_for_old_tokens_stay(self, fit, tokenizer):
        model, before, num_new = fit()
        ids = torch.arange(5, 20).view(1, -1)
        logits, old = (m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (model, before))
        torch.testing.assert_close(logits[..., : old.shape[-1]], old)
        assert logits.shape[-1] == old.shape[-1] + num_new

    def test_it_survives_saving(self, fit, tie_word_embeddings, tmp_path):
        model, _, _ = fit()
        model.save_pretrained(tmp_path)
        loaded = YanForFlowGeneration.from_pretrained(tmp_path)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert loaded.config.mask_token_id == model.config.mask_token_id
        assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id

    def test_it_follows_its_seed_alone(self, make_model, plain, tokenizer, tie_word_embeddings):
        weights = []
        for global_seed, seed in ((0, 0), (1, 0), (0, 1)):
            model = make_model(vocab_size=len(plain), tie_word_embeddings=tie_word_embeddings)
            torch.manual_seed(global_seed)
            fit_to_tokenizer(model, tokenizer, seed=seed)
            weights.append(model.lm_head.weight)
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2]) == (len(plain) == len(tokenizer))

    def test_a_larger_vocabulary_stays(self, fit):
        model, _, num_new = fit(vocab_size=512)
        assert num_new == 0
        assert model.config.vocab_size == len(model.lm_head.weight) == 512


def test_fitting_needs_a_prepared_tokenizer(make_model):
    tokenizer = make_gpt2()
    with pytest.raises(ValueError, match="no pad_token_id, mask_token_id: call prepare_tokenizer"):
        fit_to_tokenizer(make_model(vocab_size=len(tokenizer)), tokenizer)


class TestEndToEnd:
    @pytest.fixture
    def sizes(self, tokenizer):
        special = {role: getattr(tokenizer, role) for role in ROLES}
        return {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "canvas_length": 16, **special}

    @pytest.mark.parametrize("stage", ["autoencoder", "flow"])
    def test_both_stages_learn(self, make_model, tokenizer, sizes, stage):
        model_class = {"autoencoder": YanForAutoencoding, "flow": YanForFlowGeneration}[stage]
        model = make_model(model_class, **sizes).train()
        rows = [{"text": text} for text in TEXTS] + PAIRS
        mixture = TaskSampler(rows, tokenizer, model.config, stage, batch_size=4, length=3, seed=0)
        for batch in mixture:
            loss = model(**batch).loss
            loss.backward()
            assert torch.isfinite(loss)
        assert model.get_input_embeddings().weight.grad.abs().sum() > 0

    def test_generation_reads_and_writes_text(self, make_model, tokenizer, sizes, tmp_path):
        model = make_model(**sizes)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        prompts = [row["source"] for row in PAIRS[:3]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt")
        sequences = model.generate(**batch, max_new_tokens=20)
        assert torch.equal(sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        written = pipeline("text-generation", model=str(tmp_path))(prompts, return_full_text=False, max_new_tokens=20)
        expected = tokenizer.batch_decode(sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert [output[0]["generated_text"] for output in written] == expected
