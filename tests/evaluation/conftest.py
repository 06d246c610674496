"""Tiny models of other families, with the tokenizer of a bundled checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "yan-transformer-tiny"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Folder of a bundled YAN."""
    return CHECKPOINT


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def gpt2(tokenizer):
    """A random GPT-2 of 64 positions, without dropout."""
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, **ids)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2_folder(gpt2, tokenizer, tmp_path) -> Path:
    """The GPT-2 and its tokenizer on disk."""
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def bert(tokenizer):
    """A random BERT."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).eval()
