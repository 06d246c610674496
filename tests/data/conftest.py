import pytest

from modeling_yan.data import generate_stories, train_tokenizer
from modeling_yan.data.rows import row_texts


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 500 tokens, trained on a few stories and their answers."""
    texts = (text for row in generate_stories(300, seed=7) for text in row_texts(row))
    return train_tokenizer(texts, vocab_size=500)
