import random
import re

import pytest

from modeling_yan.data import TEXT_TASKS, build_pairs, crop_sentences, read_rows, split_sentences, write_rows
from modeling_yan.data.tasks import infilling, last_word, main

MASK = "<mask>"
TEXT = 'Mr. Hall saw it. "Is it far?" he asked. It was a well-known road! Nobody\nknew J. Smith, of St. Ives.'


def numbered(num_words):
    return " ".join(f"w{number}" for number in range(num_words))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            TEXT,
            [
                "Mr. Hall saw it.",
                '"Is it far?" he asked.',
                "It was a well-known road!",
                "Nobody\nknew J. Smith, of St. Ives.",
            ],
        ),
        ('He said "No." Then left.', ['He said "No."', "Then left."]),
        ("Really?! Élan! (Yes.) \u201cNo.\u201d", ["Really?!", "Élan!", "(Yes.)", "\u201cNo.\u201d"]),
        ("no capital. follows 3.5 times", ["no capital. follows 3.5 times"]),
        ("  One.   Two.  ", ["One.", "Two."]),
        (" ", []),
    ],
)
def test_split_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_crops_are_runs_of_whole_sentences_as_long_as_possible():
    sentences = split_sentences(TEXT)
    for seed in range(50):
        crop = crop_sentences(TEXT, 9, random.Random(seed))
        assert len(crop.split()) <= 9
        runs = {" ".join(sentences[i:j]): j for i in range(4) for j in range(i + 1, 5)}
        stop = runs[crop]
        assert stop == 4 or len(f"{crop} {sentences[stop]}".split()) > 9
    assert {crop_sentences(TEXT, 9, random.Random(seed)) for seed in range(50)} >= {sentences[3]}
    assert crop_sentences(TEXT, 3, random.Random(0)) is None


def test_infilling_can_be_put_together_again():
    for seed in range(300):
        rng = random.Random(seed)
        text = numbered(rng.randint(2, 60))
        pair = infilling(text, rng, MASK, mask_ratio=0.3)
        assert pair["target"] == text
        shown = pair["source"].removesuffix(" Fill in.")
        assert f"{MASK} {MASK}" not in shown
        assert shown.split().count(MASK) == len(pair["masked"]) >= 1
        assert all(1 <= len(span.split()) <= 3 for span in pair["masked"])
        for span in pair["masked"]:
            shown = shown.replace(MASK, span, 1)
        assert shown == text


def test_infilling_can_show_one_mask_per_token():
    def count(span):
        return len(span.replace(" ", ""))

    text = numbered(40)
    for seed in range(50):
        pair = infilling(text, random.Random(seed), MASK, mask_ratio=0.2, count_tokens=count)
        gaps = [word for word in pair["source"].split() if word.startswith(MASK)]
        assert gaps == [MASK * count(span) for span in pair["masked"]]


def test_an_answer_slot_begins_the_source_of_a_last_word():
    pair = last_word("The cat sat on the mat.", random.Random(0), MASK, answer_slot=f"{MASK}{MASK} ")
    assert pair["source"] == f"{MASK}{MASK} Last word: The cat sat on the {MASK}."
    assert pair["target"] == "mat"


@pytest.mark.parametrize("mask_ratio", [0.08, 0.15, 0.5])
def test_infilling_masks_its_share(mask_ratio):
    masked = [infilling(numbered(50), random.Random(seed), MASK, mask_ratio)["masked"] for seed in range(50)]
    assert {sum(len(span.split()) for span in spans) for spans in masked} == {round(mask_ratio * 50)}


def test_infilling_reaches_every_word():
    positions = [infilling(numbered(6), random.Random(seed), MASK)["masked"][0] for seed in range(200)]
    assert set(positions) == {f"w{number}" for number in range(6)}


@pytest.mark.parametrize(
    ("text", "source", "target"),
    [
        ("It was a well-known.", "It was a <mask>.", "well-known"),
        ("We don't.", "We <mask>.", "don't"),
        ("It fell--though.", "It fell--<mask>.", "though"),
        ('He said "no!"', 'He said "<mask>!"', "no"),
        ("Der alte Käse.", "Der alte <mask>.", "Käse"),
        ("One\ntwo.", "One\n<mask>.", "two"),
    ],
)
def test_last_word(text, source, target):
    pair = TEXT_TASKS["last_word"](text, random.Random(0), MASK)
    assert pair == {"source": f"Last word: {source}", "target": target, "task": "last_word"}


@pytest.mark.parametrize("text", ["", "Yes.", "'Yes.'", "no full stop", "It ended in 1961.", "The 4th.", "He ran;"])
def test_last_word_skips_what_does_not_end_in_a_word(text):
    assert TEXT_TASKS["last_word"](text, random.Random(0), MASK) is None


def test_last_word_cuts_at_every_sentence():
    pairs = [TEXT_TASKS["last_word"]("A one. A two. A three.", random.Random(seed), MASK) for seed in range(30)]
    assert {pair["target"] for pair in pairs} == {"one", "two", "three"}


