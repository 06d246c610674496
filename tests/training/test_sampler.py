"""TaskSampler: batch number i is a pure function of seed, i and process; tasks come as often as their weights say."""

from collections import Counter

import pytest
import torch

from modeling_yan import YanConfig
from modeling_yan.data import TEXT_TASKS, train_tokenizer
from modeling_yan.training.sampler import TaskSampler

TEXTS = [
    {"text": "The cat sat on the mat. Then it ran to the garden. Nobody saw it again."},
    {"text": "Mary has a red apple. She gave it to John. John was very happy about it."},
    {"text": "It rained all day long. The dog stayed in the house and slept."},
]
PAIRS = [{"source": f"Where is {name}?", "target": f"{name} is here."} for name in ("Mary", "John", "the dog", "Ann")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["text"] for row in TEXTS] * 4, vocab_size=400)


@pytest.fixture
def make_mixture(tokenizer):
    """Function from overrides to a mixture of all rows, for the flow stage."""
    config = YanConfig(vocab_size=len(tokenizer), canvas_length=40, max_position_embeddings=48)
    defaults = {"rows": TEXTS + PAIRS, "stage": "flow", "batch_size": 4, "length": 200, "seed": 0}
    return lambda **overrides: TaskSampler(tokenizer=tokenizer, config=config, **{**defaults, **overrides})


def same(first, second) -> bool:
    """Whether two batches are equal, in every tensor and in the canvas."""
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) for name in first
    )


def texts(tokenizer, batch, name) -> list[str]:
    rows = [row[row >= 0] for row in batch[name]]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@pytest.mark.parametrize("stage", ["autoencoder", "flow"])
class TestRepetition:
    def test_a_batch_is_the_same_whenever_it_is_asked_for(self, make_mixture, stage):
        mixture = make_mixture(stage=stage)
        forwards = [mixture[index] for index in range(8)]
        other = make_mixture(stage=stage)
        torch.manual_seed(1)
        backwards = [other[index] for index in reversed(range(8))]
        assert all(same(*pair) for pair in zip(forwards, reversed(backwards)))

    def test_batches_differ_from_one_another(self, make_mixture, stage):
        mixture = make_mixture(stage=stage)
        assert not any(same(mixture[0], mixture[index]) for index in range(1, 8))

    def test_seeds_and_processes_see_other_batches(self, make_mixture, stage):
        mixtures = [
            make_mixture(stage=stage),
            make_mixture(stage=stage, seed=1),
            make_mixture(stage=stage, process_index=1),
        ]
        for index in range(5):
            first, *others = [mixture[index] for mixture in mixtures]
            assert not any(same(first, other) for other in others)

    def test_length_bounds_the_iteration(self, make_mixture, stage):
        mixture = make_mixture(stage=stage, length=3)
        assert len(mixture) == len(list(mixture)) == 3
        for index in (-1, 3):
            with pytest.raises(IndexError):
                mixture[index]


class TestTasks:
    def test_rows_and_stage_say_which_there_are(self, make_mixture):
        assert set(make_mixture().weights) == {"pairs", *TEXT_TASKS}
        assert set(make_mixture(stage="autoencoder").weights) == {"pairs", "text"}
        assert set(make_mixture(rows=PAIRS).weights) == {"pairs"}
        assert set(make_mixture(rows=TEXTS).weights) == set(TEXT_TASKS)

    @pytest.fixture
    def draw_tasks(self, make_mixture):
        """Function from overrides to the task of every batch, in order."""

        def draw(**overrides):
            mixture = make_mixture(length=300, **overrides)
            return [mixture.group_of(index)[0] for index in range(300)]

        return draw

    def test_without_weights_all_come_equally_often(self, draw_tasks):
        counts = Counter(draw_tasks())
        assert set(counts) == {"pairs", *TEXT_TASKS}
        assert all(45 <= count <= 105 for count in counts.values())  # 75 +- 4 sigma

    def test_weights_are_respected(self, draw_tasks):
        counts = Counter(draw_tasks(weights={"pairs": 3, "infilling": 1, "last_word": 0}))
        assert set(counts) == {"pairs", "infilling"}
        assert 195 <= counts["pairs"] <= 255  # 225 +- 4 sigma

    def test_all_processes_work_on_one_task_at_a_time(self, draw_tasks):
        first = draw_tasks(process_index=0)
        assert draw_tasks(process_index=1) == first
        assert draw_tasks(seed=1) != first

    def test_a_pairs_target_stands_beside_its_source(self, make_mixture, tokenizer):
        batch = make_mixture(rows=PAIRS)[0]
        pairs = zip(texts(tokenizer, batch, "input_ids"), texts(tokenizer, batch, "labels"))
        assert set(pairs) <= {(row["source"], row["target"]) for row in PAIRS}

    def test_texts_are_cropped_to_whole_sentences(self, make_mixture, tokenizer):
        mixture = make_mixture(stage="autoencoder", rows=TEXTS, max_words=7, length=20)
        seen = {text for batch in mixture for text in texts(tokenizer, batch, "labels")}
        assert seen == {
            "The cat sat on the mat.",
            "Then it ran to the garden.",
            "Nobody saw it again.",
            "Mary has a red apple.",
            "She gave it to John.",
            "John was very happy about it.",
            "It rained all day long.",
        }


