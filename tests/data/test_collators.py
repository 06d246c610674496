import copy
import cProfile
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizer

from modeling_yan.data import (
    AutoencoderCollator,
    FlowCollator,
    collators,
    generate_clozes,
    generate_stories,
    prepare_tokenizer,
)
from modeling_yan.data.masking import Ragged, draw_spans, hide_spans, pad_rows

MASK, PAD = 3, 2
BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmark" / "collators.py"


def ragged_batch(num_rows, width, seed=0):
    """Rows of 10, 11, 12, ... cut at random lengths (0 to `width`), so that a token tells its own position."""
    lengths = torch.randint(0, width + 1, (num_rows,), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(width).expand(num_rows, width)
    return torch.where(positions < lengths[:, None], positions + 10, PAD), lengths


def masked(input_ids, lengths, mask_ratio, max_span_len, seed=0):
    """The batch with spans of every row collapsed into one mask token each, (B, L)."""
    width, counts, generator = input_ids.shape[1], lengths.numpy(), torch.Generator().manual_seed(seed)
    rows = Ragged(input_ids.numpy()[np.arange(width) < counts[:, None]], counts)
    hidden = hide_spans(rows, *draw_spans(counts, mask_ratio, max_span_len, generator), MASK)
    return torch.from_numpy(pad_rows(hidden, width, PAD))


def hidden_spans(row, length):
    """Read a masked row of `ragged_batch` back: the lengths of its hidden spans, in order."""
    ids = row.tolist()
    while ids and ids[-1] == PAD:
        ids.pop()
    bounded = [9, *ids, length + 10]
    spans = []
    for before, token, after in zip(bounded, bounded[1:], bounded[2:]):
        if token == MASK:
            assert MASK not in (before, after), "two masks touch"
            spans.append(after - before - 1)
        else:
            assert before == MASK or token == before + 1, "a kept token is missing or out of order"
    assert PAD not in ids, "the row was not closed up"
    return spans


@pytest.mark.parametrize("max_span_len", [1, 3, 8])
@pytest.mark.parametrize("mask_ratio", [0.08, 0.3, 0.5])
def test_masked_rows_can_be_read_back(mask_ratio, max_span_len):
    input_ids, lengths = ragged_batch(400, 30)
    before = input_ids.clone()
    result = masked(input_ids, lengths, mask_ratio, max_span_len)
    assert result.shape == input_ids.shape
    assert torch.equal(input_ids, before)
    for row, length in zip(result, lengths.tolist()):
        spans = hidden_spans(row, length)
        assert all(1 <= span <= max_span_len for span in spans)
        assert abs(sum(spans) - mask_ratio * length) < 1


@pytest.mark.parametrize("length", [1, 3, 7, 40])
def test_the_mean_share_is_right_for_short_rows_too(length):
    lengths = torch.full((4_000,), length)
    input_ids = torch.arange(10, 10 + length).expand(4_000, length)
    result = masked(input_ids, lengths, 0.15, 3)
    shares = torch.tensor([sum(hidden_spans(row, length)) / length for row in result])
    assert shares.mean() == pytest.approx(0.15, abs=0.02)


def test_every_position_and_span_length_is_equally_likely():
    input_ids = torch.arange(10, 40).expand(6_000, 30)
    result = masked(input_ids, torch.full((6_000,), 30), 0.1, 3)
    kept = torch.stack([(result == token).any(1).float().mean() for token in range(10, 40)])
    assert (1 - kept).mean() == pytest.approx(0.1, abs=0.002)
    assert ((1 - kept)[3:-3] - 0.1).abs().max() < 0.03
    spans = torch.tensor([span for row in result for span in hidden_spans(row, 30)])
    shares = spans.bincount(minlength=4)[1:] / len(spans)
    assert shares.min() > 0.15


def test_masking_follows_its_generator():
    input_ids, lengths = ragged_batch(50, 30)
    assert torch.equal(masked(input_ids, lengths, 0.3, 3, seed=1), masked(input_ids, lengths, 0.3, 3, seed=1))
    assert not torch.equal(masked(input_ids, lengths, 0.3, 3, seed=1), masked(input_ids, lengths, 0.3, 3, seed=2))


def test_no_masking_returns_the_input():
    input_ids, lengths = ragged_batch(5, 10)
    assert torch.equal(masked(input_ids, lengths, 0.0, 3), input_ids)


@pytest.mark.parametrize(("mask_ratio", "max_span_len"), [(-0.1, 3), (0.6, 3), (0.1, 0)])
def test_impossible_masking_is_refused(tokenizer, mask_ratio, max_span_len):
    with pytest.raises(ValueError, match=r"mask_ratio|max_span_len"):
        AutoencoderCollator(tokenizer, 16, mask_ratio=mask_ratio, max_span_len=max_span_len)


def test_autoencoder_batch(tokenizer):
    texts = ["Mary went to the kitchen.", "Mary took the apple. Mary went to the garden."]
    batch = AutoencoderCollator(tokenizer, 64, mask_ratio=0.3)([{"text": text} for text in texts])
    assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (2, 16)
    )
    assert batch["attention_mask"].all()
    assert tokenizer.batch_decode(batch["labels"], skip_special_tokens=True) == texts
    assert tokenizer.mask_token_id in batch["input_ids"]
    assert tokenizer.mask_token_id not in batch["labels"]
    assert tokenizer.pad_token_id not in torch.cat([batch["input_ids"], batch["labels"]])
    assert (batch["labels"][:, -1] == tokenizer.eos_token_id).all()


