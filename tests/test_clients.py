"""Clients that no other file tests, used as a person would: each gives the right result, or says why not.

docs/clients.md lists all of them, with the test of each.
"""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "examples" / "checkpoints"
FOLDERS = {"attention": CHECKPOINTS / "yan-transformer-tiny", "mamba": CHECKPOINTS / "yan-mamba-tiny"}
QUESTION = "Where is the apple? Mary went to the kitchen. Mary took the apple."
ANSWER = "The apple is in the kitchen."


@pytest.fixture
def folder(variant):
    return str(FOLDERS[variant])


class TestPipelines:
    def test_a_chat_gets_an_answer(self, folder):
        chat = [{"role": "user", "content": QUESTION}]
        (answer,) = pipeline("text-generation", model=folder)(chat)
        assert answer["generated_text"] == [*chat, {"role": "assistant", "content": ANSWER}]

    def test_rows_of_a_data_set_come_in_order(self, folder):
        write = pipeline("text-generation", model=folder, return_full_text=False)
        prompts = [QUESTION, QUESTION.replace("kitchen", "garden"), QUESTION.replace("apple", "hat")]
        alone = [write(prompt)[0]["generated_text"] for prompt in prompts]
        data = KeyDataset(Dataset.from_dict({"text": prompts}), "text")
        rows = [answer[0]["generated_text"] for answer in write(data, batch_size=2)]
        assert rows == alone
        assert rows[0] == ANSWER
        assert len(set(rows)) == len(prompts)

    def test_features_are_the_latents(self, folder):
        tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
        (features,) = pipeline("feature-extraction", model=folder)(QUESTION)
        expected = encoder(**tokenizer(QUESTION, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(features), expected, rtol=1e-4, atol=1e-4)

    def test_a_mask_is_filled_by_the_autoencoder(self, folder):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
        text = f"Mary went to the {tokenizer.mask_token}."
        found = pipeline("fill-mask", model=folder)(text, top_k=3)
        inputs = tokenizer(text, return_tensors="pt")
        place = inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)
        expected = model(**inputs).logits[0, place].softmax(-1).topk(3)
        assert [each["token"] for each in found] == expected.indices.tolist()
        assert [each["score"] for each in found] == pytest.approx(expected.values.tolist(), rel=1e-3)

    @pytest.mark.parametrize("task", ["text-classification", "token-classification"])
    def test_tasks_without_a_class_are_refused(self, folder, task):
        with pytest.raises(ValueError, match=r"Could not load model .* with any of the following classes"):
            pipeline(task, model=folder)


def test_sentence_transformers_gives_the_mean_of_the_latents(folder):
    library = pytest.importorskip("sentence_transformers")
    texts = [QUESTION, "Mary."]
    vectors = library.SentenceTransformer(folder, device="cpu").encode(texts)
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    states, mask = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state, inputs.attention_mask.unsqueeze(-1)
    expected = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(torch.tensor(vectors), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["attention"])
def test_the_harness_names_both_lengths_where_an_answer_may_be_too_long(folder):
    library = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    harness = library.HFLM(pretrained=folder, device="cpu")
    with pytest.raises(AssertionError, match=r"256.*128"):
        harness.generate_until([instance("generate_until", {}, (QUESTION, {"until": ["\n"]}), 0)])
    short = (QUESTION, {"until": ["\n"], "max_gen_toks": 32})
    assert harness.generate_until([instance("generate_until", {}, short, 0)]) == [ANSWER]


@pytest.mark.parametrize("variant", ["attention"])
class TestAttentionImplementations:
    @pytest.mark.parametrize("name", ["eager", "sdpa"])
    def test_these_write_the_same(self, folder, name):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = model.generate(**tokenizer(QUESTION, return_tensors="pt"), return_prompt=False)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == ANSWER

    def test_one_that_is_not_installed_is_refused(self, folder):
        with pytest.raises(ImportError, match="FlashAttention"):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")

    def test_one_that_is_none_is_refused(self, folder):
        with pytest.raises(ValueError, match="attn_implementation"):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="other")


@pytest.mark.parametrize("variant", ["attention"])
def test_transformers_serve_does_not_find_a_class_of_remote_code(folder):
    serving = pytest.importorskip("transformers.cli.serving.model_manager")
    with pytest.raises(AttributeError, match="YanForFlowGeneration"):
        serving.ModelManager(device="cpu", trust_remote_code=True)._load_model(folder)


class TestPage:
    @pytest.fixture
    def page(self):
        spec = importlib.util.spec_from_file_location("clients", ROOT / "examples/reliability/clients.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_it_is_that_of_its_list(self, page):
        assert (ROOT / "docs" / "clients.md").read_text() == page.make_page()

    def test_every_test_that_it_names_exists(self):
        sections = json.loads((ROOT / "docs" / "reliability" / "clients.json").read_text())
        tests = {test for rows in sections.values() for row in rows for test in row["tests"]}
        assert [test for test in tests if test not in names_of_tests(test.partition("::")[0])] == []


def names_of_tests(path: str) -> set[str]:
    """The ids of the tests of a file, without their parameters."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{path}::{node.name}::" if isinstance(node, ast.ClassDef) else f"{path}::"
        found |= {prefix + each.name for each in members if isinstance(each, ast.FunctionDef)}
    return found