def test_continuation_cuts_in_the_middle_half():
    for seed in range(50):
        pair = TEXT_TASKS["continuation"](numbered(12), random.Random(seed), MASK)
        assert pair["source"].removeprefix("Continue: ") + " " + pair["target"] == numbered(12)
        assert 3 <= len(pair["target"].split()) <= 9
    assert TEXT_TASKS["continuation"]("two words", random.Random(0), MASK)["target"] == "words"


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_every_task_makes_pairs_by_seed_alone(task):
    text_rows = [{"text": TEXT}, {"text": "A small dog ran. Then a large cat sat down."}, {"text": "Ok"}]
    pairs = build_pairs(text_rows, task, num_rows=5, seed=1, max_words=12)
    assert build_pairs(text_rows, task, num_rows=5, seed=1, max_words=12) == pairs
    assert len({pair["source"] for pair in pairs}) == 5
    for pair in pairs:
        assert pair["task"] == task
        assert pair["target"].strip()
        assert (MASK in pair["source"]) == (task != "continuation")
        assert len(re.sub(r"^[\w ]+:", "", pair["source"]).split()) <= 12


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_texts_too_short_are_left_out(task):
    assert TEXT_TASKS[task]("word", random.Random(0), MASK) is None


def test_build_pairs_uses_every_text_before_any_again():
    text_rows = [
        {"text": text} for text in ("The dog sat here.", "A cow ran away.", "Hens fly.", "Rain came at once.")
    ]
    pairs = build_pairs(text_rows, "infilling", num_rows=4, seed=0, max_words=10)
    assert {pair["target"] for pair in pairs} == {row["text"] for row in text_rows}


def test_build_pairs_gives_up_where_every_round_finds_almost_nothing():
    numbers = range(1000)
    text_rows = [{"text": f"Word {number}."} for number in numbers] + [{"text": " ".join(map(str, numbers))}]
    with pytest.raises(ValueError, match=r"1001 texts give only about 10.. of 20000 pairs"):  # one text has many cuts
        build_pairs(text_rows, "infilling", num_rows=20000, seed=0, max_words=1000)


def test_build_pairs_says_when_there_is_no_more():
    with pytest.raises(ValueError, match="1 texts give only about 1 of 2 pairs"):
        build_pairs([{"text": "A dog ran."}], "last_word", num_rows=2, seed=0, max_words=10)
    with pytest.raises(ValueError, match="unknown task 'poem'; known are infilling, last_word, continuation"):
        build_pairs([], "poem", num_rows=1, seed=0, max_words=10)


def test_classification_takes_its_labels_from_a_column():
    text_rows = [{"text": "A dog ran.", "kind": "dogs"}, {"text": "A cow ate.", "kind": "cows"}]
    pairs = build_pairs(text_rows, "classification", 2, seed=0, max_words=9, label_column="kind", answer_slot="_ ")
    assert {(pair["source"], pair["target"]) for pair in pairs} == {
        ("_ Kind: A dog ran.", "dogs"),
        ("_ Kind: A cow ate.", "cows"),
    }
    with pytest.raises(ValueError, match="label_column='group': must be a column of the rows, which have text, kind"):
        build_pairs(text_rows, "classification", 2, seed=0, max_words=9, label_column="group")


def test_command(tmp_path):
    text_rows = [{"text": TEXT}] * 3
    write_rows(tmp_path / "texts.jsonl.gz", text_rows)
    files = ["--file", str(tmp_path / "texts.jsonl.gz"), "--output", str(tmp_path / "pairs.jsonl")]
    main([*files, "--task", "infilling", "--num_rows", "4", "--max_words", "9", "--seed", "5"])
    assert read_rows(tmp_path / "pairs.jsonl") == build_pairs(text_rows, "infilling", 4, seed=5, max_words=9)


def test_command_that_counts_tokens(tmp_path, tokenizer):
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in ("He saw it.", "She knew Elizabeth.")])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    files = ["--file", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "pairs.jsonl")]
    counting = [*files, "--tokenizer", str(tmp_path / "tokenizer")]
    main([*counting, "--task", "infilling", "--num_rows", "2", "--mask_ratio", "0.3"])
    for pair in read_rows(tmp_path / "pairs.jsonl"):
        assert pair["source"].count(MASK) == sum(len(tokenizer.tokenize(span)) for span in pair["masked"])
    limit = len(tokenizer.tokenize("it"))
    assert limit < len(tokenizer.tokenize("Elizabeth"))
    main([*counting, "--task", "last_word", "--num_rows", "1", "--max_target_tokens", str(limit)])
    assert [pair["target"] for pair in read_rows(tmp_path / "pairs.jsonl")] == ["it"]


def test_command_that_hides_more(tmp_path):
    write_rows(tmp_path / "texts.jsonl", [{"text": numbered(20) + "."}])
    files = ["--file", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "pairs.jsonl")]
    main([*files, "--task", "infilling", "--num_rows", "1", "--mask_ratio", "0.4"])
    (pair,) = read_rows(tmp_path / "pairs.jsonl")
    assert sum(len(span.split()) for span in pair["masked"]) == 8
    with pytest.raises(ValueError, match=r"mask_ratio=0\.6: must be from 0 to 0\.5"):
        main([*files, "--task", "infilling", "--num_rows", "1", "--mask_ratio", "0.6"])


def test_command_that_can_not_count(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main("--file f --task last_word --num_rows 1 --output o --max_target_tokens 1".split())
    assert "--max_target_tokens needs --tokenizer" in capsys.readouterr().err
