"""The model card beside saved weights: what it says, and whose card stays."""

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import BertConfig, BertForMaskedLM

from modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel
from modeling_yan.cards_yan import OWN, YanModelCard, write_card
from modeling_yan.commands.info import _words
from modeling_yan.data import train_tokenizer


@pytest.mark.parametrize(
    ("model_class", "task", "auto_class"),
    [
        (YanForFlowGeneration, "text-generation", "AutoModelForCausalLM"),
        (YanForAutoencoding, "fill-mask", "AutoModelForMaskedLM"),
        (YanModel, "feature-extraction", "AutoModel"),
    ],
)
def test_a_saved_model_has_a_card_with_what_its_config_knows(make_model, tmp_path, model_class, task, auto_class):
    make_model(model_class).save_pretrained(tmp_path / "my-model")
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert (card.data.get("library_name"), card.data.pipeline_tag) == ("transformers", task)
    assert card.data.base_model is None
    assert "# my-model" in card.text
    assert f'{auto_class}.from_pretrained("my-model", trust_remote_code=True, revision="COMMIT")' in card.text
    assert 'AutoTokenizer.from_pretrained("my-model", trust_remote_code=True, revision="COMMIT")' in card.text
    assert "Prompts have at most 48 tokens. The model generates 8 tokens at once" in card.text


def test_a_first_card_is_written_without_a_warning(make_model, tmp_path, caplog):
    make_model().save_pretrained(tmp_path)
    assert "card" not in caplog.text


def test_the_card_says_what_it_was_told(make_model, tmp_path):
    model = make_model()
    model.model_card = YanModelCard("mit", "en", ["owner/rows"], ["exact_match"], "questions.", {"rows": 0.5}, "All.")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    told = (card.data.license, card.data.language, card.data.datasets, card.data.metrics)
    assert told == ("mit", "en", ["owner/rows"], ["exact_match"])
    assert "| rows | 0.5 |" in card.text
    assert _words(str(tmp_path)) == {"prompt form": "questions.", "licence": "mit"}
    assert not make_model().model_card.results  # every model has its own


def test_the_python_of_the_card_runs(make_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(vocab_size=300).save_pretrained("my-model")
    train_tokenizer(["Where is the apple?"] * 4, vocab_size=300).save_pretrained("my-model")
    code = ModelCard.load("my-model/README.md").text.split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert capsys.readouterr().out


def test_a_persons_card_stays_and_the_packages_own_is_written_anew(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    model.model_card.limits = "Knows nothing."
    model.save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert "Knows nothing." in written
    edited = written.replace(OWN, "") + "\nMine.\n"
    (tmp_path / "README.md").write_text(edited)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == edited


def test_a_card_keeps_what_was_said_but_for_scores(make_model, tmp_path):
    model = make_model()
    model.model_card = YanModelCard("mit", "en", ["owner/rows"], ["exact_match"], "two\nlines.", {"rows": 0.5}, "All.")
    model.generation_config.num_flow_steps = 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    again.model_card.limits = "None."
    again.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["owner/rows"])
    assert card.data.metrics is None
    assert "| rows | 0.5 |" not in card.text
    assert "Prompts: two\nlines.\n" in card.text
    assert "## Limits\n\nNone.\n" in card.text
    assert "num_flow_steps=1, " in card.text


def test_an_empty_card_of_transformers_is_replaced_and_its_tags_stay(make_model, tmp_path, monkeypatch):
    from transformers.utils import hub

    def missing(*_, **__):
        raise EntryNotFoundError("no card")

    monkeypatch.setattr(hub.ModelCard, "load", missing)
    hub.create_and_tag_model_card("somebody/model", ["small"]).save(tmp_path / "README.md")
    monkeypatch.undo()
    write_card(make_model(), tmp_path, "somebody/model")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["yan", "flow-matching", "non-autoregressive", "small"]
    assert 'from_pretrained("somebody/model")' in card.text


def test_only_the_main_process_writes_it(make_model, tmp_path):
    make_model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("is_on_the_hub", [True, False])
def test_the_encoder_of_the_hub_is_the_base_model(tmp_path, monkeypatch, is_on_the_hub):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Where is the apple?"] * 4, vocab_size=300)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=300, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    if is_on_the_hub:  # as if the folder's name were that of a repository: nothing lies there under this name
        monkeypatch.setattr("modeling_yan.pretrained_yan.os.path.exists", lambda _: False)
    model = YanForFlowGeneration.from_encoder_pretrained(str(tmp_path / "bert"))
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "new")
    again = YanForFlowGeneration.from_pretrained(tmp_path / "new")
    name = str(tmp_path / "bert") if is_on_the_hub else None
    assert again.config.encoder_name == name
    assert ModelCard.load(tmp_path / "new" / "README.md").data.base_model == name


@pytest.mark.parametrize("sizes", [("1GB", "5KB"), ("5KB", "1GB"), ("5KB", "8KB")], ids=["shards", "single", "fewer"])
def test_weights_saved_over_those_of_another_form_are_those_that_load(make_model, tmp_path, sizes):
    model = make_model()
    for size in sizes:
        with torch.no_grad():
            model.lm_head.bias += 1
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.bias, model.lm_head.bias)
    is_single = sizes[-1] == "1GB"
    assert (tmp_path / "model.safetensors").exists() == is_single
    assert (tmp_path / "model.safetensors.index.json").exists() != is_single
