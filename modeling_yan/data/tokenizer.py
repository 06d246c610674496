"""Training of the project's tokenizer: byte-level BPE, in which a word is the same tokens wherever it stands.

python -m modeling_yan.data.tokenizer --files train.jsonl.gz stories.jsonl.gz --vocab_size 4096 --output tokenizer
"""

import argparse
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from .rows import read_rows, row_texts

PAD, BOS, EOS, MASK = "<pad>", "<s>", "</s>", "<mask>"  # in the order of their ids, 0 to 3
NUM_BYTES = 256
SPACE = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]  # how byte-level BPE spells " "


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of at most `vocab_size` tokens (fewer if the texts offer no more pairs to merge).

    Encoding adds no special tokens. Decoding gives back any text, apart from one leading space; the four special
    tokens are recognised inside a text, and the space before a `<mask>` belongs to it.

    Raises:
        ValueError: `vocab_size` has no room for the four special tokens and the 256 bytes.
    """
    if vocab_size < NUM_BYTES + 4:
        raise ValueError(f"vocab_size is {vocab_size}, but must be at least {NUM_BYTES + 4} (bytes, special tokens)")
    backend = _untrained_tokenizer()
    mask = AddedToken(MASK, lstrip=True, special=True)
    backend.train_from_iterator(texts, trainer=_trainer(vocab_size, mask))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=mask,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _untrained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    # ByteLevel's own `add_prefix_space` would also add a space after every special token: "<mask>." -> "<mask> .".
    # Metaspace with a plain space for its sign adds one at the start of the text only.
    first_space = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first_space, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # The other way round: give the mask its space back, join the bytes, take away the first space.
    mask_space = decoders.Replace(MASK, SPACE + MASK)
    tokenizer.decoder = decoders.Sequence([mask_space, decoders.ByteLevel(), decoders.Strip(" ", left=1, right=0)])
    return tokenizer


def _trainer(vocab_size: int, mask: AddedToken) -> BpeTrainer:
    return BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, mask],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a tokenizer on the prose of files of rows and save it in a folder."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on the prose of files of rows.")
    parser.add_argument("--files", nargs="+", required=True, help=".jsonl or .jsonl.gz files of texts or pairs")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--output", required=True, help="the folder to write")
    options = parser.parse_args(arguments)
    texts = (text for path in options.files for row in read_rows(path) for text in row_texts(row))
    train_tokenizer(texts, options.vocab_size).save_pretrained(options.output)


if __name__ == "__main__":
    main()
