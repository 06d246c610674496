import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from transformers import AutoTokenizer

from modeling_yan.data import generate_stories, train_tokenizer, write_rows
from modeling_yan.data.rows import row_texts
from modeling_yan.data.tokenizer import CHAT_TEMPLATE, main, prepare_tokenizer, read_texts

TEXTS = [
    "Mary went to the kitchen.",
    "the kitchen and The kitchen",
    "two  spaces, a\ttab and\n\na new line \n",
    "naïve café, “quotes” -- don't; 漢字 ☃ 👩‍🚀 \u0301 \x00",
    " .,!?'\"",
    "a <b> <masked> < mask >",
    "trailing space ",
    "",
]


def test_special_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<mask>"]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert ids == (0, 1, 2, 3)
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3}
    assert not set(tokenizer("Mary went to the kitchen.")["input_ids"]) & {0, 1, 2, 3}


def test_encoding_gives_ids_and_mask_padded_on_the_left(tokenizer):
    batch = tokenizer(["Mary", "Mary went"], padding=True)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["attention_mask"] == [[0, 1], [1, 1]]
    assert batch["input_ids"][0][0] == 0


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    for skip_special_tokens in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) == text.removeprefix(" ")


def test_a_word_is_the_same_at_the_start_and_in_the_middle(tokenizer):
    ids = tokenizer("Mary Mary. Mary")["input_ids"]
    assert ids[0] == ids[1] == ids[3]


@pytest.mark.parametrize("text", ["the <mask> sat", "<mask> sat", "He saw a <mask>.", "<mask> <mask>", "</s></s>"])
def test_special_tokens_read_well(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_mask_takes_its_space_and_changes_nothing_else(tokenizer):
    the, kitchen, stop = tokenizer("the kitchen.")["input_ids"]
    assert tokenizer("the <mask> kitchen <mask>.")["input_ids"] == [the, 3, kitchen, 3, stop]


def test_skipping_the_specials(tokenizer):
    text = "Mary is in the kitchen."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode([0, 0, 1, *ids, 2, 2], skip_special_tokens=True) == text
    assert tokenizer.decode([1, *ids, 2]) == f"<s> {text}</s>"


def test_words_of_the_stories_are_single_tokens(tokenizer):
    rows = generate_stories(500, seed=8)
    words = set(re.findall(r"\w+", " ".join(row["source"] + " " + row["target"] for row in rows)))
    assert not [word for word in words if len(tokenizer(word)["input_ids"]) > 1]


def test_training_is_deterministic_and_keeps_to_its_size(tokenizer):
    texts = [text for row in generate_stories(300, seed=7) for text in row_texts(row)]
    assert train_tokenizer(iter(texts), 500).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 500
    assert len(train_tokenizer(texts, 300)) == 300
    assert len(train_tokenizer(["ab ab"], 300)) < 300


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="at least 260"):
        train_tokenizer(["a"], 259)
    assert len(train_tokenizer(["a"], 260)) == 260


FRESH_PROCESS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[2])]
print(json.dumps([ids, [tokenizer.decode(row) for row in ids], tokenizer.special_tokens_map, tokenizer.all_special_ids,
                  tokenizer.padding_side, tokenizer.model_input_names, len(tokenizer)]))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    texts = [*(text.replace("\x00", "") for text in TEXTS), "the <mask> sat", "<s> Mary</s></s>"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    here = [ids, [tokenizer.decode(row) for row in ids], specials, tokenizer.all_special_ids]
    here += ["left", ["input_ids", "attention_mask"], len(tokenizer)]
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path), json.dumps(texts)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(there.splitlines()[-1]) == here


def test_command(tmp_path):
    pairs = generate_stories(50, seed=0)
    write_rows(tmp_path / "pairs.jsonl", pairs)
    write_rows(tmp_path / "texts.jsonl.gz", [{"text": "Zebras zigzag."}] * 20)
    files = [str(tmp_path / "pairs.jsonl"), str(tmp_path / "texts.jsonl.gz")]
    main(["--files", *files, "--vocab_size", "350", "--output", str(tmp_path / "tokenizer")])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [text for row in pairs for text in row_texts(row)] + ["Zebras zigzag."] * 20
    assert loaded.get_vocab() == train_tokenizer(texts, 350).get_vocab()