@pytest.mark.parametrize(
    ("fixed_width", "num_tokens", "width"), [(False, 7, 8), (False, 8, 16), (False, 30, 20), (True, 7, 20)]
)
def test_autoencoder_width(tokenizer, fixed_width, num_tokens, width):
    collator = AutoencoderCollator(tokenizer, 20, fixed_width=fixed_width)
    assert collator([{"input_ids": list(range(10, 10 + num_tokens))}])["labels"].shape == (1, width)


def test_autoencoder_takes_random_windows_of_long_texts(tokenizer):
    windows = AutoencoderCollator(tokenizer, 8, mask_ratio=0)([{"input_ids": range(10, 30)}] * 200)["labels"]
    assert (windows.diff() == 1).all()
    assert set(windows[:, 0].tolist()) == set(range(10, 23))


def test_autoencoder_refuses_rows_without_text(tokenizer):
    with pytest.raises(ValueError, match='"text" is needed'):
        AutoencoderCollator(tokenizer, 8)([{"words": "a"}])
    with pytest.raises(ValueError, match='"source" is needed'):
        AutoencoderCollator(tokenizer, 8)([{"target": "a"}])


def test_autoencoder_shows_the_source_of_a_pair_and_hides_in_its_target(tokenizer):
    rows = generate_stories(20, seed=1)
    batch = AutoencoderCollator(tokenizer, 128, mask_ratio=0, target_mask_ratio=0.5)(rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"]):
        source, target = tokenizer([row["source"], row["target"]])["input_ids"]
        assert ids[: len(source)].tolist() == source
        assert tokenizer.mask_token_id in ids[len(source) :]
        learned = [*target, tokenizer.eos_token_id]
        ignored = len(labels) - len(source) - len(learned)
        assert labels.tolist() == [-100] * len(source) + learned + [-100] * ignored


def test_autoencoder_learns_the_answer_in_its_slot(tokenizer):
    rows = generate_stories(20, seed=1, answer_slot=tokenizer.mask_token * 8 + " ")
    batch = AutoencoderCollator(tokenizer, 128)(rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"]):
        source, target = tokenizer([row["source"], row["target"]])["input_ids"]
        assert ids[: len(source)].tolist() == source
        assert set(ids[len(source) :].tolist()) <= {tokenizer.eos_token_id}
        answer = target + [tokenizer.eos_token_id] * (8 - len(target))
        assert labels.tolist() == answer + [-100] * (len(labels) - 8)


def test_autoencoder_learns_the_hidden_words_of_a_cloze_in_their_places(tokenizer):
    rows = generate_clozes(20, seed=1, mask_token=tokenizer.mask_token)
    rows.append({"source": "a book", "target": "the book"})  # as long, but no cloze: the answer is learned behind it
    batch = AutoencoderCollator(tokenizer, 128)(rows)
    for row, ids, labels in zip(rows[:-1], batch["input_ids"], batch["labels"]):
        source, target = tokenizer([row["source"], row["target"]])["input_ids"]
        assert ids[: len(source)].tolist() == source
        learned = [there if shown == tokenizer.mask_token_id else -100 for shown, there in zip(source, target)]
        assert labels.tolist() == learned + [-100] * (len(labels) - len(source))
        assert max(learned) > 0
    source, target = tokenizer(["a book", "the book"])["input_ids"]
    learned = [*target, tokenizer.eos_token_id]
    assert batch["labels"][-1][: len(source) + len(learned)].tolist() == [-100] * len(source) + learned


def test_an_answer_may_fill_its_slot_and_not_go_beyond_it(tokenizer):
    """An answer of as many tokens as the slot was learned behind it once, and then never found in it."""
    slot, ignored = [tokenizer.mask_token_id] * 2, [-100] * 3
    rows = [{"source": [*slot, 20], "target": [10, 11, 12][:length]} for length in (1, 2, 3)]
    labels = AutoencoderCollator(tokenizer, 16, target_mask_ratio=0)(rows)["labels"].tolist()
    assert labels == [[10, 2, *ignored, *ignored], [10, 11, *ignored, *ignored], [*ignored, 10, 11, 12, 2, -100]]


def test_autoencoder_mixes_texts_and_pairs_each_with_its_ratio(tokenizer):
    rows = [{"text": "Mary took the apple.", "source": "a book"}, {"source": [20, 21], "target": [10, 11, 12, 13]}]
    batch = AutoencoderCollator(tokenizer, 16, mask_ratio=0, target_mask_ratio=0.5)(rows)
    assert tokenizer.decode(batch["labels"][0], skip_special_tokens=True) == rows[0]["text"]
    assert torch.equal(batch["input_ids"][0], batch["labels"][0])
    assert batch["labels"][1].tolist() == [-100, -100, 10, 11, 12, 13, 2, -100]
    assert batch["input_ids"][1].tolist().count(tokenizer.mask_token_id) in (1, 2)


def test_autoencoder_keeps_the_end_of_a_source_that_is_too_long(tokenizer):
    collator = AutoencoderCollator(tokenizer, 8, target_mask_ratio=0)
    labels = collator([{"source": range(20, 30), "target": [10, 11, 12]}, {"source": [9], "target": range(10, 30)}])
    assert labels["input_ids"][0].tolist() == [25, 26, 27, 28, 29, 10, 11, 12]
    assert labels["labels"][0].tolist() == [-100] * 5 + [10, 11, 12]
    assert (labels["labels"][1].diff() == 1).all()


def test_autoencoder_batches_repeat_with_their_seed(tokenizer):
    rows = generate_stories(32, seed=0)
    first, second, other = (AutoencoderCollator(tokenizer, 32, seed=seed) for seed in (5, 5, 6))
    for start in (0, 16):
        batches = [collator(rows[start : start + 16]) for collator in (first, second, other)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
        assert not torch.equal(batches[0]["input_ids"], batches[2]["input_ids"])


def test_workers_and_epochs_draw_differently_but_repeatably(tokenizer):
    rows = [{"input_ids": list(range(10, 40))}] * 32

    def epochs():
        collator = AutoencoderCollator(tokenizer, 32, mask_ratio=0.3, seed=1)
        loader = DataLoader(
            rows, batch_size=16, num_workers=2, collate_fn=collator, generator=torch.Generator().manual_seed(0)
        )
        return [batch["input_ids"] for _ in range(2) for batch in loader]

    batches = epochs()
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 4
    assert all(torch.equal(a, b) for a, b in zip(batches, epochs()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_flow_batch(tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    rows = generate_stories(4, seed=3)
    batch = FlowCollator(tokenizer, 120, 16)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for row, ids, mask, labels in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        source, target = tokenizer([row["source"], row["target"]])["input_ids"]
        assert ids[mask.bool()].tolist() == source
        assert (ids[~mask.bool()] == tokenizer.pad_token_id).all()
        assert mask[-1 if side == "left" else 0] == 1
        assert labels[labels != -100].tolist() == [*target, tokenizer.eos_token_id]
        assert (labels[len(target) + 1 :] == -100).all()


def test_flow_widths_are_rounded_up_to_their_limits(tokenizer):
    collator = FlowCollator(tokenizer, max_source_length=10, canvas_length=6)
    batch = collator([{"source": [10] * 5, "target": [11] * 3}])
    assert (batch["input_ids"].shape, batch["labels"].shape) == ((1, 8), (1, 4))
    batch = collator([{"source": [10] * 9, "target": [11] * 4}])
    assert (batch["input_ids"].shape, batch["labels"].shape) == ((1, 10), (1, 6))


def test_flow_cuts_long_targets_without_eos_and_keeps_the_end_of_long_sources(tokenizer):
    collator = FlowCollator(tokenizer, max_source_length=4, canvas_length=4)
    batch = collator([{"source": range(10, 17), "target": range(20, 24)}, {"source": [10], "target": [20, 21, 22]}])
    assert batch["input_ids"].tolist() == [[13, 14, 15, 16], [0, 0, 0, 10]]
    assert batch["labels"].tolist() == [[20, 21, 22, 23], [20, 21, 22, tokenizer.eos_token_id]]
    assert collator.num_truncated == 1


def test_a_long_source_keeps_the_special_token_before_it(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    prepare_tokenizer(tokenizer)
    text = "a b c d e f g h"
    tokenizer.truncation_side = "left"
    cut = tokenizer(text, truncation=True, max_length=6)["input_ids"]
    assert cut[0] == tokenizer.cls_token_id
    assert FlowCollator(tokenizer, 6, 8)([{"source": text, "target": "a"}])["input_ids"].tolist() == [cut]


def test_flow_gives_an_empty_source_one_token_to_look_at(tokenizer):
    batch = FlowCollator(tokenizer, 8, 8)([{"source": "", "target": "Mary"}])
    assert batch["input_ids"].tolist() == [[0, 0, 0, tokenizer.bos_token_id]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1]]


def test_flow_takes_strings_and_ids_alike(tokenizer):
    rows = generate_stories(3, seed=4)
    encoded = [{key: tokenizer(row[key])["input_ids"] for key in ("source", "target")} for row in rows]
    collator = FlowCollator(tokenizer, 120, 16)
    expected = collator(rows)
    for mixture in (encoded, [rows[0], *encoded[1:]]):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in collator(mixture).items())


def test_flow_refuses_texts_and_empty_limits(tokenizer):
    with pytest.raises(ValueError, match=r"keys \['text'\], but \"source\" is needed"):
        FlowCollator(tokenizer, 8, 8)([{"text": "a"}])
    for name in ("max_source_length", "canvas_length"):
        with pytest.raises(ValueError, match=name):
            FlowCollator(tokenizer, **{"max_source_length": 8, "canvas_length": 8, name: 0})


@pytest.fixture(scope="module")
def benchmark():
    """The names of the benchmark script, the plain loops among them."""
    return runpy.run_path(str(BENCHMARK))


@pytest.fixture
def drawn(monkeypatch):
    """List that collects the spans of every batch: one list of (start, length) a row."""
    batches, draw = [], collators.draw_spans

    def record(*args):
        starts, lengths = draw(*args)
        batches.append([[(s, n) for s, n in zip(*row) if n] for row in zip(starts.tolist(), lengths.tolist())])
        return starts, lengths

    monkeypatch.setattr(collators, "draw_spans", record)
    return batches


def draw_ids(rng, low, high, kind=list):
    ids = [rng.randrange(10, 400) for _ in range(rng.randint(low, high))]
    return kind(ids)


KINDS = {"list": list, "array": np.array, "tensor": torch.tensor, "tuple": tuple}


class TestAgainstLoops:
    @pytest.mark.parametrize("kind", KINDS)
    def test_infilling_equals_the_loop_with_the_same_spans(self, tokenizer, benchmark, drawn, kind):
        rng = random.Random(0)
        for width in (16, 48):
            rows = [{"input_ids": draw_ids(rng, 1, width - 1, KINDS[kind])} for _ in range(40)]
            batch = AutoencoderCollator(tokenizer, width, mask_ratio=0.3, fixed_width=True)(rows)
            expected = benchmark["infill_by_loop"](rows, drawn[-1], width, MASK, tokenizer.eos_token_id)
            assert sum(map(len, drawn[-1])) > 40
            assert all(torch.equal(batch[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_pairs_equal_the_loop(self, tokenizer, benchmark, kind):
        rng = random.Random(1)
        ids = [{"source": draw_ids(rng, 1, 30), "target": draw_ids(rng, 1, 14)} for _ in range(40)]
        rows = [{key: KINDS[kind](value) for key, value in row.items()} for row in ids]
        batch = FlowCollator(tokenizer, 64, 32)(rows)
        source_width, target_width = batch["input_ids"].shape[1], batch["labels"].shape[1]
        expected = benchmark["pair_by_loop"](ids, source_width, target_width, 0, tokenizer.eos_token_id)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)

    def test_mixed_autoencoder_rows_equal_the_loop(self, tokenizer, benchmark, drawn):
        """Texts, pairs with and without answer slot, with and without BOS, too long ones and empty sources."""
        rng, limit, eos = random.Random(2), 32, tokenizer.eos_token_id
        for _ in range(20):
            rows = [self.draw_row(rng, tokenizer) for _ in range(12)]
            batch = AutoencoderCollator(tokenizer, limit, fixed_width=True)(rows)
            for index, row in enumerate(rows):
                shown, labels = self.expect(row, drawn[-1][index], limit, benchmark["mask_row"], tokenizer)
                assert batch["input_ids"][index].tolist() == (shown + [eos] * limit)[:limit]
                assert batch["labels"][index].tolist() == labels

    def draw_row(self, rng, tokenizer):
        if rng.random() < 0.3:
            return {"input_ids": draw_ids(rng, 0, 31)}
        slot = rng.choice([[], [tokenizer.bos_token_id]]) + [MASK] * rng.choice([0, 0, 2, 8, 40])
        return {"source": slot + draw_ids(rng, 0, 40), "target": draw_ids(rng, 0, 12)}

    def expect(self, row, spans, limit, mask_row, tokenizer):
        text, source = row.get("target", row.get("input_ids")), row.get("source", [])
        eos = tokenizer.eos_token_id
        source_end = source[:limit]
        start = int(source_end[:1] == [tokenizer.bos_token_id])
        end = start
        while end < len(source_end) and source_end[end] == MASK:
            end += 1
        if end - start >= max(1, len(text)):
            answer = text + [eos] * (end - start - len(text))
            return source_end, [-100] * start + answer + [-100] * (limit - end)
        source = source[max(0, len(source) - (limit - len(text))) :]
        shown = source + mask_row(text, spans, MASK)
        if not source:
            return shown, text + [eos] * (limit - len(text))
        labels = [-100] * len(source) + text + [eos]
        return shown, (labels + [-100] * limit)[:limit]

    def test_the_loop_draws_spans_as_often_as_the_collator(self, benchmark):
        rng, num_tokens = random.Random(3), 40
        loop = [benchmark["draw_spans"](num_tokens, rng) for _ in range(10_000)]
        generator = torch.Generator().manual_seed(0)
        starts, lengths = collators.draw_spans(np.full(10_000, num_tokens), 0.15, 3, generator)
        for mean, expected in (
            ((lengths > 0).sum(1).mean(), np.mean([len(spans) for spans in loop])),
            (lengths.sum(1).mean(), np.mean([sum(n for _, n in spans) for spans in loop])),
            (starts[lengths > 0].mean(), np.mean([start for spans in loop for start, _ in spans])),
            (np.mean(lengths[lengths > 0] == 1), np.mean([n == 1 for spans in loop for _, n in spans])),
        ):
            assert mean == pytest.approx(expected, rel=0.03)


def test_no_token_is_touched_in_a_python_loop(tokenizer):
    """The calls that a batch makes do not grow with its tokens."""

    def count_calls(make, length):
        collator, profile = make(), cProfile.Profile()
        rows = [{"input_ids": [10] * length, "source": [10] * length, "target": [11] * length}] * 4
        rows = rows if isinstance(collator, FlowCollator) else [{"input_ids": [10] * length}, *rows]
        profile.enable()
        collator(rows)
        profile.disable()
        return sum(entry.callcount for entry in profile.getstats())

    for make in (lambda: FlowCollator(tokenizer, 5_000, 5_000), lambda: AutoencoderCollator(tokenizer, 5_000)):
        count_calls(make, 10)
        assert count_calls(make, 2_000) <= count_calls(make, 200) + 20


def test_a_tokenizer_that_is_not_prepared(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(
        ValueError, match=r"the tokenizer has no EOS or no pad token: call prepare_tokenizer\(tokenizer"
    ):
        FlowCollator(other, 8, 8)


def test_the_benchmark_prints_a_line_for_every_case(benchmark, capsys):
    benchmark["main"](["--repeats", "1", "--sizes", "4x16"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        [batch, ids, "4x16"] for batch in ("infilling", "pairs") for ids in ("list", "array")
    ]
    assert all(float(line.split()[-1]) > 0 for line in lines[1:])  # three digits, however slow the collator was


class TestCounts:
    def test_flow_counts_cut_sources_and_cut_targets(self, tokenizer):
        collator = FlowCollator(tokenizer, 4, 4)
        for _ in range(2):
            collator([{"source": [10] * n, "target": [11] * m} for n, m in ((4, 3), (5, 3), (9, 4), (1, 9))])
        assert (collator.num_truncated, collator.num_cut_targets) == (4, 4)

    def test_autoencoder_counts_windows_and_cut_sources(self, tokenizer):
        collator = AutoencoderCollator(tokenizer, 8)
        collator([{"input_ids": [10] * n} for n in (7, 8, 9, 30)])
        assert collator.num_truncated == 2
        collator([{"source": [10] * 5, "target": [11] * n} for n in (3, 4)])
        assert collator.num_truncated == 3

    def test_an_empty_target_is_an_eos_alone(self, tokenizer):
        batch = FlowCollator(tokenizer, 8, 8)([{"source": "Mary", "target": ""}])
        assert batch["labels"].tolist() == [[tokenizer.eos_token_id, -100, -100, -100]]

    def test_an_empty_source_needs_a_bos(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.bos_token = None
        with pytest.raises(ValueError, match="no BOS"):
            FlowCollator(tokenizer, 8, 8)([{"source": "", "target": "Mary"}])


def test_columns_that_are_none_count_as_missing(tokenizer):
    text = {"text": "Mary took the apple.", "source": None, "target": None}
    pair = {"text": None, "source": [20], "target": [10, 11]}
    collator = AutoencoderCollator(tokenizer, 16, mask_ratio=0, target_mask_ratio=0)
    sparse = collator([{"text": text["text"]}, {"source": [20], "target": [10, 11]}])
    assert all(torch.equal(tensor, sparse[name]) for name, tensor in collator([text, pair]).items())
    with pytest.raises(ValueError, match=r"keys \['text'\], but \"source\" is needed"):
        FlowCollator(tokenizer, 8, 8)([text])


def test_a_generator_of_the_call_wins_over_the_seed(tokenizer):
    rows = [{"input_ids": list(range(10, 40))}] * 8
    first, second = AutoencoderCollator(tokenizer, 32, seed=1), AutoencoderCollator(tokenizer, 32, seed=2)
    batches = [collator(rows, torch.Generator().manual_seed(5)) for collator in (first, second, first)]
    assert all(torch.equal(batches[0]["input_ids"], batch["input_ids"]) for batch in batches)


def test_a_batch_of_empty_rows_is_all_fill(tokenizer):
    batch = AutoencoderCollator(tokenizer, 16)([{"input_ids": []}, {"source": [20, 21], "target": []}])
    assert batch["input_ids"][:, 2:].eq(tokenizer.eos_token_id).all()
    assert batch["labels"].tolist() == [[2] * 8, [-100, -100, 2, -100, -100, -100, -100, -100]]