class TestShapes:
    def test_the_canvas_holds_the_labels_and_varies(self, make_mixture):
        batches = list(make_mixture(length=100))
        canvases = Counter(batch["canvas_length"] - batch["labels"].shape[1] for batch in batches)
        assert min(canvases) == 0
        assert sum(wider > 0 for wider in canvases.elements()) > 5
        assert all(batch["canvas_length"] % 8 == 0 and batch["canvas_length"] <= 40 for batch in batches)

    def test_a_canvas_of_any_length_is_drawn(self, make_mixture):
        mixture = make_mixture(length=100)
        mixture.config = mixture.config.with_fields(canvas_length=30)
        mixture._collator.canvas_length = 30
        assert {batch["canvas_length"] for batch in mixture} <= {8, 16, 24, 30}
        assert 30 in {batch["canvas_length"] for batch in mixture}

    @pytest.mark.parametrize("stage", ["autoencoder", "flow"])
    def test_no_source_is_longer_than_allowed(self, make_mixture, stage):
        widths = {batch["input_ids"].shape[1] for batch in make_mixture(stage=stage, max_source_length=12, length=40)}
        assert max(widths) <= 12

    @pytest.mark.parametrize("stage", ["autoencoder", "flow"])
    def test_nor_longer_than_the_positions(self, make_mixture, stage):
        long = [{"text": "The cat sat on the mat and " * 20 + "slept."}]
        mixture = make_mixture(stage=stage, rows=long, max_words=1000, max_source_length=1000, length=8)
        assert max(batch["input_ids"].shape[1] for batch in mixture) == 48


class TestRefusals:
    def test_an_unknown_task(self, make_mixture):
        with pytest.raises(ValueError, match=r"no rows for the task translation.*allow pairs, infilling"):
            make_mixture(weights={"translation": 1.0})

    def test_a_task_without_rows(self, make_mixture):
        with pytest.raises(ValueError, match="no rows for the task pairs"):
            make_mixture(rows=TEXTS, weights={"pairs": 1.0})

    def test_a_task_of_the_other_stage(self, make_mixture):
        with pytest.raises(ValueError, match="no rows for the task infilling"):
            make_mixture(stage="autoencoder", weights={"infilling": 1.0})

    @pytest.mark.parametrize("weights", [{"pairs": -1.0, "infilling": 2.0}, {"pairs": 0.0}, {"pairs": float("nan")}])
    def test_weights_that_choose_nothing(self, make_mixture, weights):
        with pytest.raises(ValueError, match="task weights"):
            make_mixture(weights=weights)

    def test_no_rows_at_all(self, make_mixture):
        with pytest.raises(ValueError, match="rows"):
            make_mixture(rows=[])

    def test_an_unknown_stage(self, make_mixture):
        with pytest.raises(ValueError, match="stage='both'"):
            make_mixture(stage="both")

    def test_texts_of_which_no_sentence_fits(self, make_mixture):
        with pytest.raises(ValueError, match="no sentence of 2 to max_words=2 words, between white space"):
            make_mixture(rows=TEXTS, max_words=2)[0]
