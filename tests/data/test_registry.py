import random

import pytest

from modeling_yan.data import REGISTRY, FormatOptions, SkippedRow
from modeling_yan.data.tasks import infilling, last_word

SUMMARY = "A man lost his dog. He looked for it in the wood. It was at home."

# One raw row each, in the very columns of the data set.
RAW = {
    "narrativeqa": {
        "document": {
            "id": "0a1b",
            "kind": "gutenberg",
            "url": "http://example.org/1.txt",
            "file_size": 1000,
            "word_count": 200,
            "start": "Once",
            "end": "end.",
            "summary": {"text": SUMMARY, "tokens": SUMMARY.split(), "url": "http://example.org/1", "title": "Dog"},
            "text": "Once upon a time ... the end.",
        },
        "question": {"text": "Where was the dog?", "tokens": ["Where", "was", "the", "dog", "?"]},
        "answers": [{"text": "At home", "tokens": ["At", "home"]}, {"text": "home", "tokens": ["home"]}],
    },
    "rocstories": {"text": "Tom was hungry. He made a cake. It was good. He ate it all. Then he was full."},
    "simplestories": {"story": "The sun rose. A bird sang.", "topic": "nature", "theme": "joy", "word_count": 6},
    "squad": {
        "id": "56be",
        "title": "Sea",
        "context": "The sea is blue.\n It is deep.",
        "question": " What is deep?",
        "answers": {"text": ["The sea", "It", "The sea"], "answer_start": [0, 18, 0]},
    },
    "babi": {
        "passage": "Mary went to the hall.\nJohn went to the garden.\n",
        "question": "Where is Mary?",
        "answer": "hall",
        "task": 1,
    },
    "sst2": {"idx": 0, "sentence": "a fine film ", "label": 1},
    "ag_news": {"text": "Shares fell on Monday.", "label": 2},
    "dbpedia": {"label": 13, "title": "The Sea", "content": " The Sea is a novel of 1900."},
    "text_infilling": {"text": SUMMARY},
    "text_last_word": {"text": SUMMARY},
    "text_continuation": {"text": SUMMARY},
    "stories": {"source": "John took the cup. Question: Who has the cup?", "target": "John.", "kind": "who_has"},
}

PAIRS = {
    "squad": {
        "source": "The sea is blue. It is deep. Question: What is deep?",
        "target": "The sea",
        "task": "question_answering",
        "answers": ["The sea", "It"],
    },
    "babi": {
        "source": "Mary went to the hall. John went to the garden. Question: Where is Mary?",
        "target": "hall",
        "task": "question_answering",
        "kind": "qa1",
    },
    "sst2": {"source": "a fine film Sentiment?", "target": "positive", "task": "classification"},
    "ag_news": {"source": "Shares fell on Monday. Topic?", "target": "Business", "task": "classification"},
    "dbpedia": {
        "source": "The Sea: The Sea is a novel of 1900. Category?",
        "target": "WrittenWork",
        "task": "classification",
    },
    "stories": RAW["stories"],
}

LABELS = {
    "sst2": "negative positive",
    "ag_news": "World Sports Business Sci/Tech",
    "dbpedia": "Company EducationalInstitution Artist Athlete OfficeHolder MeanOfTransportation Building NaturalPlace "
    "Village Animal Plant Album Film WrittenWork",
}


def format_row(name, row=None, seed=0, **options):
    return REGISTRY[name].format_row(row or RAW[name], random.Random(seed), FormatOptions(**options))


def test_the_four_families_of_the_paper():
    families = {}
    for spec in REGISTRY.values():
        if spec.hub_name:
            families.setdefault(spec.family, []).append(spec.name)
    assert families == {
        "infilling": ["narrativeqa"],
        "last_word": ["rocstories", "simplestories"],
        "question_answering": ["squad", "babi"],
        "classification": ["sst2", "ag_news", "dbpedia"],
    }
    assert RAW.keys() == REGISTRY.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    assert format_row(name) == PAIRS[name]


@pytest.mark.parametrize("name", RAW)
def test_every_row_has_the_columns_it_is_said_to_have(name):
    assert tuple(format_row(name)) == REGISTRY[name].made_columns(FormatOptions())


