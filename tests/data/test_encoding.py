"""Where the target of a row is learned: as the row says, and as it is inferred for rows that say nothing."""

import random

import numpy as np
import pytest
import torch

from modeling_yan.data import AutoencoderCollator, FlowCollator, build_pairs, generate_clozes, generate_stories
from modeling_yan.data.encoding import encode_rows

FIELDS = ("answer_slot", "in_place")
SLOT = "<mask>" * 6 + " "
TEXTS = [{"text": " ".join(row["source"].split()[4:]), "label": row["kind"]} for row in generate_stories(40, seed=5)]
TASKS = {
    "stories": generate_stories(24, seed=1),
    "stories with a slot": generate_stories(24, seed=1, answer_slot=SLOT),
    "clozes": generate_clozes(24, seed=1),
    "continuation": build_pairs(TEXTS, "continuation", 24, 0, 24),
    "last word": build_pairs(TEXTS, "last_word", 24, 0, 24),
    "last word with a slot": build_pairs(TEXTS, "last_word", 24, 0, 24, answer_slot=SLOT),
    "kinds with a slot": build_pairs(TEXTS, "classification", 24, 0, 24, label_column="label", answer_slot=SLOT),
    "infilling": build_pairs(TEXTS, "infilling", 24, 0, 24, mask_ratio=0.3),
}


def batches(rows, tokenizer):
    """What both collators make of the rows, with room and with less."""
    for length in (24, 128):
        for num_answer_slots in (0, 8):
            collator = AutoencoderCollator(tokenizer, length, seed=3, num_answer_slots=num_answer_slots)
            yield from (collator(rows), collator(rows))
        yield FlowCollator(tokenizer, length, 16)(rows)


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_before_the_fields_give_the_same_batches(name, tokenizer):
    rows = TASKS[name]
    says_nothing = name in ("stories", "continuation", "last word")
    assert says_nothing != any(field in row for row in rows for field in FIELDS)
    if name in ("infilling", "clozes"):  # a mask token that begins a source was taken for a slot, which a cut shows
        rows = [row for row in rows if not row["source"].startswith("<mask>")]
    old = [{key: value for key, value in row.items() if key not in FIELDS} for row in rows]
    for batch, expected in zip(batches(rows, tokenizer), batches(old, tokenizer), strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_the_mask_token_that_begins_an_infilling_is_no_answer_slot(tokenizer):
    source = "<mask> " + "the apple " * 20
    row = {"source": source, "target": "Mary", "answer_slot": ""}
    ids = FlowCollator(tokenizer, 8, 16)([row])["input_ids"][0]
    assert ids.tolist() == tokenizer(source)["input_ids"][-8:]
    del row["answer_slot"]
    assert FlowCollator(tokenizer, 8, 16)([row])["input_ids"][0, 0] == tokenizer.mask_token_id


def test_a_row_says_where_its_target_is_learned(tokenizer):
    """Three of four mask tokens are the slot, and of a target in its source's place one token is learned."""
    mask = tokenizer.mask_token_id
    rows = [
        {"source": [mask, mask, mask, mask, 20], "target": [10, 11], "answer_span": [0, 3]},
        {"source": [20, 21, mask], "target": [20, 22, 23], "loss_mask": [0, 1, 0]},
    ]
    labels = AutoencoderCollator(tokenizer, 16)(rows)["labels"].tolist()
    assert labels == [[10, 11, tokenizer.eos_token_id, *[-100] * 5], [-100, 22, *[-100] * 6]]


@pytest.mark.parametrize("source", [[20, 21], [20, 21, 22, 23]], ids=len)
def test_slots_before_a_source_are_masks_or_copies_of_it(tokenizer, source):
    mask, row = tokenizer.mask_token_id, {"source": source, "target": [10]}
    for copies, slots in ((False, 3 * [mask]), (True, [*source, mask][:3])):
        collator = AutoencoderCollator(tokenizer, 16, num_answer_slots=3, copy_prompt_to_slots=copies)
        batch = collator([row])
        assert batch["input_ids"][0, : 3 + len(source)].tolist() == [*slots, *source]
        assert batch["labels"][0, :4].tolist() == [10, tokenizer.eos_token_id, tokenizer.eos_token_id, -100]


def test_encoded_rows_stay_as_they_are(tokenizer):
    rows = [TASKS[name][0] for name in ("stories with a slot", "clozes", "infilling")]
    once = encode_rows(tokenizer, [*rows, {"text": "Mary took the apple."}])
    twice = encode_rows(tokenizer, once)
    for row, again in zip(once, twice, strict=True):
        assert row.keys() == again.keys()
        assert all(np.array_equal(row[key], again[key]) for key in row)
    assert [row.get("answer_span") for row in once] == [(0, 6), (0, 0), (0, 0), None]
    assert ["loss_mask" in row for row in once] == [False, True, False, False]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer_span", (1, 4), r"answer_span=\(1, 4\): must be start and stop in a source of 3 tokens"),
        ("answer_span", (2, 1), r"answer_span=\(2, 1\)"),
        ("loss_mask", [1, 0], "loss_mask of 2: must have one number for each of 3 tokens"),
        ("answer_slot", 3, "answer_slot=3: must be a string"),
    ],
)
def test_a_field_that_does_not_fit_is_named(field, value, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode_rows(tokenizer, [{"source": [10, 11, 12], "target": [13], field: value}])


def test_training_batches_have_the_fields_of_their_rows(tokenizer):
    """The sampler hands them on: without, the masks of a slot that the row denies would be found again."""
    from modeling_yan import YanConfig
    from modeling_yan.training.sampler import TaskSampler

    rows = [{"source": SLOT + "who", "target": "Mary", "answer_slot": ""}]
    config = YanConfig(vocab_size=len(tokenizer), canvas_length=16)
    sampler = TaskSampler(rows, tokenizer, config, "autoencoder", 1, 1, 0)
    labels = sampler.batch("pairs", random.Random(0))["labels"][0].tolist()
    assert labels[0] == -100
