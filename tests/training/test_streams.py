"""TaskSampler at scale: buckets of like length, streams, Arrow data sets, and rows that are skipped."""

import pickle
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from torch.utils.data import DataLoader

from modeling_yan import YanConfig
from modeling_yan.data import train_tokenizer
from modeling_yan.training import sampler as sampler_module
from modeling_yan.training.sampler import TaskSampler
from modeling_yan.training.streams import TaskSchedule, kind_of

WORDS = "cat dog hat mat sun man run sat ran big red old new see way day".split()
BUFFER = 16
MIXED = Features({name: Value("string") for name in ("text", "source", "target")})


def make_pairs(number, seed=0):
    """Pairs that tell their number, with sources of 2 to 30 words."""
    rng = random.Random(seed)
    sources = [" ".join(rng.choices(WORDS, k=rng.randint(2, 30))) for _ in range(number)]
    return [{"source": f"row {index} : {source}", "target": str(index)} for index, source in enumerate(sources)]


def make_texts(number):
    return [{"text": f"The {WORDS[i % 16]} saw row {i} there. The {WORDS[i % 7]} did not."} for i in range(number)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["source"] for row in make_pairs(200)], vocab_size=400)


@pytest.fixture
def make_mixture(tokenizer):
    """Function from overrides to a mixture of pairs for the flow stage."""
    config = YanConfig(vocab_size=len(tokenizer), canvas_length=40, max_position_embeddings=64)
    defaults = {"rows": make_pairs(60), "stage": "flow", "batch_size": 4, "length": 48, "seed": 0}
    defaults["shuffle_buffer"] = BUFFER
    return lambda **overrides: TaskSampler(tokenizer=tokenizer, config=config, **{**defaults, **overrides})


def stream_of(rows, pulled=None, num_shards=1):
    """A stream of the rows; `pulled` collects the rows that were read."""
    parts = [rows[shard::num_shards] for shard in range(num_shards)]
    if pulled is None:
        return IterableDataset.from_generator(read, gen_kwargs={"parts": parts})

    def watched():
        for row in rows:
            pulled.append(row)
            yield row

    return IterableDataset.from_generator(watched)


def read(parts):
    for part in parts:
        yield from part


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) for name in first
    )


