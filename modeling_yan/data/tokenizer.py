"""Tokenizers: training of the project's own, byte-level BPE in which a word is the same tokens wherever it stands, and
what any other one needs to serve a YAN model.

python -m modeling_yan.data.tokenizer --files train.jsonl.gz stories.jsonl.gz --vocab_size 4096 --output tokenizer
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .readers import find_files, read_file
from .rows import check_row, row_texts

PAD, BOS, EOS, MASK = "<pad>", "<s>", "</s>", "<mask>"  # in the order of their ids, 0 to 3
ROLES = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "mask_token": MASK}
STAND_INS = {"bos_token": "cls_token", "eos_token": "sep_token"}
MODEL_INPUTS = ["input_ids", "attention_mask"]
# A model that was trained on pairs knows one question and its answer, and no marks for who speaks. So a prompt has the
# messages since the last answer, and those of the system, line by line. A message is a text, or OpenAI's list of
# parts.
CHAT_TEMPLATE = (
    "{% set turn = namespace(start=0) %}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set turn.start = loop.index %}{% endif %}{% endfor %}{% if turn.start == messages | length %}"
    "{{ raise_exception('the last message is an answer: must be a question, answers are not continued') }}{% endif %}"
    "{% for message in messages %}{% if loop.index0 >= turn.start or message['role'] == 'system' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] != 'text' %}"
    "{{ raise_exception('a part of type ' ~ part['type'] ~ ': must be text') }}{% endif %}{{ part['text'] }}"
    "{% endfor %}{% endif %}{{ '' if loop.last else '\n' }}{% endif %}{% endfor %}"
)
NUM_BYTES = 256
SPACE = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]  # how byte-level BPE spells " "


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of at most `vocab_size` tokens (fewer if the texts offer no more pairs to merge).

    Encoding adds no special tokens. Decoding gives back any text, apart from one leading space; the four special
    tokens are recognised inside a text, and the space before a `<mask>` belongs to it.

    Raises:
        ValueError: `vocab_size` has no room for the four special tokens and the 256 bytes.

    Example:

        >>> from modeling_yan.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["Anna has the hat."] * 9, vocab_size=300)
        >>> tokenizer.decode(tokenizer("Anna has the hat.").input_ids)
        'Anna has the hat.'
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
        truncation_side="left",
        model_input_names=MODEL_INPUTS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give any tokenizer, in place, what a YAN model needs; saved and loaded, it keeps that.

    A missing BOS or EOS becomes the CLS or the separator that the tokenizer has; what is still missing of `<pad>`,
    `<s>`, `</s>` and `<mask>` is added as a special token. Encoding then gives ids and attention mask, nothing else.
    The messages since the last answer become lines of a prompt, if the tokenizer has no template of its own. A prompt
    that is cut keeps its end, as in training.

    Returns:
        How many tokens the vocabulary gained; the model has to have room for them: see `fit_to_tokenizer`.

    Example:

        >>> from transformers import AutoTokenizer
        >>> from modeling_yan.data import prepare_tokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/checkpoints/yan-transformer-tiny")
        >>> prepare_tokenizer(tokenizer)  # it has all that is needed
        0
    """
    for role, stand_in in STAND_INS.items():
        if getattr(tokenizer, role) is None and getattr(tokenizer, stand_in) is not None:
            setattr(tokenizer, role, getattr(tokenizer, stand_in))
    # As in the project's own: the space before a mask belongs to it.
    missing: dict[str, str | AddedToken | Sequence[str | AddedToken]] = {
        role: AddedToken(token, lstrip=role == "mask_token", normalized=False, special=True)
        for role, token in ROLES.items()
        if getattr(tokenizer, role) is None
    }
    size = len(tokenizer)
    tokenizer.add_special_tokens(missing)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    tokenizer.truncation_side = "left"
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = list(MODEL_INPUTS)
    return len(tokenizer) - size


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


def read_texts(path: str) -> Iterator[str]:
    """The prose of a file, or of all files of a pattern: of rows, or of lines that are not blank (`.txt`)."""
    for file in find_files([path]):
        for where, raw in read_file(file):
            row = (
                {name: value for name, value in raw.items() if value is not None} if isinstance(raw, Mapping) else raw
            )
            if row:  # a table may have rows in which nothing stands
                check_row(row, where)
                yield from row_texts(row)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a tokenizer on the prose of files of rows and save it in a folder."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on the prose of files of rows.")
    parser.add_argument(
        "--files",
        nargs="+",
        required=True,
        help=".jsonl, .json, .parquet or .txt, all but .parquet also .gz: texts or pairs",
    )
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--output", required=True, help="the folder to write")
    options = parser.parse_args(arguments)
    if Path(options.output).is_file():
        raise ValueError(f"--output {options.output!r}: must be a folder, and is a file")
    texts = (text for path in options.files for text in read_texts(path))
    train_tokenizer(texts, options.vocab_size).save_pretrained(options.output)


if __name__ == "__main__":
    main()