def test_texts_become_pairs_by_the_tasks_of_texts():
    for seed in range(5):
        assert format_row("narrativeqa", seed=seed) == infilling(SUMMARY, random.Random(seed), "<mask>")
        for name, column in (("rocstories", "text"), ("simplestories", "story")):
            pair = last_word(RAW[name][column], random.Random(seed), "[M]")
            assert format_row(name, seed=seed, mask_token="[M]") == pair
    assert format_row("rocstories", task="infilling")["task"] == "infilling"
    assert format_row("text_continuation")["source"].startswith("Continue: A man")
    assert format_row("narrativeqa", task="text") == {"text": SUMMARY}


def test_texts_are_cropped_and_tasks_take_details():
    pair = format_row("narrativeqa", max_words=5, details={"mask_ratio": 0.5, "max_span_words": 1})
    assert pair["target"] in ("A man lost his dog.", "It was at home.")
    assert len(pair["masked"]) == 2
    with pytest.raises(SkippedRow, match="no sentence of at most 3 words"):
        format_row("narrativeqa", max_words=3)


def test_an_answer_slot_begins_all_sources_but_those_of_infilling():
    for name in RAW:
        plain, slotted = format_row(name), format_row(name, answer_slot="<mask><mask> ")
        slot = "" if plain.get("task") == "infilling" else "<mask><mask> "
        assert slotted == {**plain, "source": slot + plain["source"], "answer_slot": slot}


@pytest.mark.parametrize("name", LABELS)
def test_labels_in_the_order_of_the_data_set(name):
    names = LABELS[name].split()
    assert [format_row(name, {**RAW[name], "label": label})["target"] for label in range(len(names))] == names
    for none in (-1, None):
        with pytest.raises(SkippedRow, match="no label"):
            format_row(name, {**RAW[name], "label": none})
    for wrong in (len(names), -2, "1", True, 1.0):
        with pytest.raises(ValueError, match=rf'"label" is {wrong!r}, but must be 0 \({names[0]}\), 1'):
            format_row(name, {**RAW[name], "label": wrong})


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("squad", {"answers": {"text": [], "answer_start": []}}, "no answer"),
        ("squad", {"answers": {"text": [" "], "answer_start": [0]}}, "empty target"),
        ("babi", {"answer": "\n"}, "empty target"),
        ("rocstories", {"text": " "}, "empty text"),
        ("rocstories", {"text": "No full stop"}, "not of the form that last_word needs"),
        ("text_infilling", {"text": "word"}, "too short"),
        ("stories", {"target": ""}, "empty target"),
    ],
)
def test_rows_without_anything_to_learn_are_skipped(name, change, reason):
    with pytest.raises(SkippedRow, match=reason):
        format_row(name, {**RAW[name], **change})


def top_columns(name):
    return sorted({column.split(".")[0] for column in REGISTRY[name].columns})


@pytest.mark.parametrize(("name", "column"), [(name, column) for name in RAW for column in top_columns(name)])
def test_a_missing_column_is_named_with_those_there_are(name, column):
    row = {key: value for key, value in RAW[name].items() if key != column}
    with pytest.raises(ValueError, match=rf"{name}: the column '{column}[\w.]*' is missing; there are") as error:
        format_row(name, {**row, "other": 1})
    assert all(f"'{key}'" in str(error.value) for key in [*row, "other"])


def test_a_missing_field_inside_a_column_is_named():
    with pytest.raises(ValueError, match=r"'answers\.text' is missing; there are inside 'answers' 'answer_start'"):
        format_row("squad", {**RAW["squad"], "answers": {"answer_start": [0]}})
    with pytest.raises(ValueError, match="answers holds list, not an object"):
        format_row("squad", {**RAW["squad"], "answers": [{"text": "a"}]})
    with pytest.raises(ValueError, match="rows holds list, not an object"):
        format_row("sst2", [1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("squad", {"context": None}, '"context" is NoneType, not a string'),
        ("squad", {"answers": {"text": [3]}}, '"answers" is int, not a string'),
        ("babi", {"question": 1}, '"question" is int'),
        ("ag_news", {"text": ["a"]}, '"text" is list'),
        ("rocstories", {"text": None}, '"text" is NoneType'),
        ("stories", {"target": 5}, '"target" is int'),
    ],
)
def test_a_wrong_type_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        format_row(name, {**RAW[name], **change})


def test_a_task_that_a_data_set_cannot_do():
    with pytest.raises(ValueError, match="squad: task is 'infilling', but its rows are pairs already"):
        format_row("squad", task="infilling")
    with pytest.raises(ValueError, match="task is 'poem', but must be 'text' or 'infilling' or 'last_word'"):
        format_row("rocstories", task="poem")