def numbers(tokenizer, batches) -> list[int]:
    """The numbers that the targets of the pairs tell."""
    rows = [row[row >= 0] for batch in batches for row in batch["labels"]]
    return [int(text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


KINDS = {"list": list, "arrow": Dataset.from_list, "stream": stream_of}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bucket_batches", [1, 3])
class TestPureFunction:
    @pytest.fixture
    def make(self, make_mixture, kind, bucket_batches):
        rows = KINDS[kind](make_pairs(30))
        return lambda **options: make_mixture(rows=rows, bucket_batches=bucket_batches, **options)

    def test_any_start_gives_the_tail(self, make):
        whole = list(make().batches())
        assert len(whole) == 48
        for start in (0, 1, 17, 47, 48):
            tail = list(make().batches(start))
            assert len(tail) == 48 - start
            assert all(map(same, tail, whole[start:]))

    def test_a_batch_alone_equals_that_of_the_iteration(self, make):
        whole, mixture = list(make()), make()
        for index in (40, 3, 4, 3, 20):
            assert same(mixture[index], whole[index])

    def test_workers_of_a_loader_change_nothing(self, make):
        mixture = make(length=12)
        expected = list(mixture)
        loader = DataLoader(mixture, batch_size=None, num_workers=2)
        assert all(map(same, loader, expected))

    def test_a_pickled_mixture_goes_on(self, make):
        mixture = make()
        expected = [mixture[index] for index in range(6)][5]
        assert same(pickle.loads(pickle.dumps(mixture))[5], expected)


def test_the_same_workers_draw_the_same_corruption(make_mixture):
    mixture = make_mixture(stage="autoencoder", length=6)
    torch.manual_seed(1)
    assert all(map(same, DataLoader(mixture, batch_size=None, num_workers=1), list(mixture)))


@pytest.mark.parametrize("stage", ["autoencoder", "flow"])
@pytest.mark.parametrize("number_of_pairs", [0, 40])
def test_streams_of_every_task_are_resumed(make_mixture, stage, number_of_pairs):
    rows = make_texts(40) + make_pairs(number_of_pairs)
    if number_of_pairs:
        rows = [{name: row.get(name) for name in MIXED} for row in rows]
    options = {"rows": stream_of(rows), "stage": stage, "bucket_batches": 2, "length": 40}
    whole = list(make_mixture(**options))
    for start in (13, 31):
        assert all(map(same, make_mixture(**options).batches(start), whole[start:]))


class TestSchedule:
    def test_it_counts_the_batches_of_a_task(self):
        schedule, seen = TaskSchedule({"a": 1, "b": 3}, seed=0), Counter()
        for index in range(2 * TaskSchedule.BLOCK + 10):
            task, number = schedule[index]
            assert number == seen[task]
            seen[task] += 1
        assert seen["b"] / seen.total() == pytest.approx(0.75, abs=0.02)

    def test_far_ahead_is_the_same_as_step_by_step(self):
        far = 3 * TaskSchedule.BLOCK + 5
        walked = TaskSchedule({"a": 1, "b": 3}, seed=0)
        for index in range(0, far, 100):
            _ = walked[index]
        assert walked[far] == TaskSchedule({"a": 1, "b": 3}, seed=0)[far]
        seeds = [[TaskSchedule({"a": 1, "b": 1}, seed)[i][0] for i in range(50)] for seed in (0, 1)]
        assert seeds[0] != seeds[1]


class TestBuckets:
    def padding(self, mixture):
        masks = [batch["attention_mask"] for batch in mixture]
        return sum((mask == 0).sum().item() for mask in masks) / sum(mask.numel() for mask in masks)

    def test_padding_falls(self, make_mixture):
        rows = make_pairs(400)
        plain, bucketed = (self.padding(make_mixture(rows=rows, bucket_batches=number)) for number in (1, 16))
        assert bucketed < 0.5 * plain

    def test_a_group_uses_every_row_once(self, make_mixture, tokenizer):
        rows = make_pairs(48)
        mixture = make_mixture(rows=stream_of(rows), bucket_batches=6, length=4 * 6)
        epochs = [numbers(tokenizer, list(mixture.batches(start))[:12]) for start in (0, 12)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(48))] * 2

    def test_drawn_groups_use_every_drawn_row_once(self, make_mixture, monkeypatch, tokenizer):
        encoded, encode_rows = [], sampler_module.encode_rows
        monkeypatch.setattr(sampler_module, "encode_rows", lambda *args: encoded.append(args[1]) or encode_rows(*args))
        batches = list(make_mixture(bucket_batches=6, length=6))
        assert [len(rows) for rows in encoded] == [24]  # tokenised once
        assert sorted(int(row["target"]) for row in encoded[0]) == sorted(numbers(tokenizer, batches))

    def test_batches_of_a_group_come_in_random_order(self, make_mixture):
        widths = [batch["input_ids"].shape[1] for batch in make_mixture(bucket_batches=8, rows=make_pairs(400))]
        groups = [widths[start : start + 8] for start in range(0, 48, 8)]
        assert all(group != sorted(group) for group in groups)
        assert len({tuple(sorted(range(8), key=group.__getitem__)) for group in groups}) > 1

    def test_processes_have_their_long_batches_together(self, make_mixture):
        rows = make_pairs(2_000)
        mixtures = [make_mixture(rows=rows, bucket_batches=16, process_index=index) for index in (0, 1)]
        widths = [[batch["input_ids"].shape[1] for batch in mixture] for mixture in mixtures]
        differences = [abs(first - second) for first, second in zip(*widths)]
        assert sum(differences) < 0.25 * sum(abs(first - second) for first, second in zip(widths[0], widths[0][1:]))


class TestStreams:
    def test_an_epoch_shows_every_row_once_in_a_new_order(self, make_mixture, tokenizer):
        mixture = make_mixture(rows=stream_of(make_pairs(40)), length=30)
        seen = numbers(tokenizer, mixture)
        epochs = [seen[start : start + 40] for start in (0, 40, 80)]
        assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert epochs[0] != sorted(epochs[0])

    @pytest.mark.parametrize("num_shards", [1, 4])
    def test_processes_share_the_rows(self, make_mixture, tokenizer, num_shards):
        options = {"rows": stream_of(make_pairs(48), num_shards=num_shards), "length": 6, "num_processes": 2}
        parts = [numbers(tokenizer, make_mixture(process_index=index, **options)) for index in (0, 1)]
        assert sorted(parts[0] + parts[1]) == list(range(48))

    def test_all_processes_work_on_one_task(self, make_mixture):
        rows = stream_of([{name: row.get(name) for name in MIXED} for row in make_pairs(20) + make_texts(20)])
        mixtures = [make_mixture(rows=rows, process_index=index, num_processes=2) for index in (0, 1)]
        tasks = [[mixture.group_of(index)[0] for index in range(48)] for mixture in mixtures]
        assert tasks[0] == tasks[1]
        assert len(set(tasks[0])) == 4

    @pytest.mark.parametrize("num_batches", [1, 4, 20])
    def test_memory_holds_the_buffer_and_a_group(self, make_mixture, num_batches):
        pulled = []
        mixture = make_mixture(rows=stream_of(make_pairs(500), pulled), bucket_batches=2)
        pulled.clear()  # the look at the columns
        for index in range(num_batches):
            _ = mixture[index]
        used = 4 * num_batches
        assert used <= len(pulled) <= used + BUFFER + 2 * 4 + 4  # the reader of the stream looks a little ahead

    def test_the_seed_chooses_the_order(self, make_mixture, tokenizer):
        orders = [
            numbers(tokenizer, make_mixture(rows=stream_of(make_pairs(40)), seed=s, length=5)) for s in (0, 0, 1)
        ]
        assert orders[0] == orders[1] != orders[2]

    def test_there_is_no_single_batch(self, make_mixture):
        with pytest.raises(ValueError, match="stream"):
            make_mixture(rows=stream_of(make_pairs(4))).batch("pairs", random.Random(0))

    def test_a_forgotten_number_of_processes(self, make_mixture):
        with pytest.raises(ValueError, match=r"process_index=1.*num_processes=1"):
            make_mixture(rows=stream_of(make_pairs(4)), process_index=1)


class TestKinds:
    MIXTURE = make_texts(5) + make_pairs(5)

    def test_arrow_rows_are_not_read_into_a_list(self, make_mixture, monkeypatch):
        rows = Dataset.from_list(make_pairs(100))
        looked_up = []
        fetch = Dataset.__getitems__
        monkeypatch.setattr(Dataset, "__getitems__", lambda self, keys: looked_up.extend(keys) or fetch(self, keys))
        monkeypatch.setattr(Dataset, "__iter__", lambda self: pytest.fail("read from end to end"))
        mixture = make_mixture(rows=rows)
        assert looked_up == []
        _ = mixture[0]
        assert len(looked_up) <= 64

    def test_a_list_and_an_arrow_set_give_the_same_batches(self, make_mixture):
        sparse = [{name: row.get(name) for name in MIXED} for row in self.MIXTURE]
        arrow = Dataset.from_list(sparse, features=MIXED)
        mixtures = [make_mixture(rows=rows) for rows in (self.MIXTURE, sparse, arrow)]
        assert set(mixtures[2].weights) == {"pairs", "infilling", "last_word", "continuation"}
        for batches in zip(*mixtures):
            assert same(batches[0], batches[1])
            assert same(batches[0], batches[2])

    def test_a_selection_of_an_arrow_set_keeps_its_rows(self, make_mixture, tokenizer):
        sparse = [{name: row.get(name) for name in MIXED} for row in self.MIXTURE]
        chosen = Dataset.from_list(sparse, features=MIXED).select([9, 0, 7])
        mixture = make_mixture(rows=chosen, weights={"pairs": 1})
        assert set(numbers(tokenizer, mixture)) == {2, 4}

    def test_columns_say_the_kind(self, make_mixture):
        texts = [{**row, "source": "a book"} for row in make_texts(5)]
        for rows in (texts, Dataset.from_list(texts), stream_of(texts)):
            assert "pairs" not in make_mixture(rows=rows).weights
        with pytest.raises(ValueError, match=r"columns \['words'\]"):
            make_mixture(rows=Dataset.from_list([{"words": "a"}]))

    def test_a_target_makes_a_pair(self):
        assert kind_of({"text": "a", "source": "b", "target": "c"}) == "pairs"
        assert kind_of({"text": "a", "source": "b", "target": None}) == "text"


class TestSkipping:
    USELESS = [{"source": "row", "target": " "}, {"source": None, "target": "1"}, {"source": "row", "target": None}]

    @pytest.mark.parametrize("kind", KINDS)
    def test_useless_pairs_are_left_out_and_counted(self, make_mixture, tokenizer, kind):
        rows = [row for pair in make_pairs(3) for row in (pair, *self.USELESS)]
        mixture = make_mixture(rows=KINDS[kind](rows), weights={"pairs": 1}, length=6)
        assert set(numbers(tokenizer, mixture)) <= {0, 1, 2}
        assert mixture.num_skipped > 10

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_but_useless_rows(self, make_mixture, kind):
        for rows, lack in (
            ([{"source": "row", "target": ""}] * 300, "no target"),
            ([{"text": "One sentence of far too many words."}] * 300, "no sentence"),
        ):
            mixture = make_mixture(rows=KINDS[kind](rows), max_words=4)
            for _ in range(2):
                with pytest.raises(ValueError, match=lack):
                    _ = mixture[0]

    def test_no_rows(self, make_mixture):
        for rows in ([], Dataset.from_list([]), stream_of([]), Dataset.from_list(make_pairs(2)).select([])):
            with pytest.raises(ValueError, match="no rows to train on"):
                make_mixture(rows=rows)

    def test_a_process_without_rows(self, make_mixture):
        mixture = make_mixture(rows=stream_of(make_pairs(1)), process_index=1, num_processes=2)
        with pytest.raises(ValueError, match=r"no rows to train on in part 1 of 2"):
            _ = mixture[0]

    def test_cut_rows_are_counted(self, make_mixture):
        mixture = make_mixture(rows=[{"source": "cat " * 100, "target": "dog " * 100}], length=3)
        assert len(list(mixture)) == 3
        assert (mixture.num_truncated, mixture.num_cut_targets, mixture.num_skipped) == (12, 0, 0)
        mixture = make_mixture(rows=[{"text": "cat " * 90 + "."}], stage="autoencoder", max_words=100, length=3)
        assert len(list(mixture)) == 3
        assert (mixture.num_truncated, mixture.num_cut_targets) == (12, 0)

    @pytest.mark.parametrize("name", ["batch_size", "bucket_batches", "shuffle_buffer"])
    def test_sizes_below_one(self, make_mixture, name):
        with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
            make_mixture(**{name: 0})

    @pytest.mark.parametrize("start", [-1, 49])
    def test_a_start_beyond_the_batches(self, make_mixture, start):
        with pytest.raises(ValueError, match=f"start={start}"):
            make_mixture().batches(start)