def test_texts_of_every_kind_of_file(tmp_path):
    mixed = [{"text": "one", "source": None, "target": None}, {"text": None, "source": "two", "target": "three"}]
    Dataset.from_list(mixed).to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "lines.txt").write_text("one\n\ntwo words\n")
    write_rows(tmp_path / "rows.jsonl", [{"text": "one"}])
    assert list(read_texts(str(tmp_path / "rows.parquet"))) == ["one", "two", "three"]
    assert list(read_texts(str(tmp_path / "lines.txt"))) == ["one", "two words"]
    assert list(read_texts(str(tmp_path / "rows.jsonl"))) == ["one"]


def test_a_table_without_text_is_refused(tmp_path):
    Dataset.from_list([{"words": "one"}]).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match=r"rows\.parquet.*words"):
        list(read_texts(str(tmp_path / "rows.parquet")))


def test_a_chat_becomes_a_plain_prompt(tmp_path):
    tokenizer = train_tokenizer(["Where is the apple?"], 300)
    messages = [{"role": "user", "content": "Anna took the apple."}, {"role": "user", "content": "Who has it?"}]
    prompt = "Anna took the apple.\nWho has it?"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    parts = [{"role": "user", "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == prompt
    before = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    assert tokenizer.apply_chat_template(before + messages, tokenize=False) == prompt
    short = {"role": "system", "content": "Be short."}
    assert tokenizer.apply_chat_template([short, *before, *messages], tokenize=False) == f"Be short.\n{prompt}"
    with pytest.raises(TemplateError, match="the last message is an answer: must be a question"):
        tokenizer.apply_chat_template(before, tokenize=False)
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(TemplateError, match="a part of type image: must be text"):
        tokenizer.apply_chat_template(picture, tokenize=False)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(messages, tokenize=False) == prompt
    encoded = loaded.apply_chat_template(messages, return_dict=True)
    assert encoded["input_ids"] == loaded(prompt)["input_ids"]


@pytest.mark.parametrize("name", ["yan-transformer-tiny", "yan-mamba-tiny"])
def test_the_bundled_models_have_the_template(name):
    folder = Path(__file__).parents[2] / "examples" / "checkpoints" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.chat_template, tokenizer.truncation_side) == (CHAT_TEMPLATE, "left")


def test_a_prompt_that_is_cut_keeps_its_end(tmp_path):
    own = train_tokenizer(["a b c"], 300)
    other = copy.deepcopy(own)
    other.truncation_side = "right"
    prepare_tokenizer(other)
    for tokenizer in (own, other):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded("a b c", truncation=True, max_length=1)["input_ids"] == loaded("a b c")["input_ids"][-1:]


def test_it_reads_what_training_reads(tmp_path):
    Dataset.from_list([{"text": "In a table."}, {"text": None}]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text('[{"source": "A pair", "target": "of texts."}]')
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfWith a mark.\n\n")
    (tmp_path / "d1.txt").write_text("One.\n")
    (tmp_path / "d2.txt").write_text("Two.\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Käse\n".encode("latin-1"))
    texts = [text for name in ("a.parquet", "b.json", "c.txt", "d?.txt") for text in read_texts(str(tmp_path / name))]
    assert texts == ["In a table.", "A pair", "of texts.", "With a mark.", "One.", "Two."]
    for name, message in (("empty.txt", "the file holds no rows"), ("latin.txt", "line 1: not UTF-8")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            list(read_texts(str(tmp_path / name)))


def test_a_file_where_the_folder_is_to_be(tmp_path):
    (tmp_path / "texts.txt").write_text("One.\n")
    with pytest.raises(ValueError, match=r"--output '.*texts.txt': must be a folder, and is a file"):
        main(["--files", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "texts.txt")])
